"""Streaming histograms, and the thresholds computed from them."""

from __future__ import annotations

import numpy as np
import pytest

from blip2edge.calibration.activations.histogram import (
    BINS,
    LEVELS,
    THRESHOLDS,
    Histogram,
    entropy,
    minmax,
    mse,
    percentile,
)


def filled(values: np.ndarray, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in np.array_split(values, parts):
        histogram.add(part)
    return histogram


def squared_error(values: np.ndarray, threshold: float) -> float:
    step = threshold / LEVELS
    return float(np.square(np.clip(np.rint(values / step), -LEVELS, LEVELS) * step - values).sum())


def test_every_value_is_counted_once_however_the_range_grows() -> None:
    values = np.concatenate([np.full(100, 1e-3), np.linspace(-1, 1, 5000), [300.0, -7e4]]).astype(np.float32)
    histogram = filled(values, 40)
    assert histogram.counts.sum() == values.size
    assert histogram.maximum == 7e4
    assert histogram.width * BINS >= 7e4
    assert histogram.counts.nbytes == BINS * 8


@pytest.mark.parametrize("parts", [1, 7, 100])
def test_a_bin_holds_what_lies_in_it(parts: int) -> None:
    values = np.random.default_rng(1).standard_t(3, 20000).astype(np.float32)
    histogram = filled(values, parts)
    index = np.minimum((np.abs(values) / histogram.width).astype(int), BINS - 1)
    wanted = np.bincount(index, minlength=BINS)
    moved = np.abs(wanted - histogram.counts).sum()
    assert moved <= 0.002 * values.size  # a value on the edge of a merged bin may round to its neighbour


def test_centres_are_in_the_middle_of_their_bins() -> None:
    histogram = filled(np.array([4.0], np.float32))
    assert histogram.centres[:2].tolist() == [histogram.width / 2, histogram.width * 1.5]
    assert len(histogram.centres) == BINS


def test_zeros_alone_have_no_range() -> None:
    histogram = filled(np.zeros(50, np.float32), 5)
    assert histogram.counts[0] == 50
    assert {name: method(histogram) for name, method in THRESHOLDS.items()} == dict.fromkeys(THRESHOLDS, 0.0)


def naive_entropy(histogram: Histogram) -> float:
    """The threshold of least KL divergence, by loops over the bins: P saturated, Q in 128 levels and spread."""
    counts = histogram.counts.astype(np.float64)
    filled_bins = int(np.flatnonzero(counts).max()) + 1
    levels, best = LEVELS + 1, (np.inf, filled_bins)
    for bins in range(levels, filled_bins + 1, max(1, filled_bins // 256)):
        p = counts[:bins].copy()
        p[-1] += counts[bins:].sum()
        q = np.zeros(bins)
        for level in range(levels):
            members = [at for at in range(bins) if at * levels // bins == level and counts[at] > 0]
            for at in members:
                q[at] = sum(counts[member] for member in members) / len(members)
        if not q.sum():
            continue
        p, q = p / p.sum(), q / q.sum()
        divergence = sum(a * np.log(a / (b or 1e-12 * a)) for a, b in zip(p, q, strict=True) if a)
        best = min(best, (divergence, bins), key=lambda pair: pair[0])
    return min(histogram.maximum, best[1] * histogram.width)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_entropy_is_the_threshold_of_least_divergence(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tail = np.concatenate([rng.standard_t(2 + seed, 3000), rng.normal(scale=20, size=5)]).astype(np.float32)
    histogram = filled(tail)
    assert entropy(histogram) == pytest.approx(naive_entropy(histogram), rel=1e-9)
    assert entropy(histogram) < histogram.maximum


def test_a_histogram_without_values() -> None:
    assert {name: method(Histogram()) for name, method in THRESHOLDS.items()} == dict.fromkeys(THRESHOLDS, 0.0)


def test_no_threshold_is_above_the_largest_value() -> None:
    histogram = filled(np.random.default_rng(0).uniform(0, 1, 2000).astype(np.float32))
    assert max(method(histogram) for method in THRESHOLDS.values()) <= histogram.maximum


def test_a_threshold_below_all_values_is_no_choice() -> None:
    """With empty bins from zero on, the smallest thresholds leave no value inside."""
    values = np.random.default_rng(3).uniform(0.9, 1.0, 5000).astype(np.float32)
    assert entropy(filled(values)) == pytest.approx(1.0, rel=1e-2)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(broken: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        Histogram().add(np.array([1.0, broken], np.float32))


def test_minmax_is_the_largest_value() -> None:
    assert minmax(filled(np.array([0.5, -3.25, 1.0], np.float32))) == 3.25


@pytest.mark.parametrize("share", [50.0, 99.0, 99.9])
def test_percentile_is_numpys_within_a_bin(share: float) -> None:
    values = np.random.default_rng(2).normal(size=50000).astype(np.float32)
    histogram = filled(values, 11)
    wanted = np.percentile(np.abs(values), share)
    assert wanted - histogram.width <= percentile(histogram, share) <= wanted + 2 * histogram.width


@pytest.mark.parametrize("degrees", [2, 5, 50])
def test_mse_is_as_good_as_the_best_threshold_on_the_values_themselves(degrees: int) -> None:
    values = np.random.default_rng(3).standard_t(degrees, 30000).astype(np.float32)
    chosen = squared_error(values, mse(filled(values, 9)))
    best = min(squared_error(values, t) for t in np.abs(values).max() * np.geomspace(1, 1 / 256, 200))
    assert chosen <= 1.1 * best
    assert chosen <= squared_error(values, float(np.abs(values).max()))


def test_entropy_cuts_a_long_tail_and_keeps_a_flat_range() -> None:
    random = np.random.default_rng(4)
    tail = np.concatenate([np.abs(random.normal(size=100000)), [400.0]]).astype(np.float32)
    assert 1.0 < entropy(filled(tail, 5)) < 100.0
    flat = random.uniform(0, 1, 100000).astype(np.float32)
    assert entropy(filled(flat, 5)) > 0.9
