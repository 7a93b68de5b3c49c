"""Random changes of training pictures: a crop that is resized by the preprocessing, and mirroring."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageOps

from blip2edge.training.data.config import DataConfig

ASPECTS = (3 / 4, 4 / 3)
"""Smallest and largest ratio of a crop's sides, as in torchvision's RandomResizedCrop."""
_ATTEMPTS = 10  # crops drawn before the whole picture is kept, as there


@dataclass(frozen=True)
class Change:
    """A random change of one picture; calling the object changes the picture.

    Attributes:
        seed: Seed of the crop.
        crop: Smallest share of the picture's area that the crop keeps; 1: no crop.
        mirrored: Whether the picture is mirrored (left and right exchanged).
    """

    seed: int
    crop: float
    mirrored: bool

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Returns the cropped and mirrored picture."""
        if self.crop < 1:
            box = crop_box(picture.width, picture.height, self.crop, np.random.default_rng(self.seed))
            picture = picture.crop(box)
        return ImageOps.mirror(picture) if self.mirrored else picture


def crop_box(width: int, height: int, smallest: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draws the crop of a picture: left, top, right, bottom in pixels.

    The share of the area is uniform between `smallest` and 1. The logarithm of the ratio width / height is uniform
    between the logarithms of the two :data:`ASPECTS` (Szegedy et al., arXiv 1409.4842; torchvision's
    RandomResizedCrop). If none of ten drawn crops fits into the picture, the whole picture is kept.
    """
    for _ in range(_ATTEMPTS):
        area = width * height * rng.uniform(smallest, 1)
        aspect = math.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1])))
        wide, high = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < high <= height:
            left, top = int(rng.integers(width - wide + 1)), int(rng.integers(height - high + 1))
            return left, top, left + wide, top + high
    return 0, 0, width, height


@cache
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", re.IGNORECASE)


def names_side(texts: Iterable[str], words: tuple[str, ...]) -> bool:
    """Returns whether a text contains one of the words as a whole word; upper and lower case count as equal."""
    return bool(words) and any(_pattern(words).search(text) for text in texts)


def draw_change(config: DataConfig, texts: Iterable[str], rng: np.random.Generator) -> Change | None:
    """Draws the change of a sample's picture; returns None if the picture is not changed.

    Args:
        config: The section `[data]` with `crop`, `flip` and `flip_except`.
        texts: All texts of the sample. If one names left or right, the picture is not mirrored.
        rng: Random generator. Nothing is drawn if the section changes no picture.
    """
    if not config.augments:
        return None
    seed, mirrored = int(rng.integers(2**32)), bool(rng.random() < config.flip)
    mirrored = mirrored and not names_side(texts, config.flip_except)
    return Change(seed, config.crop, mirrored) if mirrored or config.crop < 1 else None


def changed(open_picture: Callable[[], Image.Image], change: Change | None) -> Callable[[], Image.Image]:
    """Returns a function that opens the picture and applies the change; if `change` is None, `open_picture` itself."""
    return open_picture if change is None else lambda: change(open_picture())
