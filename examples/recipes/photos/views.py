"""Puts cut-outs on backgrounds: each view has its own size, place, rotation, colours and background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageEnhance

SIZE = 224  # pixels
SCALE = (0.55, 1.35)  # longer side of the cut-out, in sides of the picture: above 1 it is cropped
SHIFT = 0.12  # of the picture's side, in any direction
TURN = 12.0  # degrees, to either side
LIGHT = (0.75, 1.25)  # brightness, contrast and saturation
PHOTO_SHARE, WHITE_SHARE = 0.5, 0.15  # of the backgrounds; the others are smooth colours
BICUBIC, FLIP = Image.Resampling.BICUBIC, Image.Transpose.FLIP_LEFT_RIGHT


def opened(picture: Image.Image) -> Image.Image:
    """Returns the picture as RGBA, cropped to its visible part, with sides of at most two view sizes."""
    picture = picture.convert("RGBA")
    box = picture.getchannel("A").getbbox()
    picture = picture.crop(box) if box else picture
    picture.thumbnail((2 * SIZE, 2 * SIZE))
    return picture


def _smooth(draw: np.random.Generator) -> Image.Image:
    cells = int(draw.integers(2, 8))
    first, second = draw.integers(0, 256, (2, 3))
    blend = draw.random((cells, cells, 1))
    colours = first * blend + second * (1 - blend) + draw.normal(0, 12, (cells, cells, 3))
    return Image.fromarray(colours.clip(0, 255).astype(np.uint8)).resize((SIZE, SIZE), BICUBIC)


def _part(photo: Image.Image, draw: np.random.Generator) -> Image.Image:
    side = int(min(photo.size) * draw.uniform(0.3, 1))
    left, top = (int(draw.integers(0, edge - side + 1)) for edge in photo.size)
    return photo.resize((SIZE, SIZE), BICUBIC, (left, top, left + side, top + side))


def background(photos: Sequence[Image.Image], draw: np.random.Generator) -> Image.Image:
    """Draws a background, RGB, 224 x 224: a part of a photograph without animals, a smooth colour, or white."""
    chance = draw.random()
    if chance < PHOTO_SHARE and photos:
        return _part(photos[int(draw.integers(len(photos)))], draw)
    return _smooth(draw) if chance < 1 - WHITE_SHARE else Image.new("RGB", (SIZE, SIZE), (255, 255, 255))


def view(cut_out: Image.Image, photos: Sequence[Image.Image], draw: np.random.Generator) -> Image.Image:
    """Draws a random view of a cut-out: the cut-out on a background.

    Args:
        cut_out: RGBA, from :func:`opened`.
        photos: Photographs for backgrounds, RGB.
        draw: Random generator.

    Returns:
        RGB, 224 x 224.
    """
    factor = draw.uniform(*SCALE) * SIZE / max(cut_out.size)
    width, height = (max(1, round(edge * factor)) for edge in cut_out.size)
    moved = cut_out.resize((width, height), BICUBIC)
    if draw.random() < 0.5:
        moved = moved.transpose(FLIP)
    moved = moved.rotate(draw.uniform(-TURN, TURN), BICUBIC, expand=True)
    whole = background(photos, draw)
    left, top = (round((SIZE - edge) / 2 + draw.uniform(-SHIFT, SHIFT) * SIZE) for edge in moved.size)
    whole.paste(moved, (left, top), moved)
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        whole = enhance(whole).enhance(draw.uniform(*LIGHT))
    return whole
