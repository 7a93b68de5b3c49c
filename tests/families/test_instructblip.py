"""InstructBLIP compared with transformers: instruction in the Q-Former, two tokenizers, three language models."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="bundles run on ONNX Runtime")

import torch
from PIL import Image
from transformers import InstructBlipForConditionalGeneration

from blip2edge.errors import CheckpointError, PromptError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.model.checkpoint.directory import load_checkpoint, save_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from tests.families.drawing_instruct import SIZE, draw_instructblip

PROMPTS = ("A short image caption.", "what is it doing?", "Question: what is it, two cats? Short answer:")
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "penalties": {"num_beams": 3, "length_penalty": -1.0, "repetition_penalty": 1.3, "min_new_tokens": 4},
    "processors": {
        "no_repeat_ngram_size": 1,
        "forced_bos_token_id": 30,
        "begin_suppress_tokens": [40],
        "min_length": 7,
    },
}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "t5": (0, "t5", {}),
    "llama": (1, "llama", {"cross_attention_frequency": 1}),
    "opt": (2, "opt", {"num_hidden_layers": 2, "hidden_act": "relu"}),
}


class Exported(NamedTuple):
    directory: Path
    model: Any
    processor: Any
    captioner: Captioner
    encoder_decoder: bool


@pytest.fixture(scope="module", params=["t5", "llama", pytest.param("opt", marks=pytest.mark.slow)])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    seed, kind, qformer = CASES[request.param]
    directory = tmp_path_factory.mktemp(kind)
    model, processor = draw_instructblip(directory / "checkpoint", seed, kind, **qformer)
    bundle = export_checkpoint(directory / "checkpoint", directory / "bundle").bundle
    return Exported(directory / "checkpoint", model, processor, Captioner.load(bundle, threads=1), kind == "t5")


@pytest.fixture
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    sizes = ((40, 50), (33, 70), (64, 32))
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in sizes]


def expected(exported: Exported, picture: Any, prompt: str, **search: Any) -> list[int]:
    """What transformers generates for one picture, the padding left out."""
    inputs = exported.processor(images=picture, text=prompt, return_tensors="pt")
    with torch.no_grad():
        ids = exported.model.generate(**inputs, max_new_tokens=10, **search)[0].tolist()
    start = 0 if exported.encoder_decoder else inputs["input_ids"].shape[1]
    end = 3
    ids = ids[start:]
    return ids[: ids.index(end) + 1] if end in ids else ids


@pytest.mark.parametrize("search", list(SEARCHES))
def test_single_and_batched_ids_are_transformers(exported: Exported, pictures: list[Image.Image], search: str) -> None:
    options = SEARCHES[search] | {"max_new_tokens": 10}
    wanted = [
        expected(exported, picture, prompt, **SEARCHES[search])
        for picture, prompt in zip(pictures, PROMPTS, strict=True)
    ]
    assert len({tuple(ids) for ids in wanted}) == 3
    batched = exported.captioner.caption_many(pictures, prompts=PROMPTS, batch_size=3, **options)
    assert [list(result.tokens) for result in batched] == wanted
    for picture, prompt, ids in zip(pictures, PROMPTS, wanted, strict=True):
        assert list(exported.captioner.caption(picture, prompt=prompt, **options).tokens) == ids


def test_the_instruction_changes_what_the_bridge_sees(exported: Exported, pictures: list[Image.Image]) -> None:
    assert exported.captioner.encoder.text.instructions is not None
    assert exported.captioner.encoder.images.bridge is not None
    pixels = exported.captioner.encoder.images.preprocessing.batch(pictures[:1])
    embeds = exported.captioner.encoder.images.vision.run({"pixel_values": pixels})["image_embeds"].repeat(2, axis=0)
    instruction = exported.captioner.encoder.text.instructions(PROMPTS[:2])
    visual = exported.captioner.encoder.images.bridge.run({"image_embeds": embeds, **instruction})["visual_tokens"]
    assert np.abs(visual[0] - visual[1]).max() > 0.1


def test_without_a_prompt_the_family_has_one(exported: Exported, pictures: list[Image.Image]) -> None:
    wanted = expected(exported, pictures[0], "A short image caption.")
    result = exported.captioner.caption(pictures[0], max_new_tokens=10)
    assert list(result.tokens) == wanted
    assert result.prompt is None
    assert "".join(exported.captioner.stream(pictures[0], max_new_tokens=10)).strip() == result.text


def test_a_question_has_the_template_of_the_paper(exported: Exported, pictures: list[Image.Image]) -> None:
    wanted = expected(exported, pictures[0], "Question: what is it? Short answer:")
    assert list(exported.captioner.ask(pictures[0], "what is it?", max_new_tokens=10).tokens) == wanted


def test_no_instruction_is_one_line(
    exported: Exported, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = dataclasses.replace(exported.captioner.prompts.spec, default=None)
    monkeypatch.setattr(exported.captioner.prompts, "spec", spec)
    with pytest.raises(PromptError, match="give a prompt"):
        exported.captioner.caption(pictures[0])


def test_too_long_an_instruction_is_one_line(exported: Exported, pictures: list[Image.Image]) -> None:
    with pytest.raises(PromptError, match=r"has 32 tokens, but the Q-Former takes at most 24"):
        exported.captioner.caption(pictures[0], prompt="cats " * 30)


def test_what_is_saved_answers_the_same_in_transformers(exported: Exported, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(exported.directory), tmp_path, like=exported.directory)
    again = InstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    theirs = exported.model.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
    assert (tmp_path / "qformer_tokenizer" / "tokenizer.json").is_file()


def test_padded_instructions_are_as_alone(exported: Exported) -> None:
    ours = load_checkpoint(exported.directory)
    pixels = torch.randn(3, 3, SIZE, SIZE)
    tokens = [exported.processor.qformer_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    ids = torch.zeros(3, max(map(len, tokens)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, row_tokens in enumerate(tokens):
        ids[row, : len(row_tokens)] = torch.tensor(row_tokens)
        mask[row, : len(row_tokens)] = 1
    with torch.no_grad():
        together = ours.bridge(ours.vision(pixels), ids, mask)
        for row, row_tokens in enumerate(tokens):
            alone = exported.model.get_image_features(pixels[row : row + 1], torch.tensor([row_tokens]))
            torch.testing.assert_close(together[row], alone.pooler_output[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_half_precision_and_samples_pass_the_parity_check(tmp_path: Path) -> None:
    draw_instructblip(tmp_path / "checkpoint", 5, "llama")
    report = export_checkpoint(tmp_path / "checkpoint", tmp_path / "half", precision="fp16", verify="sample")
    manifest = json.loads((tmp_path / "half" / "bundle.json").read_text())
    inputs = {entry["name"]: entry["dtype"] for entry in manifest["graphs"]["bridge"]["inputs"]}
    assert inputs == {
        "image_embeds": "float16",
        "instruction_ids": "int64",
        "instruction_mask": "int64",
    }
    assert report.verify == "sample"
    assert (tmp_path / "half" / "qformer_tokenizer.json").is_file()
    result = Captioner.load(tmp_path / "half", threads=1).caption(
        np.zeros((20, 30, 3), np.uint8), prompt="what is it?", max_new_tokens=4
    )
    assert len(result.tokens) == 4


def test_a_missing_qformer_tokenizer_is_named(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.directory, tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "checkpoint" / "qformer_tokenizer")
    with pytest.raises(CheckpointError, match=r"qformer_tokenizer has no tokenizer\.json"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")


def test_a_qformer_tokenizer_with_too_many_tokens_is_named(exported: Exported, tmp_path: Path) -> None:
    shutil.copytree(exported.directory, tmp_path / "checkpoint")
    shutil.copy(
        exported.directory / "tokenizer.json",
        tmp_path / "checkpoint" / "qformer_tokenizer" / "tokenizer.json",
    )
    with pytest.raises(CheckpointError, match="the Q-Former has 60 tokens"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "bundle")
