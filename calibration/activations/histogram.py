"""A streaming histogram of a tensor, and the methods that choose a threshold from the histogram.

Ranges are symmetric, because TensorRT takes no zero point: values beyond ±threshold saturate, and the scale is
threshold / 127.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

BINS = 2048
"""Number of bins of |x|, as in TensorRT's entropy calibrator (Migacz, "8-bit Inference with TensorRT", GTC 2017)."""

LEVELS = 127  # positive int8 values
PERCENTILE = 99.99
"""Share of values within the range, in percent (Wu et al., arXiv 2004.09602, table 5)."""


class Histogram:
    """Counts of |x| in :data:`BINS` equal bins from 0; the range doubles when a value is larger than the last bin.

    Memory does not grow with the number of values.

    Attributes:
        counts: Number of values in each bin, int64 ``[BINS]``.
        width: Width of a bin; 0 as long as all values are zero.
        maximum: Largest |x|.
    """

    def __init__(self) -> None:
        self.counts: NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.width = 0.0
        self.maximum = 0.0

    def add(self, values: NDArray[np.floating]) -> None:
        """Adds the absolute values of an array of any shape to the counts.

        Raises:
            ValueError: A value is not finite.
        """
        sizes = np.abs(values, dtype=np.float32).ravel()
        if not sizes.size:
            return
        largest = float(sizes.max())
        if not np.isfinite(largest):
            raise ValueError("a tensor holds values that are not finite")
        self.maximum = max(self.maximum, largest)
        if self.width == 0.0:
            if largest == 0.0:
                self.counts[0] += sizes.size
                return
            self.width = largest / BINS
        while largest > self.width * BINS:
            self.counts[: BINS // 2] = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts[BINS // 2 :] = 0
            self.width *= 2
        index = np.minimum((sizes / self.width).astype(np.int32), BINS - 1)
        self.counts += np.bincount(index, minlength=BINS)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Values of |x| in the middle of each bin, float64 ``[BINS]``."""
        middles: NDArray[np.float64] = (np.arange(BINS, dtype=np.float64) + 0.5) * self.width
        return middles


def minmax(histogram: Histogram) -> float:
    """Returns the largest value as the threshold, so that nothing saturates."""
    return histogram.maximum


def percentile(histogram: Histogram, share: float = PERCENTILE) -> float:
    """Returns the upper end of the bin below which ``share`` percent of the values are, as the threshold."""
    total = histogram.counts.sum()
    if histogram.width == 0.0 or not total:
        return histogram.maximum
    at = int(np.searchsorted(histogram.counts.cumsum(), total * share / 100.0))
    return min(histogram.maximum, (at + 1) * histogram.width)


def mse(histogram: Histogram, candidates: int = 64) -> float:
    """Returns the threshold with the least mean squared error of rounding and saturation.

    Args:
        histogram: The histogram of the tensor.
        candidates: Number of thresholds that are compared.
    """
    if histogram.width == 0.0:
        return histogram.maximum
    centres, counts = histogram.centres, histogram.counts.astype(np.float64)
    thresholds = histogram.maximum * np.geomspace(1.0, 1.0 / 256, candidates)

    def error(threshold: float) -> float:
        step = threshold / LEVELS
        rounded = np.minimum(np.rint(centres / step), LEVELS) * step
        # if a bin is too coarse to show the rounding, its expected error step² / 12 is used
        exact = (4 * histogram.width < step) | (centres > threshold)
        return float((counts * np.where(exact, (centres - rounded) ** 2, step * step / 12)).sum())

    return float(min(thresholds, key=error))


def entropy(histogram: Histogram) -> float:
    """Returns the threshold whose 128 levels lose the least information (KL divergence; Migacz, GTC 2017).

    For each threshold, two histograms are compared: the histogram that saturates at this threshold, and the same
    histogram merged into 128 levels and spread again over the bins that are not empty.
    """
    if histogram.width == 0.0:
        return histogram.maximum
    levels = LEVELS + 1
    counts = histogram.counts.astype(np.float64)
    filled = int(np.flatnonzero(counts)[-1]) + 1
    best, best_bins = np.inf, filled
    for bins in range(levels, filled + 1, max(1, filled // 256)):
        divergence = _divergence(counts, bins, levels)
        if divergence < best:
            best, best_bins = divergence, bins
    if filled < levels:
        return histogram.maximum
    return min(histogram.maximum, best_bins * histogram.width)


def _divergence(counts: NDArray[np.float64], bins: int, levels: int) -> float:
    """Computes the KL divergence between a histogram with ``bins`` bins and the same histogram in ``levels`` levels.

    Values beyond the last bin are counted in it (saturation).
    """
    inside = counts[:bins]
    reference = inside.copy()
    reference[-1] += counts[bins:].sum()
    level = np.arange(bins) * levels // bins
    sums = np.bincount(level, weights=inside, minlength=levels)
    occupied = inside > 0
    members = np.bincount(level, weights=occupied, minlength=levels)
    spread = np.where(occupied, (sums / np.maximum(members, 1))[level], 0.0)
    total, spread_total = reference.sum(), spread.sum()
    if not spread_total:  # no value is inside
        return np.inf
    p, q = reference / total, spread / spread_total
    both = (p > 0) & (q > 0)
    missing = p[(p > 0) & (q == 0)].sum()  # mass that no level represents
    return float((p[both] * np.log(p[both] / q[both])).sum() + missing * np.log(1.0 / 1e-12))


THRESHOLDS: dict[str, Callable[[Histogram], float]] = {
    "entropy": entropy,
    "minmax": minmax,
    "percentile": percentile,
    "mse": mse,
}
"""The methods that choose a threshold by the histogram; ``smooth`` (``choose_ranges.py``) uses the layer's output."""
