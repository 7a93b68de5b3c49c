"""Live pictures that hardly change: what was seen of the last one is used again, and only the words are new.

A frame is compared with the one that was last encoded, not with the last that came: a picture that drifts adds up, and
is encoded as soon as the sum counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import UsageError, option
from blip2edge.runtime.captioning.encode import Clock, Encoded, PictureEncoder, Prepared
from blip2edge.runtime.images.video import ItemSource

CELLS = 16
"""Pictures are compared by the means of so many cells a side: noise cancels in them, and what moves stays."""


@dataclass(frozen=True)
class _Seen:
    """What was last encoded.

    Attributes:
        cells: Of :func:`cells_of`.
        counts: Pictures of the row.
        looked: The vision encoder's outputs.
        instruction: What the bridge was told beside them.
        pictures: What the language model gets of them.
    """

    cells: NDArray[np.float32]
    counts: list[int]
    looked: dict[str, Array]
    instruction: dict[str, Array]
    pictures: dict[str, Array]


class ReusingEncoder:
    """Encodes pictures one after the other, a row a call; one that hardly differs from the last encoded one not at all.

    Of such a picture vision encoder, bridge and cross keys are those of the last; where the bridge reads another
    instruction than then, it reads it with the last picture's ``image_embeds``. For one thread.

    Args:
        encoder: Encodes.
        below: The mean absolute difference below which a picture is not encoded, as a share of the range of pixel
            values: 0 encodes every one, and 1 none but the first. Of several pictures in a row the one that changed
            most counts.
        context: What the language model computes of pictures whatever the prompt is, by names of their own; it is
            computed with the bridge and used again as well.

    Attributes:
        reused: Whether the last call encoded nothing.
        difference: Of the last call's picture to the last encoded one; infinite where there was none to compare with.

    Raises:
        UsageError: ``below`` is no number from 0 to 1.
    """

    def __init__(
        self,
        encoder: PictureEncoder,
        below: float,
        context: Callable[[Mapping[str, Array]], dict[str, Array]] = lambda pictures: {},
    ) -> None:
        if not 0 <= below <= 1:
            raise UsageError(f"expected {option('reuse_below')} to be a number from 0 to 1, got {below!r}")
        self._encoder, self._below, self._context = encoder, below, context
        self._spans = encoder.preprocessing.spans
        self._last: _Seen | None = None
        self.reused = False
        self.difference = math.inf

    def __call__(self, images: Sequence[ItemSource], texts: Sequence[str | None], clock: Clock) -> Encoded:
        """Encodes a row; arguments and errors as of :class:`PictureEncoder`.

        Raises:
            ValueError: It is not one row, so that there is no last one to compare it with.
        """
        if len(images) != 1:
            raise ValueError(f"a reusing encoder takes one row a call, not {len(images)}")
        prepared = self._encoder.prepare(images, texts, clock)
        last = self._last
        with clock("preprocess"):
            cells = cells_of(prepared.pixels, self._spans)
            self.difference = math.inf
            if last is not None and last.counts == prepared.counts and last.cells.shape == cells.shape:
                by_picture = np.abs(cells - last.cells).mean(axis=(1, 2, 3))
                self.difference = float(by_picture.max(initial=0.0))
        self.reused = self.difference < self._below
        if last is None or not self.reused:
            last = self._seen(prepared, cells, self._encoder.look(prepared.pixels, clock), clock)
        elif not _same(prepared.instruction, last.instruction):
            last = self._seen(prepared, last.cells, last.looked, clock)
        self._last = last
        return Encoded(prepared.prompts, last.pictures, prepared.counts)

    def _seen(
        self, prepared: Prepared, cells: NDArray[np.float32], looked: dict[str, Array], clock: Clock
    ) -> _Seen:
        """What the bridge and the language model make of the vision encoder's outputs."""
        pictures = prepared.seen(self._encoder.bridged(looked, prepared.instruction, clock)).pictures
        with clock("bridge"):
            context = self._context(pictures)
        return _Seen(cells, prepared.counts, looked, prepared.instruction, {**pictures, **context})


def cells_of(pixels: Array, spans: NDArray[np.float32]) -> NDArray[np.float32]:
    """Means of the cells of pictures, as shares of the range of values.

    Args:
        pixels: ``pixel_values [N, 3, H, W]``.
        spans: What lies between the values of black and of white, by channel ``[3]``.

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
