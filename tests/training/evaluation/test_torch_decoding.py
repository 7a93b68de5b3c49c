"""Checkpoints in torch generate the ids of transformers, in ragged batches, and compute each position once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

import torch

from blip2edge.cli import main
from blip2edge.errors import UsageError
from blip2edge.training.evaluation.checkpoints import models as checkpoint_models
from blip2edge.training.evaluation.checkpoints.models import CheckpointCaptioner
from blip2edge.training.evaluation.models import ModelOptions
from blip2edge.training.evaluation.open_model import open_captioner, open_matcher
from tests.drawing import Variant, draw_pictures, draw_processor, save, with_ends
from tests.families import (
    drawing_blip,
    drawing_idefics,
    drawing_instruct,
    drawing_llama,
    test_blip,
    test_idefics,
    test_instructblipvideo,
    test_t5,
)

if TYPE_CHECKING:
    from tests.drawing import Drawn

NEW_TOKENS = 9
SEARCHES: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"num_beams": 3, "length_penalty": -1.0, "min_new_tokens": 4},
    {"repetition_penalty": 1.5, "min_new_tokens": 3},
)


class Asked(NamedTuple):
    """Items and prompts as the captioner takes them, and what transformers generates for row i."""

    items: list[Any]
    prompts: list[str | None]
    generate: Callable[..., list[int]]


def _text_of(model: Any, processor: Any, items: list[Any], prompts: list[str | None], texts: list[str]) -> Asked:
    """Rows that a processor takes as a picture and a text; the ids behind the prompt."""

    def generate(row: int, **search: Any) -> list[int]:
        inputs = processor(images=items[row], text=texts[row], return_tensors="pt")
        found: list[int] = model.generate(**inputs, **search)[0].tolist()
        return found if model.config.get_text_config().is_encoder_decoder else found[inputs["input_ids"].shape[1] :]

    return Asked(items, prompts, generate)


def _opt(path: Path) -> Asked:
    drawn = save(path)
    items, prompts = draw_pictures(3), [None, "a photo of", "two"]
    return Asked(items, prompts, lambda row, **search: list(drawn.generate(items[row], prompts[row], **search)))


def _t5(path: Path) -> Asked:
    model = test_t5.draw(0, path, **test_t5.KINDS[0])
    items, prompts = draw_pictures(3), test_t5.PROMPTS
    processor = draw_processor(Variant())

    def generate(row: int, **search: Any) -> list[int]:
        text = {} if prompts[row] is None else {"text": prompts[row]}
        found: list[int] = model.generate(**processor(images=items[row], return_tensors="pt", **text), **search)[
            0
        ].tolist()
        return found

    return Asked(items, prompts, generate)


def _llava(path: Path) -> Asked:
    model, processor = drawing_llama.draw_llava(path, 1)
    prompts: list[str | None] = ["what is it ?", "a dog", "a"]
    texts = [f"USER: <image>\n{prompt} ASSISTANT:" for prompt in prompts]
    return _text_of(model, processor, draw_pictures(3), prompts, texts)


def _instructblip(kind: str) -> Callable[[Path], Asked]:
    def draw(path: Path) -> Asked:
        model, processor = drawing_instruct.draw_instructblip(path, 0, kind)
        texts = ["a photo of", "what is it", "Question: what is it? Short answer:"]
        return _text_of(model, processor, draw_pictures(3), list(texts), texts)

    return draw


def _blip(kind: str) -> Callable[[Path], Asked]:
    def draw(path: Path) -> Asked:
        model, processor = drawing_blip.save_blip(path, kind, 0)
        items, prompts = draw_pictures(3), test_blip.PROMPTS[kind]

        def generate(row: int, *, max_new_tokens: int, **search: Any) -> list[int]:
            assert max_new_tokens == NEW_TOKENS
            return test_blip.expected(model, processor, kind, items[row], prompts[row], **search)

        return Asked(items, prompts, generate)

    return draw


def _idefics(path: Path) -> Asked:
    drawn: tuple[Any, Any] = drawing_idefics.draw_idefics(path, 0)
    model, processor = drawn
    asked = test_idefics.requests(*test_idefics.pictures(7, 3))

    def generate(row: int, **search: Any) -> list[int]:
        inputs = processor(text=[asked[row][2]], return_tensors="pt")
        found: list[int] = model.generate(**inputs, **search)[0, inputs["input_ids"].shape[1] :].tolist()
        return found

    return Asked([item for item, _, _ in asked], [prompt for _, prompt, _ in asked], generate)


def _video(path: Path) -> Asked:
    drawn: tuple[Any, Any] = drawing_instruct.draw_instructblipvideo(path, 11, "llama")
    model, oracle = drawn
    items, prompts = [test_instructblipvideo.draw_video(seed) for seed in range(3)], test_instructblipvideo.PROMPTS

    def generate(row: int, **search: Any) -> list[int]:
        inputs = oracle(items[row], prompts[row])
        found: list[int] = model.generate(**inputs, **search)[0, inputs["input_ids"].shape[1] :].tolist()
        return found

    return Asked(list(items), list(prompts), generate)


FAMILIES: dict[str, Callable[[Path], Asked]] = {
    "blip-2-opt": _opt,
    "blip-2-t5": _t5,
    "llava": _llava,
    "instructblip-t5": _instructblip("t5"),
    "instructblip-opt": _instructblip("opt"),
    "blip-caption": _blip("caption"),
    "blip-vqa": _blip("vqa"),
    "idefics": _idefics,
    "instructblipvideo": _video,
}


def opened(path: Path, batch_size: int, **generation: Any) -> CheckpointCaptioner:
    options = ModelOptions("cpu", 1, batch_size, {"max_new_tokens": NEW_TOKENS, **generation})
    captioner = open_captioner(path, options)
    assert isinstance(captioner, CheckpointCaptioner)
    return captioner


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_ids_of_transformers_greedily_and_with_beams(family: str, tmp_path: Path) -> None:
    asked = FAMILIES[family](tmp_path)
    seen = set()
    for search in SEARCHES:
        rows = range(len(asked.items))
        wanted = [asked.generate(row, max_new_tokens=NEW_TOKENS, **search) for row in rows]
        for batch_size in (len(rows), 2):
            found = opened(tmp_path, batch_size, **search).generate(asked.items, asked.prompts)
            for text, theirs in zip(found, wanted, strict=True):
                ids = list(text.tokens)
                assert ids == theirs[: len(ids)], search
                assert set(theirs[len(ids) :]) <= {0, 1, 3}, "only padding is behind a text"
                assert text.finish_reason == "eos" or len(ids) >= NEW_TOKENS
                seen.add(tuple(ids))
    assert len(seen) > 3


class Counted(NamedTuple):
    """Positions that the language model computed, pass after pass."""

    passes: list[tuple[int, int]]

    @property
    def positions(self) -> int:
        return sum(rows * length for rows, length in self.passes)


def counted(captioner: CheckpointCaptioner, monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts from now on."""
    language, found = captioner._generator.language.decoder.language, Counted([])  # type: ignore[attr-defined]
    forward = language.forward

    def counting(inputs_embeds: Any, *args: Any, **kwargs: Any) -> Any:
        found.passes.append(tuple(inputs_embeds.shape[:2]))
        return forward(inputs_embeds, *args, **kwargs)

    monkeypatch.setattr(language, "forward", counting)
    return found


@pytest.mark.parametrize("beams", [1, 3])
def test_each_position_is_computed_once(beams: int, tiny_checkpoint: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    captioner = opened(tiny_checkpoint.directory, 4, num_beams=beams, min_new_tokens=NEW_TOKENS)
    work = counted(captioner, monkeypatch)
    texts = captioner.generate(draw_pictures(4), ["a photo of"] * 4)
    (rows, prompt), *steps = work.passes
    assert rows == 4
    assert steps == [(4 * beams, 1)] * (NEW_TOKENS - 1)
    assert {len(text.tokens) for text in texts} == {NEW_TOKENS}
    whole = sum(4 * (beams if done else 1) * (prompt + done) for done in range(NEW_TOKENS))
    assert whole > 4 * work.positions, "without a cache, every step computes the whole prefix"


def test_finished_rows_leave_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = save(tmp_path, with_ends(Variant()))
    captioner = opened(tmp_path, 6)
    work = counted(captioner, monkeypatch)
    pictures = draw_pictures(6)
    texts = captioner.generate(pictures)
    assert [text.tokens for text in texts] == [
        drawn.generate(picture, None, max_new_tokens=NEW_TOKENS) for picture in pictures
    ]
    lengths = [len(text.tokens) for text in texts]
    assert len(set(lengths)) > 1
    assert [rows for rows, _ in work.passes] == [
        sum(length > done for length in lengths) for done in range(max(lengths))
    ]


def test_sampling_does_not_depend_on_the_batch(tiny_checkpoint: Drawn) -> None:
    def drawn(batch_size: int, seed: int) -> list[str]:
        captioner = opened(tiny_checkpoint.directory, batch_size, temperature=1.0, seed=seed)
        return captioner(draw_pictures(4))

    assert drawn(4, 1) == drawn(3, 1)
    assert drawn(4, 1) != drawn(4, 2)


def test_the_options_of_eval_are_honoured(
    tiny_checkpoint: Drawn, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command on checkpoint and bundle prints the same scores."""
    flags = ["--data", "scenes", "--count", "4", "--num-beams", "3", "--length-penalty", "-1", "--min-new-tokens", "4"]
    printed = []
    for model in (tiny_checkpoint.directory, tiny_bundle):
        assert main(["eval", str(model), *flags, "--max-new-tokens", "9", "--backend", "cpu", "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    wrong = json.loads(printed[0])["wrong"]
    assert len({said for _, said in wrong}) > 1


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"draft": "lookup"}, "decoded without a draft model"),
        ({"abstain_below": 0.5}, "needs a confidence"),
        ({"queries": 3}, "does not take queries"),
        ({"num_beams": 0}, "num_beams"),
        ({"forced_bos_token_id": 10**6}, "forced_bos_token_id"),
    ],
)
def test_what_needs_a_bundle_is_refused_by_name(
    generation: dict[str, Any], message: str, tiny_checkpoint: Drawn
) -> None:
    with pytest.raises(UsageError, match=message):
        open_captioner(tiny_checkpoint.directory, ModelOptions("cpu", generation=generation))


def test_the_device_is_chosen_by_the_backend(tiny_checkpoint: Drawn, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"auto, cpu or cuda for a checkpoint, .* got openvino"):
        open_captioner(tiny_checkpoint.directory, ModelOptions("openvino"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="finds no GPU"):
        open_captioner(tiny_checkpoint.directory, ModelOptions("cuda"))
    assert checkpoint_models.device_for("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [checkpoint_models.device_for(name) for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.gpu
def test_the_same_ids_on_a_gpu(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    drawing_blip.save_blip2(tmp_path, 0)
    pictures, prompts = draw_pictures(3), [None, "a photo of", "two"]
    for beams in (1, 3):
        found = []
        for backend in ("cpu", "cuda"):
            generation = {"max_new_tokens": NEW_TOKENS, "num_beams": beams}
            captioner = open_captioner(tiny_checkpoint.directory, ModelOptions(backend, generation=generation))
            found.append(captioner(pictures, prompts))
        assert found[0] == found[1]
    cpu, cuda = (open_matcher(tmp_path, ModelOptions(backend)).image_vectors(pictures) for backend in ("cpu", "cuda"))
    assert abs(cpu - cuda).max() < 1e-4
