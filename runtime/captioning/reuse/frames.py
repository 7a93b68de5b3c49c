"""Reuses the visual tokens of the last encoded frame if a live picture hardly changed; only the text is generated.

A frame is compared with the last encoded one, not with the last frame: slow changes add up until a frame is encoded
again.
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
from blip2edge.runtime.captioning.encoder import EncodedBatch, Encoder, PreparedBatch
from blip2edge.runtime.captioning.request import StageClock
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import PromptText

CELLS = 16
"""Cells per side. Pictures are compared by the mean of each cell, in which noise averages out and movement does not."""


ROWS, WIDTH = 32, 64
"""Largest number of rows of a frame's features, and of values in a row."""

Floats = NDArray[np.float32]
Context = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class EncodedFrame:
    """A row with the outputs of its graphs, which a later frame can reuse.

    Attributes:
        cells: The mean pixel values from :func:`cells_of`.
        counts: Number of pictures of the row, in a list.
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
        """Returns whether a row has the same number and size of pictures, so that they can be compared."""
        return self.counts == prepared.counts and self.cells.shape == cells.shape


class ReusingEncoder:
    """An encoder that skips a picture which hardly differs from the last encoded one.

    Such a picture gets the visual tokens and cross-attention keys of the last encoded picture. If only the instruction
    or the number of queries differs, the bridge runs again on the last ``image_embeds``. Each call encodes one row.
    Only one thread may use the object.

    Args:
        encoder: Encodes the pictures that are not skipped.
        below: The mean absolute difference below which a picture is not encoded, as a share of the range of pixel
            values: 0 encodes every picture, 1 only the first. For several pictures of a row, the largest difference
            counts.
        context: The language model's prompt-independent tensors of the pictures (cross-attention keys), by name;
            computed with the bridge and reused as well.

    Attributes:
        reused: Whether the last call reused visual tokens of an earlier picture.
        difference: Difference of the last call's picture from the last encoded one; infinite if there was none.

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
        """Encodes a row; arguments and errors as in :class:`Encoder`.

        Raises:
            ValueError: More or fewer than one row.
        """
        if len(images) != 1:
            raise ValueError(f"a reusing encoder takes one row a call, not {len(images)}")
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
    """Runs the vision encoder, the bridge, and the prompt-independent part of the language model on a row.

    Args:
        encoder: Encodes the pictures.
        context: As the argument of :class:`ReusingEncoder`.
        prepared: The preprocessed row.
        cells: The row's cells, from :func:`cells_of`.
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
    """Returns the row with the visual tokens of ``last``; the bridge runs again if its other inputs differ."""
    if _same(prepared.bridge_inputs, last.bridge_inputs):
        return last
    return encode_frame(encoder, context, prepared, last.cells, clock, last.vision)


def cells_of(pixels: Array, spans: Floats) -> Floats:
    """Divides pictures into a coarse grid; returns the mean pixel value of each cell as a share of the value range.

    Args:
        pixels: ``pixel_values [N, 3, H, W]``.
        spans: Value of white minus value of black in ``pixels``, for each channel, ``[3]``.

    Returns:
        float32 ``[N, 3, h, w]``, h and w at most :data:`CELLS`; white and black are 1 apart.
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
    """Returns the largest difference ``[...]`` of two pictures' cells ``[..., C]``; black to white is 1.

    The mean over the cells, which ``--reuse-below X`` uses, hides the movement of a small object.
    """
    found: Floats = np.abs(one - other).max(-1)
    return found


def feature_distance(one: Floats, other: Floats) -> Floats:
    """Returns the largest ``|a - b| / |a|`` over the rows a of ``one`` (the encoded frame) and b of ``other``."""
    norms = np.maximum(np.sqrt(np.square(one).sum(-1)), np.finfo(np.float32).tiny)
    found: Floats = (np.sqrt(np.square(one - other).sum(-1)) / norms).max(-1)
    return found


def features_of(tokens: Array) -> Floats:
    """Compresses visual tokens to small features, so that thousands of frames can be kept in memory.

    Neighbouring tokens are averaged to at most :data:`ROWS` rows. Each row is folded to :data:`WIDTH` numbers: number i
    is added to place i modulo the width, with a fixed sign (the count sketch of Charikar et al., ICALP 2002, whose
    distances are right on average).

    Args:
        tokens: ``[N, T, D]``.

    Returns:
        float32 ``[N * rows, width]``.
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
