"""Reuses the visual tokens of the last encoded frame if a live picture hardly changed; only the text is generated.

A frame is compared with the last frame that was encoded, not with the frame before it. So slow changes add up until a
frame is encoded again.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import UsageError, option
from blip2edge.runtime.captioning.encoder import EncodedBatch, Encoder, PreparedBatch, StageClock
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import PromptText

CELLS = 16
"""Cells in a row and in a column of the grid. Pictures are compared by the means of the cells, which contain hardly any
noise, but show movement."""


ROWS, WIDTH = 32, 64
"""Largest size of a frame's features (compressed visual tokens): number of rows, and of values in a row."""

Floats = NDArray[np.float32]
Context = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class EncodedFrame:
    """The graph outputs for one frame, which a later frame can reuse.

    Attributes:
        cells: The mean pixel values from :func:`cells_of`.
        counts: A list with one number: how many pictures the frame has.
        vision: The vision encoder's outputs.
        bridge_inputs: The bridge's inputs besides ``image_embeds``.
        pictures: The language model's inputs.
    """

    cells: Floats
    counts: list[int]
    vision: dict[str, Array]
    bridge_inputs: dict[str, Array]
    pictures: dict[str, Array]

    def is_like(self, prepared: PreparedBatch, cells: Floats) -> bool:
        """Returns whether another frame has the same number of pictures, of the same size, and so can be compared."""
        return self.counts == prepared.counts and self.cells.shape == cells.shape


class ReusingEncoder:
    """An encoder that does not encode a picture again if it hardly differs from the last encoded picture.

    Such a picture gets the visual tokens and cross-attention keys of the last encoded picture. If the instruction or
    the number of queries differs, only the bridge runs again. Each call encodes one item (a picture, or the pictures of
    one prompt). Only one thread may use the object.

    Args:
        encoder: Encodes the pictures that are not skipped.
        below: A picture is encoded only if its mean absolute difference is at least this share of the range of pixel
            values: with 0 every picture is encoded, with 1 only the first. If an item has several pictures, the largest
            difference counts.
        context: Computes the language model's tensors that depend on the pictures only (cross-attention keys), by name.
            They are reused as well.

    Attributes:
        reused: Whether the last call reused visual tokens of an earlier picture.
        difference: Difference between the picture of the last call and the picture that was encoded before; infinite if
            there was none.

    Raises:
        UsageError: ``below`` is not a number from 0 to 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        below: float,
        context: Context = lambda pictures: {},
    ) -> None:
        if not 0 <= below <= 1:
            raise UsageError(f"expected {option('reuse_below')} to be a number from 0 to 1, got {below!r}")
        self._encoder, self._below, self._context = encoder, below, context
        self._spans = encoder.images.preprocessing.spans
        self._last: EncodedFrame | None = None
        self.reused = False
        self.difference = math.inf

    def __call__(
        self,
        images: Sequence[ItemSource],
        texts: Sequence[PromptText | None],
        clock: StageClock,
        queries: int | None = None,
    ) -> EncodedBatch:
        """Encodes one item, or reuses visual tokens of an earlier item; arguments and errors as in :class:`Encoder`.

        Raises:
            ValueError: ``images`` has more or fewer than one item.
        """
        if len(images) != 1:
            raise ValueError(f"expected one item in a call of a reusing encoder, got {len(images)}")
        prepared = self._encoder.prepare(images, texts, clock, queries)
        last = self._last
        with clock("preprocess"):
            cells = cells_of(prepared.pixels, self._spans)
            self.difference = math.inf
            if last is not None and last.is_like(prepared, cells):
                by_picture = np.abs(cells - last.cells).mean(axis=(1, 2, 3))
                self.difference = float(by_picture.max(initial=0.0))
        self.reused = self.difference < self._below
        if last is None or not self.reused:
            last = encode_frame(self._encoder, self._context, prepared, cells, clock)
        else:
            last = encode_again(self._encoder, self._context, prepared, last, clock)
        self._last = last
        return EncodedBatch(prepared.prompts, last.pictures, prepared.counts)


def encode_frame(
    encoder: Encoder,
    context: Context,
    prepared: PreparedBatch,
    cells: Floats,
    clock: StageClock,
    vision: dict[str, Array] | None = None,
) -> EncodedFrame:
    """Computes everything for a frame that later frames can reuse: runs vision encoder, bridge and ``context``.

    Args:
        encoder: Encodes the pictures.
        context: Computes the language model's tensors that depend on the pictures only, by name.
        prepared: The preprocessed frame, a batch of one row.
        cells: The frame's cells, from :func:`cells_of`.
        clock: Measures the stages.
        vision: The vision encoder's outputs, if they are already computed; None to compute them.
    """
    vision = encoder.run_vision(prepared.pixels, clock) if vision is None else vision
    pictures = prepared.encoded(encoder.run_bridge(vision, prepared.bridge_inputs, clock)).pictures
    with clock("bridge"):
        pictures = {**pictures, **context(pictures)}
    return EncodedFrame(cells, prepared.counts, vision, prepared.bridge_inputs, pictures)


def encode_again(
    encoder: Encoder, context: Context, prepared: PreparedBatch, last: EncodedFrame, clock: StageClock
) -> EncodedFrame:
    """Returns the frame ``last``, with new bridge outputs if the new frame has another instruction or other queries."""
    if _same(prepared.bridge_inputs, last.bridge_inputs):
        return last
    return encode_frame(encoder, context, prepared, last.cells, clock, last.vision)


def cells_of(pixels: Array, spans: Floats) -> Floats:
    """Divides pictures into a coarse grid; returns the mean of each cell, in units in which white minus black is 1.

    Args:
        pixels: ``pixel_values [N, 3, H, W]``.
        spans: Value of white minus value of black in ``pixels``, for each channel, ``[3]``.

    Returns:
        float32 ``[N, 3, h, w]``; h and w are at most :data:`CELLS`.
    """
    sums = pixels
    area = np.ones((1, 1), np.float32)
    for axis in (3, 2):
        length = pixels.shape[axis]
        edges = np.arange(min(CELLS, length)) * length // min(CELLS, length)
        sums = np.add.reduceat(sums, edges, axis=axis, dtype=np.float32)
        widths = np.diff(edges, append=length).astype(np.float32)
        area = area * (widths[None, :] if axis == 3 else widths[:, None])
    means: Floats = sums / (area * spans[:, None, None])
    return means


def picture_distance(one: Floats, other: Floats) -> Floats:
    """Returns the largest absolute difference between the cells of two pictures; from black to white it is 1.

    ``--reuse-below X`` compares by the mean over the cells; the movement of a small object hardly changes this mean.

    Args:
        one: Cells of one picture, float32 ``[..., C]``.
        other: Cells of the other picture, float32 ``[..., C]``.

    Returns:
        float32 ``[...]``.
    """
    found: Floats = np.abs(one - other).max(-1)
    return found


def feature_distance(one: Floats, other: Floats) -> Floats:
    """Returns the distance of two frames by their features: the largest ``|a - b| / |a|`` over their rows.

    a is a row of ``one``, the frame whose caption may be reused, and b the same row of ``other``.
    """
    norms = np.maximum(np.sqrt(np.square(one).sum(-1)), np.finfo(np.float32).tiny)
    found: Floats = (np.sqrt(np.square(one - other).sum(-1)) / norms).max(-1)
    return found


def features_of(tokens: Array) -> Floats:
    """Compresses visual tokens to small features, so that thousands of frames fit in memory.

    Means of neighbouring tokens give at most :data:`ROWS` rows. Each row is compressed to :data:`WIDTH` numbers: value
    i is added to number i modulo WIDTH, with a fixed sign (the count sketch of Charikar et al., ICALP 2002; it keeps
    squared distances on average).

    Args:
        tokens: Visual tokens ``[N, T, D]``: T tokens of D numbers for each of N pictures.

    Returns:
        float32 ``[N * min(T, ROWS), WIDTH]``.
    """
    count, length, width = tokens.shape
    rows = min(ROWS, length)
    edges = np.arange(rows) * length // rows
    sums = np.add.reduceat(tokens.astype(np.float32), edges, axis=1)
    means = sums / np.diff(edges, append=length).astype(np.float32)[:, None]
    folds = -(-width // WIDTH)
    bits = np.unpackbits(np.frombuffer(hashlib.shake_256(b"features").digest(-(-width // 8)), np.uint8))[:width]
    padded = np.zeros((count * rows, folds * WIDTH), np.float32)
    padded[:, :width] = means.reshape(count * rows, width) * (1 - 2 * bits.astype(np.float32))
    found: Floats = padded.reshape(count * rows, folds, WIDTH).sum(1)
    return found


def _same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
