"""Scores a captioner, given as a function, on the generated scenes. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from PIL import Image

from blip2edge.choices import Split
from blip2edge.errors import UsageError
from blip2edge.training.data.scenes import scenes
from blip2edge.training.metrics.exact import exact_match, shuffled_match

CaptionMany = Callable[[Sequence[Image.Image]], list[str]]

EVALUATION_SEED = 1000  # a series that neither training nor the examples use
PICTURES_AT_ONCE = 50  # pictures of one call of the captioner


class SceneScores(TypedDict):
    """The result of `evaluate_scenes`.

    Keys:
        exact_match: Share of captions that are exactly right.
        shuffled_match: Share of captions that equal the next picture's correct caption, as a control.
        n: Number of pictures.
        split: Which pairs of (colour, shape) the pictures showed: "train" or "heldout".
        seed: Seed of the series of scenes.
        wrong: The first mistakes, as (correct caption, generated caption).
    """

    exact_match: float
    shuffled_match: float
    n: int
    split: Split
    seed: int
    wrong: list[tuple[str, str]]


def evaluate_scenes(
    caption_many: CaptionMany,
    n: int = 1000,
    seed: int = EVALUATION_SEED,
    *,
    split: Split = "heldout",
    progress: Callable[[int, int], None] | None = None,
) -> SceneScores:
    """Captions generated scenes and compares the captions with the correct captions.

    Args:
        caption_many: Function that captions pictures, in order.
        n: Number of scenes, at least 2.
        seed: Seed of the series of scenes.
        split: "heldout" for pairs of objects that training never shows, "train" for the others.
        progress: Called with (pictures done, n).

    Returns:
        The scores.

    Raises:
        UsageError: `n` is less than 2.
    """
    if n < 2:
        raise UsageError(f"an evaluation needs at least 2 pictures, not {n}")
    predictions: list[str] = []
    references: list[str] = []
    for start in range(0, n, PICTURES_AT_ONCE):
        chunk = list(scenes(min(PICTURES_AT_ONCE, n - start), split=split, seed=seed, start=start))
        predictions += caption_many([scene.picture for scene in chunk])
        references += [scene.caption for scene in chunk]
        if progress is not None:
            progress(len(references), n)
    wrong = [(right, said) for right, said in zip(references, predictions, strict=False) if right != said.strip()]
    return {
        "exact_match": exact_match(predictions, references),
        "shuffled_match": shuffled_match(predictions, references),
        "n": n,
        "split": split,
        "seed": seed,
        "wrong": wrong[:5],
    }
