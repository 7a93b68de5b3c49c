"""Flamingo (Idefics): pictures between texts; ids equal transformers', alone and in batches of different lengths."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

import torch
from transformers import IdeficsForVisionText2Text, IdeficsImageProcessorPil

from blip2edge.bundle.prompt_spec import PromptSpec
from blip2edge.cli.caption import assign
from blip2edge.cli.picture_arguments import PictureArgument
from blip2edge.errors import CheckpointError, UsageError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.model.checkpoint.image_processor import read_image_processor
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.text.prompt import attended_images, cross_attention_mask, interleave, pack_images
from tests.families.drawing_idefics import IMAGE_SIZE, TINY_VISION, draw_idefics

VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "every second layer, normed queries and keys": (0, {}),
    "every layer, a gate a channel, normed perceiver, tied": (
        3,
        {
            "cross_layer_interval": 1,
            "num_hidden_layers": 2,
            "qk_layer_norms": False,
            "alpha_type": "vector",
            "tie_word_embeddings": True,
            "perceiver": {"qk_layer_norms_perceiver": True},
        },
    ),
    "no resampler, no additional vocabulary": (
        2,
        {"use_resampler": False, "additional_vocab_size": 0, "vocab_size": 93, "num_hidden_layers": 2},
    ),
}
SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 3, "repetition_penalty": 1.3},
    {"encoder_repetition_penalty": 2.5, "no_repeat_ngram_size": 1, "min_length": 12},
)
NEW_TOKENS = 10
Model = tuple[Any, Any, Path]


def pictures(seed: int, count: int) -> list[PIL.Image.Image]:
    """Noise, each in a size of its own."""
    rng = np.random.default_rng(seed)
    return [
        PIL.Image.fromarray(rng.integers(0, 256, (40 + 9 * index, 50, 3), dtype=np.uint8)) for index in range(count)
    ]


def requests(a: Any, b: Any, c: Any) -> list[tuple[Any, str | None, list[Any]]]:
    """Pictures and prompt as the captioner takes them, and the list that IdeficsProcessor takes."""
    return [
        (a, "a photo of", [a, "a photo of"]),
        ([b, c], "a dog : <image> two cats . <image>what is", ["a dog :", b, "two cats .", c, "what is"]),
        ([c, a, b], "<image>{image}red dog</s> a <image>", [c, a, "red dog</s> a", b]),
        ([b], None, [b]),
    ]


def expected(model: Any, processor: Any, text: list[Any], **search: Any) -> list[int]:
    """What transformers generates for one prompt, padding taken off."""
    inputs = processor(text=[text], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **search)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


QUICK, MIDDLE, PLAIN = VARIANTS


@pytest.fixture(
    scope="module",
    params=[QUICK, pytest.param(MIDDLE, marks=pytest.mark.slow), PLAIN],
    ids=lambda name: name.replace(" ", "-"),
)
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    seed, overrides = VARIANTS[request.param]
    directory = tmp_path_factory.mktemp("idefics")
    model, processor = draw_idefics(directory, seed, **overrides)
    return model, processor, directory


def test_ids_are_those_of_transformers_alone_and_in_a_ragged_batch(drawn: Model, tmp_path: Path) -> None:
    model, processor, directory = drawn
    captioner = Captioner.load(export_checkpoint(directory, tmp_path / "bundle").bundle, threads=1)
    asked = requests(*pictures(7, 3))
    items, prompts = [item for item, _, _ in asked], [prompt for _, prompt, _ in asked]
    for search in SEARCHES:
        options = {"max_new_tokens": NEW_TOKENS, **search}
        together = captioner.caption_many(items, prompts=prompts, batch_size=len(items), **options)
        for (item, prompt, text), result in zip(asked, together, strict=True):
            wanted = expected(model, processor, text, **search)
            alone = captioner.caption(item, prompt=prompt, **options)
            assert list(result.tokens) == wanted[: len(result.tokens)]
            assert not any(wanted[len(result.tokens) :])  # padding
            assert alone.tokens == result.tokens
    other = [captioner.caption(picture, prompt="a", max_new_tokens=NEW_TOKENS).tokens for picture in pictures(8, 6)]
    assert len(set(other)) > 1, "the pictures change nothing, so that equal ids prove nothing"


def test_a_saved_checkpoint_is_the_one_that_was_read(drawn: Model, tmp_path: Path) -> None:
    model, processor, directory = drawn
    save_checkpoint(load_checkpoint(directory), tmp_path, like=directory)
    again = IdeficsForVisionText2Text.from_pretrained(tmp_path)
    inputs = processor(text=[[pictures(7, 1)[0], "a photo of"]], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Model:
    directory = tmp_path_factory.mktemp("idefics")
    return *draw_idefics(directory, 0), directory


@pytest.mark.slow
def test_fp16_and_single_layers_are_verified(tmp_path: Path) -> None:
    draw_idefics(
        tmp_path / "checkpoint",
        0,
        num_hidden_layers=2,
        cross_layer_interval=1,
        perceiver={"resampler_depth": 1},
        vision_config={**TINY_VISION, "num_hidden_layers": 1},
    )
    report = export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle", precision="fp16", verify="sample")
    assert {graph.name for graph in report.graphs} == {"vision_encoder", "bridge", "cross_kv", "decoder"}
    assert max(graph.relative for graph in report.graphs) < 2e-2
    records = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["graphs"]
    assert {parity["sample"] for parity in records["cross_kv"]["parity"]} == {"layer 0 of 2", "layer 1 of 2"}
    assert len(Captioner.load(report.bundle, threads=1).caption(pictures(1, 1), max_new_tokens=3).tokens) == 3


def test_the_prompt_is_written_as_the_processor_writes_it(plain: Model) -> None:
    _, processor, _ = plain
    spec = PromptSpec(
        "{image}{prompt}",
        "",
        0,
        1,
        picture_token="<image>",
        around_picture="<fake_token_around_image>",
        kind="interleaved",
    )
    for item, prompt, text in requests(*pictures(7, 3)):
        count = len(item) if isinstance(item, list) else 1
        inputs = processor(text=[text], return_tensors="pt")
        ids = processor.tokenizer("<s>" + interleave(spec, prompt or "", count), add_special_tokens=False)["input_ids"]
        assert ids == inputs["input_ids"][0].tolist()
        looks = attended_images(
            ids, processor.tokenizer.convert_tokens_to_ids("<image>"), processor.tokenizer.eos_token_id
        )
        assert np.array_equal(cross_attention_mask([looks], count, count)[0], inputs["image_attention_mask"][0].numpy())
    with pytest.raises(UsageError, match="2 picture markers, but 3 pictures were given"):
        interleave(spec, "<image>a{image}", 3)


def test_pictures_of_a_ragged_batch_stand_side_by_side() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 2, 2) + 1
    packed = pack_images(array, [1, 2])
    assert packed.shape == (2, 4, 2)
    assert np.array_equal(packed[0], np.concatenate([array[0], np.zeros((2, 2))]))
    assert np.array_equal(packed[1], np.concatenate([array[1], array[2]]))


def test_prompts_on_the_command_line_take_as_many_pictures_as_they_have_places_for() -> None:
    def assigned(names: str, prompts: list[str] | None) -> tuple[list[str | list[str]], list[str] | None]:
        items, given = assign([PictureArgument(name) for name in names], prompts)
        return [item.name for item in items], given

    assert assigned("abc", None) == (["a", "b", "c"], None)
    assert assigned("ab", ["x"]) == (["a", "b"], ["x", "x"])
    few = "<image>A cat.<image>A"
    assert assigned("abcd", [few]) == ([["a", "b"], ["c", "d"]], [few, few])
    assert assigned("abc", [few, "plain"]) == ([["a", "b"], "c"], [few, "plain"])
    with pytest.raises(UsageError, match="<image> for 2 pictures, but 3 pictures are given"):
        assigned("abc", [few])


@pytest.mark.parametrize("size", [IMAGE_SIZE, 224])
def test_preprocessing_is_that_of_the_image_processor(size: int) -> None:
    processor = IdeficsImageProcessorPil(image_size=size)
    older = {"image_processor_type": "IdeficsImageProcessor", "image_size": size, "image_num_channels": 3}
    for config in (processor.to_dict(), older):
        for picture in pictures(5, 3):
            wanted = np.asarray(processor([picture], return_tensors="np"))[0]
            assert np.array_equal(read_image_processor(config).preprocessing(picture), wanted)


def test_what_does_not_fit_is_refused_in_a_line(plain: Model, tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    shutil.copytree(plain[2], directory)
    config = json.loads((directory / "config.json").read_text())

    def refused(reason: str, **changes: Any) -> None:
        (directory / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=reason) as error:
            export_checkpoint(directory, tmp_path / "bundle")
        assert "\n" not in str(error.value)

    refused("does not divide", cross_layer_interval=3)
    refused("alpha_type is 'matrix'", alpha_type="matrix")
    refused(r"requires \[97, 32\]", additional_vocab_size=7)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if "fake" not in token["content"]]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    refused("no token <fake_token_around_image>")
