"""Observes an activation over all runs: its histogram, the largest value of each channel, and some of its tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.calibration.activations.histogram import Histogram

SAMPLED_TOKENS = 128
"""Number of tokens that are drawn at random over all pictures, with a fixed seed."""

LARGEST_TOKENS = 16
"""Number of tokens with the largest values, which are stored in addition. A few tokens of a ViT have values a hundred
times larger than the others (Sun et al., arXiv 2402.17762; Darcet et al., arXiv 2309.16588), and a random sample misses
them."""


@dataclass
class Observation:
    """The observed values of an activation ``[..., K]`` over all runs.

    Attributes:
        histogram: Histogram of all values.
        channel_max: float32 ``[K]``, the largest |x| of each channel.
        rows: float16 ``[R, K]``, randomly drawn tokens divided by ``channel_max``, so that values are within ±1.
        largest: float16 ``[L, K]``, the tokens with the largest values, divided in the same way.
    """

    histogram: Histogram = field(default_factory=Histogram)
    channel_max: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    rows: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    largest: NDArray[np.float16] = field(default_factory=lambda: np.zeros((0, 0), np.float16))

    def sample(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Multiplies ``rows`` and ``largest`` by ``channel_max``, which gives the original values, in float32."""
        return self.rows * self.channel_max, self.largest * self.channel_max


class Observer:
    """Observes an activation run by run; memory does not grow with the number of runs.

    Args:
        runs: Number of runs.
        seed: Seed of the random sample of tokens.
    """

    def __init__(self, runs: int, seed: int) -> None:
        self._random = np.random.default_rng([20, seed])
        self._histogram = Histogram()
        self._channel_max: NDArray[np.float32] | None = None
        self._drawn: list[NDArray[np.float32]] = []
        self._largest: list[tuple[float, NDArray[np.float32]]] = []
        self._a_run, self._stride = max(1, SAMPLED_TOKENS // max(runs, 1)), max(1, runs // SAMPLED_TOKENS)
        self._run = 0

    def update(self, values: Array) -> None:
        """Adds the values ``[..., K]`` of one run."""
        rows = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
        self._histogram.add(rows)
        if not len(rows):
            return
        sizes = np.abs(rows)
        channel_max: NDArray[np.float32] = sizes.max(axis=0)
        self._channel_max = channel_max if self._channel_max is None else np.maximum(self._channel_max, channel_max)
        if self._run % self._stride == 0 and len(self._drawn) < SAMPLED_TOKENS:
            chosen = self._random.choice(len(rows), min(self._a_run, len(rows)), replace=False)
            self._drawn += [rows[at].copy() for at in chosen]
        peaks = sizes.max(axis=1)
        at = int(peaks.argmax())
        if len(self._largest) < LARGEST_TOKENS or peaks[at] > self._largest[-1][0]:
            self._largest.append((float(peaks[at]), rows[at].copy()))
            self._largest = sorted(self._largest, key=lambda entry: -entry[0])[:LARGEST_TOKENS]
        self._run += 1

    def result(self) -> Observation:
        """Returns the observation of all runs so far."""
        if self._channel_max is None:
            return Observation()
        divisor = np.where(self._channel_max > 0, self._channel_max, 1.0)
        return Observation(
            self._histogram,
            self._channel_max,
            (np.stack(self._drawn) / divisor).astype(np.float16),
            (np.stack([row for _, row in self._largest]) / divisor).astype(np.float16),
        )


Observations = Mapping[str, Observation]
"""Observations by the activation's name."""
