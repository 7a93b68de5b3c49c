"""Fits a confidence of a random tiny bundle; the half with the higher log-probability counts as right."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from blip2edge.calibration.confidence.pipeline import ConfidenceReport, copy_with_confidence
from blip2edge.calibration.confidence.references import References
from blip2edge.runtime.captioning.captioner import Captioner
from tests.drawing import draw_pictures

PICTURES, NEW = 32, 6


def pictures(count: int) -> list[Image.Image]:
    """Drawn pictures, each with a seed of its own."""
    return [draw_pictures(1, seed)[0] for seed in range(count)]


@dataclass(frozen=True)
class Drawn:
    """A reference whose right text is known."""

    name: str
    picture: Image.Image = field(repr=False)  # its repr has an address
    right: str
    question: str = ""

    @property
    def identity(self) -> str:
        return self.name

    def open(self) -> Image.Image:
        return self.picture

    def is_right(self, text: str) -> bool:
        return text == self.right


def drawn_references(bundle: Path, count: int = PICTURES, question: str = "", **options: Any) -> References:
    """Drawn pictures, of which those with the surer captions are right."""
    drawn, given = pictures(count), {"max_new_tokens": NEW, **options}
    with Captioner.load(bundle, backend="cpu", threads=1) as captioner:
        prompts = [captioner.prompts.question(question)] * count if question else None
        results = list(captioner.caption_many(drawn, prompts=prompts, batch_size=8, **given))
    limit = median(result.logprob for result in results)
    return References(
        [
            Drawn(f"{at}.png", picture, result.text if result.logprob > limit else "another", question)
            for at, (picture, result) in enumerate(zip(drawn, results, strict=True))
        ],
        "surer than half of all",
        options=given,
    )


def fit_on_drawings(bundle: Path, output: Path, **more: Any) -> ConfidenceReport:
    """Copies a bundle and fits its confidence on drawn pictures."""
    return copy_with_confidence(bundle, output, drawn_references(bundle, **more), threads=1)[0]


def written_references(folder: Path, bundle: Path, count: int = 24) -> Path:
    """Pictures with their own caption, or another, beside them."""
    folder.mkdir()
    with Captioner.load(bundle, backend="cpu", threads=1) as captioner:
        for at, picture in enumerate(pictures(count)):
            text = captioner.caption(picture, max_new_tokens=NEW).text
            picture.save(folder / f"{at:02d}.png")
            (folder / f"{at:02d}.txt").write_text(f"{text.upper()}.\n" if at % 3 else "something else\n")
    return folder
