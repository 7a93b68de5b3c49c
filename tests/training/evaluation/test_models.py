"""A checkpoint in torch gives the captions and scores of transformers and of its bundle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")

import torch

from blip2edge.errors import BundleError, CheckpointError, UsageError
from blip2edge.training.evaluation.models import MatchModel, ModelOptions
from blip2edge.training.evaluation.open_model import open_captioner, open_matcher, open_model
from tests.drawing import draw_pictures
from tests.families import drawing_blip, drawing_idefics, drawing_instruct, drawing_llama

if TYPE_CHECKING:
    from tests.drawing import Drawn

NEW_TOKENS = 8
OPTIONS = ModelOptions(batch_size=2, threads=1, generation={"max_new_tokens": NEW_TOKENS})
TEXTS = ["a photo of two cats", "Red dog", "what is the dog where it is"]

Draw = Callable[[Path], tuple[Any, Any]]
FAMILIES: dict[str, Draw] = {
    "llava": lambda path: drawing_llama.draw_llava(path, 1),
    "instructblip-t5": lambda path: drawing_instruct.draw_instructblip(path, 0, "t5"),
    "instructblip-opt": lambda path: drawing_instruct.draw_instructblip(path, 0, "opt"),
    "blip": lambda path: drawing_blip.save_blip(path, "caption", 1),
    "idefics": lambda path: drawing_idefics.draw_idefics(path, 0),
}
PROMPTS = {  # ours, and the text that the processor is given
    "llava": [
        ("what is it ?", "USER: <image>\nwhat is it ? ASSISTANT:"),
        ("a dog", "USER: <image>\na dog ASSISTANT:"),
    ],
    "blip": [("a photo of", "a photo of"), ("the", "the")],
}


def generated(family: str, model: Any, processor: Any, picture: Any, text: str) -> str:
    """What transformers says, greedily."""
    if family == "idefics":
        inputs = processor(text=[[picture, text]], return_tensors="pt")
    else:
        inputs = processor(images=picture, text=text, return_tensors="pt")
    with torch.no_grad():
        row = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0].tolist()
    if family != "instructblip-t5":
        # BLIP takes the [SEP] behind a prompt away before it goes on.
        row = row[inputs["input_ids"].shape[1] - (family == "blip") :]
    ends = model.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends
    ids = row[: next((at for at, token in enumerate(row) if token in ends and at), len(row))]
    said: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return said.strip()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_says_what_transformers_does(family: str, tmp_path: Path) -> None:
    model, processor = FAMILIES[family](tmp_path)
    captioner = open_captioner(tmp_path, OPTIONS)
    asked = PROMPTS.get(family, [("a photo of", "a photo of"), ("what is it", "what is it")])
    pictures = draw_pictures(2, 3)
    given = [(picture, ours, theirs) for picture in pictures for ours, theirs in asked]
    said = captioner([picture for picture, _, _ in given], [ours for _, ours, _ in given])
    assert said == [generated(family, model, processor, picture, theirs) for picture, _, theirs in given]
    assert len(set(said)) > 1


def test_a_checkpoint_says_what_its_bundle_does(tiny_checkpoint: Drawn, tiny_bundle: Path) -> None:
    pictures = draw_pictures(3)
    checkpoint, bundle = (open_captioner(path, OPTIONS) for path in (tiny_checkpoint.directory, tiny_bundle))
    for prompts in (None, ["a photo of", None, "two"], [checkpoint.question("what is two?")] * 3):
        assert checkpoint(pictures, prompts) == bundle(pictures, prompts)
    assert checkpoint(pictures) != checkpoint(pictures[::-1])
    assert bundle.question("how?") == checkpoint.question("how?")


def scored(kind: str, model: Any, processor: Any, picture: Any, text: str) -> tuple[float, float, float]:
    """Probability, cosine and the logit of "match" in transformers."""
    inputs = processor(images=picture, text=text, return_tensors="pt")
    flag = "use_itm_head" if kind == "blip-itm" else "use_image_text_matching_head"
    with torch.no_grad():
        match, cosine = (model(**inputs, **{flag: head}) for head in (True, False))
    name = "itm_score" if kind == "blip-itm" else "logits_per_image"
    logits = getattr(match, name)
    return float(logits.softmax(dim=1)[0, 1]), float(getattr(cosine, name)), float(logits[0, 1])


def check_scores(matcher: MatchModel, wanted: dict[tuple[int, int], tuple[float, float, float]]) -> None:
    pictures = draw_pictures(3, 1)
    vectors = matcher.image_vectors(pictures)
    vectors = vectors[:, None] if vectors.ndim == 2 else vectors
    cosines = (vectors @ matcher.text_vectors(TEXTS).T).max(axis=1)
    ragged = [TEXTS, [], TEXTS[1:]]
    probabilities = matcher.probabilities(pictures, ragged)
    logits = matcher.probabilities(pictures, ragged, logits=True)
    assert [len(row) for row in probabilities] == [3, 0, 2]
    for (row, column), (probability, cosine, logit) in wanted.items():
        assert cosines[row, column] == pytest.approx(cosine, abs=1e-4)
        if TEXTS[column] in ragged[row]:
            at = ragged[row].index(TEXTS[column])
            assert probabilities[row][at] == pytest.approx(probability, abs=1e-4)
            assert logits[row][at] == pytest.approx(logit, abs=1e-3)


@pytest.mark.parametrize("kind", ["blip-itm", "blip-2-itm"])
def test_a_checkpoint_scores_as_transformers_does(kind: str, tmp_path: Path) -> None:
    draw = (
        drawing_blip.save_blip2
        if kind == "blip-2-itm"
        else lambda path, seed: drawing_blip.save_blip(path, "retrieval", seed)
    )
    model, processor = draw(tmp_path / "checkpoint", 0)
    pictures = draw_pictures(3, 1)
    wanted = {
        (row, column): scored(kind, model, processor, picture, text)
        for row, picture in enumerate(pictures)
        for column, text in enumerate(TEXTS)
    }
    assert np.std([probability for probability, _, _ in wanted.values()]) > 0.01
    check_scores(open_matcher(tmp_path / "checkpoint", OPTIONS), wanted)


def test_a_model_is_asked_for_what_it_does(tiny_bundle: Path, tmp_path: Path) -> None:
    drawing_blip.save_blip2(tmp_path / "compares", 0)
    drawing_blip.save_clip(tmp_path / "clip", 0)
    with pytest.raises(UsageError, match="cannot caption them"):
        open_captioner(tmp_path / "compares", OPTIONS)
    with pytest.raises(UsageError, match="no matching head"):
        open_matcher(tmp_path / "clip", OPTIONS)
    with pytest.raises(UsageError, match="no matching head"):
        open_matcher(tiny_bundle, OPTIONS)
    with pytest.raises(BundleError, match="neither a bundle"):
        open_model(tmp_path, OPTIONS)


def test_a_checkpoint_needs_its_files(tmp_path: Path) -> None:
    drawing_blip.save_blip(tmp_path / "vqa", "vqa", 0)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "vqa" / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError):
        open_captioner(tmp_path / "vqa", ModelOptions())
