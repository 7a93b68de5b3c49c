"""Draws heat maps over a picture, sheets of heat maps, the cosines of the queries, and the gates, with Pillow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from blip2edge.explanation.attention import LayerWeights
from blip2edge.explanation.gates import Gate
from blip2edge.explanation.grid import View

HEAT = ("000004", "1b0c41", "4a0c6b", "781c6d", "a52c60", "cf4446", "ed6925", "fb9b06", "f7d13d", "fcffa4")
"""Colours from weight 0 to the largest weight: every 28th of matplotlib's map "inferno" (public domain, CC0)."""

COSINES = ("2166ac", "67a9cf", "d1e5f0", "f7f7f7", "fddbc7", "ef8a62", "b2182b")
"""Colours from cosine -1 over 0 to 1 (ColorBrewer's "RdBu", Apache-2.0)."""

SIDE = 144  # px of the longer side of a picture on a sheet
COLUMNS = 8  # pictures in a row of a sheet
TEXT = 11  # px, height of the letters
LINE = 16  # px, height of a line of text
GAP = 6  # px between pictures
UNSEEN = 0.35  # brightness of the part of a picture that is not in the model's input
INK, PAPER, BAR = (29, 36, 51), (255, 255, 255), (59, 91, 219)

Colours = NDArray[np.uint8]


def colours(values: NDArray[np.float64], scale: Sequence[str]) -> Colours:
    """Converts values from 0 to 1 to the colours of a scale; returns uint8 ``[..., 3]``."""
    points = np.array([[int(code[at : at + 2], 16) for at in (0, 2, 4)] for code in scale], np.float64)
    places = np.clip(values, 0.0, 1.0) * (len(points) - 1)
    below = np.minimum(places.astype(np.int64), len(points) - 2)
    share = (places - below)[..., None]
    mixed: Colours = np.rint(points[below] * (1 - share) + points[below + 1] * share).astype(np.uint8)
    return mixed


def heat_map(picture: Image.Image, view: View, weights: NDArray[np.float64], most: float | None = None) -> Image.Image:
    """Draws the weights of the patches over a picture; each square is one patch.

    The picture is drawn in grey, under the colours of the weights: a larger weight hides more of the picture. Regions
    that are not in the model's input, such as the sides that a crop cuts off, are dark and have no colour.

    Args:
        picture: The upright picture, or a smaller copy of it with the same proportions.
        view: The part of the original picture that is the model's input.
        weights: Weights of the patches, ``[rows, columns]``, at least 0.
        most: The weight that gets the last colour of the scale; None for the largest weight.

    Returns:
        An RGB picture of the size of ``picture``.
    """
    width, height = picture.size
    across = view.patch_of((np.arange(width) + 0.5) * view.picture[0] / width, 0)
    down = view.patch_of((np.arange(height) + 0.5) * view.picture[1] / height, 1)
    top = most if most is not None else float(weights.max())
    values = weights[np.maximum(down, 0)][:, np.maximum(across, 0)] / (top or 1.0)  # [height, width]
    seen = (down >= 0)[:, None] & (across >= 0)[None, :]
    grey = np.asarray(picture.convert("L"), np.float64)[..., None]
    cover = (0.35 + 0.5 * np.clip(values, 0.0, 1.0))[..., None]
    covered = grey * (1 - cover) + colours(values, HEAT) * cover
    drawn = np.where(seen[..., None], covered, grey * UNSEEN)
    return Image.fromarray(np.rint(drawn).astype(np.uint8), "RGB")


def layer_sheet(picture: Image.Image, view: View, layer: LayerWeights) -> Image.Image:
    """Draws one layer: the picture, the mean over the queries, then the heat map of each query with its largest weight.

    Each heat map has its own colour scale, up to its largest weight.

    Args:
        picture: The upright picture.
        view: The part of the picture that is the model's input.
        layer: The attention weights of the layer.
    """
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    if max(small.size) < SIDE:
        share = SIDE / max(small.size)
        small = picture.resize((max(1, round(picture.width * share)), max(1, round(picture.height * share))))
    mean = layer.patches.mean(axis=0)
    cells = [("picture", small), (f"mean {mean.max():.0%}", heat_map(small, view, mean))]
    for number, weights in enumerate(layer.patches):
        cells.append((f"{number}: {weights.max():.0%}", heat_map(small, view, weights)))
    return sheet(cells)


def sheet(cells: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Puts pictures of one size into rows, each with a line of text below it."""
    width, height = cells[0][1].size
    width = max(width, 8 * TEXT)
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * (width + GAP) + GAP, rows * (height + LINE + GAP) + GAP), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for at, (text, cell) in enumerate(cells):
        left, top = GAP + at % columns * (width + GAP), GAP + at // columns * (height + LINE + GAP)
        page.paste(cell, (left, top))
        draw.text((left, top + height + 1), text, INK, font)
    return page


def matrix_picture(matrix: NDArray[np.float64]) -> Image.Image:
    """Draws the cosines of the queries, ``[Q, Q]``: blue for -1, white for 0, red for 1."""
    count = len(matrix)
    cell = max(6, min(40, 448 // count))
    edge, key = 3 * TEXT, 2 * LINE + GAP
    page = Image.new("RGB", (edge + count * cell + GAP, edge + count * cell + key), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    pixels = colours((matrix + 1) / 2, COSINES).repeat(cell, axis=0).repeat(cell, axis=1)
    page.paste(Image.fromarray(pixels, "RGB"), (edge, edge))
    step = -(-2 * TEXT // cell)
    for number in range(0, count, step):
        middle = edge + (number + 0.5) * cell
        draw.text((edge - 4, middle), str(number), INK, font, anchor="rm")
        draw.text((middle, edge - 4), str(number), INK, font, anchor="mb")
    length, top = count * cell, edge + count * cell + GAP
    scale = colours(np.tile(np.linspace(0.0, 1.0, length), (TEXT, 1)), COSINES)
    page.paste(Image.fromarray(scale, "RGB"), (edge, top))
    for share, text, anchor in ((0.0, "-1", "la"), (0.5, "0", "ma"), (1.0, "1", "ra")):
        draw.text((edge + share * length, top + TEXT + 1), text, INK, font, anchor=anchor)
    return page


def gates_picture(gates: Sequence[Gate]) -> Image.Image:
    """Draws two bars for each gated layer: the absolute values of its gates, 0 to 1. The numbers beside have signs."""
    name, length, figure = 22 * TEXT, 320, 5 * TEXT
    page = Image.new("RGB", (name + length + figure, GAP + (2 * LINE + GAP) * len(gates)), PAPER)
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(TEXT)
    for at, gate in enumerate(gates):
        for part, (text, value) in enumerate((("attention", gate.attention), ("feed-forward", gate.feed_forward))):
            top = GAP + at * (2 * LINE + GAP) + part * LINE
            draw.text((name - GAP, top), f"before layer {gate.before}: {text}", INK, font, anchor="ra")
            draw.rectangle((name, top + 2, name + max(1, round(abs(value) * length)), top + LINE - 4), BAR)
            draw.text((name + abs(value) * length + GAP, top), f"{value:.3f}", INK, font)
    return page
