"""What a calibration remembers of an activation: a histogram, each channel's reach, and some rows of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.calibration.activations.ranges import Histogram

DRAWN = 128
"""Rows (tokens) drawn over all pictures, at places that a seed fixes."""

LARGEST = 16
"""Rows kept beside them: those with the largest values. A ViT has a few tokens with values a hundred times those of
the others (Sun et al., arXiv 2402.17762; Darcet et al., arXiv 2309.16588), and a drawn sample misses them."""


@dataclass
class Observation:
    """An activation ``[..., K]`` over all runs.

    Attributes:
        histogram: Of all its values.
        reach: float32 ``[K]``, the largest |x| of each channel.
        rows: float16 ``[R, K]``, drawn tokens divided by ``reach``: within ±1, whatever the channel.
        largest: float16 ``[L, K]``, the tokens with the largest values, in the same way.
    """

    histogram: Histogram = field(default_factory=Histogram)
    reach: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    largest: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16))

    def sample(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Drawn and largest tokens as they were: float32 ``[R, K]`` and ``[L, K]``."""
        return self.rows * self.reach, self.largest * self.reach


class Observer:
    """Takes in an activation run by run; memory does not grow with the runs.

    Args:
        runs: How many are to come.
        seed: Of the places where rows are drawn.
    """

    def __init__(self, runs: int, seed: int) -> None:
        self._random = np.random.default_rng([20, seed])
        self._histogram = Histogram()
        self._reach: NDArray[np.float32] | None = None
        self._drawn: list[NDArray[np.float32]] = []
        self._largest: list[tuple[float, NDArray[np.float32]]] = []
        self._a_run, self._stride = max(1, DRAWN // max(runs, 1)), max(1, runs // DRAWN)
        self._run = 0

    def see(self, values: Array) -> None:
        """Adds the values ``[..., K]`` of one run."""
        rows = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
        self._histogram.add(rows)
        if not len(rows):
            return
        sizes = np.abs(rows)
        reach: NDArray[np.float32] = sizes.max(axis=0)
        self._reach = reach if self._reach is None else np.maximum(self._reach, reach)
        if self._run % self._stride == 0 and len(self._drawn) < DRAWN:
            chosen = self._random.choice(len(rows), min(self._a_run, len(rows)), replace=False)
            self._drawn += [rows[at].copy() for at in chosen]
        peaks = sizes.max(axis=1)
        at = int(peaks.argmax())
        if len(self._largest) < LARGEST or peaks[at] > self._largest[-1][0]:
            self._largest.append((float(peaks[at]), rows[at].copy()))
            self._largest = sorted(self._largest, key=lambda entry: -entry[0])[:LARGEST]
        self._run += 1

    def result(self) -> Observation:
        """What is remembered."""
        if self._reach is None:
            return Observation()
        divisor = np.where(self._reach > 0, self._reach, 1.0)
        return Observation(
            self._histogram,
            self._reach,
            (np.stack(self._drawn) / divisor).astype(np.float16),
            (np.stack([row for _, row in self._largest]) / divisor).astype(np.float16),
        )


Observations = Mapping[str, Observation]
"""By the activation's name."""
