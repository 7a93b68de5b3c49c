"""Reuses the visual tokens of live pictures that hardly change, so that only the text is generated again.

A frame is compared with the last encoded one, not with the last frame: slow changes add up until a frame is encoded
again.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class _Reference:
    """The last encoded row.

    Attributes:
        cells: The means of :func:`cells_of`.
        counts: Number of pictures of the row, in a list.
        vision: The vision encoder's outputs.
        bridge_inputs: The bridge's inputs besides ``image_embeds``.
        pictures: The language model's inputs.
    """

    cells: NDArray[np.float32]
    counts: list[int]
    vision: dict[str, Array]
    bridge_inputs: dict[str, Array]
    pictures: dict[str, Array]


class ReusingEncoder:
    """An encoder that skips a picture which hardly differs from the last encoded one.

    Such a picture gets the visual tokens and cross-attention keys of the last one. If only the instruction or the
    number of queries differs, the bridge runs again on the last ``image_embeds``. It encodes one row in each call, and
    is for a single thread.

    Args:
        encoder: Encodes the pictures that are not skipped.
        below: The mean absolute difference below which a picture is not encoded, as a share of the range of pixel
            values: 0 encodes every picture, 1 only the first. For several pictures of a row, the largest difference
            counts.
        context: The language model's prompt-independent tensors of the pictures (cross-attention keys), by name;
            computed with the bridge and reused as well.

    Attributes:
        reused: Whether the last call reused the visual tokens.
        difference: Difference of the last call's picture from the last encoded one; infinite if there was none.

    Raises:
        UsageError: ``below`` is not a number from 0 to 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        below: float,
        context: Callable[[Mapping[str, Array]], dict[str, Array]] = lambda pictures: {},
    ) -> None:
        if not 0 <= below <= 1:
            raise UsageError(f"expected {option('reuse_below')} to be a number from 0 to 1, got {below!r}")
        self._encoder, self._below, self._context = encoder, below, context
        self._spans = encoder.images.preprocessing.spans
        self._last: _Reference | None = None
        self.reused = False
        self.difference = math.inf

    def __call__(
        self,
        images: Sequence[ItemSource],
        texts: Sequence[PromptText | None],
        clock: StageClock,
        queries: int | None = None,
    ) -> EncodedBatch:
        """Encodes a row; arguments and errors as of :class:`Encoder`.

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
            if last is not None and last.counts == prepared.counts and last.cells.shape == cells.shape:
                by_picture = np.abs(cells - last.cells).mean(axis=(1, 2, 3))
                self.difference = float(by_picture.max(initial=0.0))
        self.reused = self.difference < self._below
        if last is None or not self.reused:
            last = self._encode(prepared, cells, self._encoder.run_vision(prepared.pixels, clock), clock)
        elif not _same(prepared.bridge_inputs, last.bridge_inputs):
            last = self._encode(prepared, last.cells, last.vision, clock)
        self._last = last
        return EncodedBatch(prepared.prompts, last.pictures, prepared.counts)

    def _encode(
        self, prepared: PreparedBatch, cells: NDArray[np.float32], vision: dict[str, Array], clock: StageClock
    ) -> _Reference:
        """Runs the bridge, and the prompt-independent part of the language model, on the vision encoder's outputs."""
        pictures = prepared.encoded(self._encoder.run_bridge(vision, prepared.bridge_inputs, clock)).pictures
        with clock("bridge"):
            context = self._context(pictures)
        return _Reference(cells, prepared.counts, vision, prepared.bridge_inputs, {**pictures, **context})


def cells_of(pixels: Array, spans: NDArray[np.float32]) -> NDArray[np.float32]:
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
    means: NDArray[np.float32] = sums / (area * spans[:, None, None])
    return means


def _same(one: Mapping[str, Array], other: Mapping[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
