"""Integers in blocks: the format, its scales, and rounding with error compensation."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("ml_dtypes", reason="its int4 is what ours is held to")

import ml_dtypes

from blip2edge.calibration.weights.blocks import (
    BLOCKS,
    BlockFormat,
    packed,
    plain_scales,
    restored,
    rounded,
    searched_scales,
)
from blip2edge.calibration.weights.gptq import GptqRounder, SecondMoments, nearest
from blip2edge.errors import BundleError

INT4 = BlockFormat(4, 16)


def drawn(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("width", "bits", "block"), [(2560, 4, 128), (576, 4, 64), (96, 4, 32), (2560, 8, 64), (48, 8, 16)]
)
def test_the_largest_documented_block_that_divides_the_width(width: int, bits: int, block: int) -> None:
    assert BlockFormat.for_width(width, bits) == BlockFormat(bits, block)


def test_no_block_divides() -> None:
    assert BlockFormat.for_width(100, 4) is None
    with pytest.raises(ValueError, match="4 bits in blocks of 24"):
        BlockFormat(4, 24)


def test_four_bits_are_packed_as_onnx_says() -> None:
    integers = np.array([[-8, 7, 0], [1, -1, 3]], np.int8)
    data = packed(integers, 4)
    assert data.tolist() == [0x78, 0x10, 0x3F]
    assert data.tobytes() == _by_ml_dtypes(integers)


def _by_ml_dtypes(integers: np.ndarray) -> bytes:
    """The same by another package's int4."""
    values = integers.astype(ml_dtypes.int4).reshape(-1).view(np.uint8) & 0x0F
    return (values[0::2] | values[1::2] << 4).astype(np.uint8).tobytes()


def test_an_odd_number_of_values_keeps_its_last() -> None:
    integers = np.array([[-3, 5, -8]], np.int8)
    assert packed(integers, 4).tolist() == [0x5D, 0x08]


@pytest.mark.parametrize("bits", list(BLOCKS))
def test_rounding_is_off_by_half_a_step_at_most(bits: int) -> None:
    form, weight = BlockFormat(bits, 16), drawn(64, 5)
    scales = plain_scales(weight, form)
    error = np.abs(restored(rounded(weight, scales, form), scales, form) - weight)
    assert np.all(error <= np.repeat(scales, 16, axis=0) * 0.5001)
    largest = np.abs(rounded(weight, scales, form).reshape(4, 16, 5)).max(axis=1)
    assert np.all(largest == form.high)


def test_a_block_of_zeros_stays_zero() -> None:
    weight = np.zeros((32, 3), np.float32)
    weight[:16] = drawn(16, 3)
    integers, scales = GptqRounder(np.eye(32)).quantize(weight, INT4)
    assert np.all(np.isfinite(scales))
    assert np.all(scales > 0)
    assert not restored(integers, scales, INT4)[16:].any()


def test_searched_scales_err_less() -> None:
    weight = drawn(128, 40)
    weight[::16] *= 4  # one large value a block
    plain, searched = (
        float(np.square(restored(*nearest(weight, INT4, rule), INT4) - weight).sum())
        for rule in (plain_scales, searched_scales)
    )
    assert searched < 0.97 * plain


def correlated(rows: int, width: int) -> np.ndarray:
    """Activations as they are: some channels are large, and they move together."""
    random = np.random.default_rng(1)
    mixing = random.standard_normal((width, width)) * np.exp(random.standard_normal(width))
    return (random.standard_normal((rows, width)) @ mixing).astype(np.float32)


def test_moving_the_error_halves_it() -> None:
    activations, weight = correlated(600, 64), drawn(64, 48)
    moments = SecondMoments(64)
    for part in np.array_split(activations, 3):  # batches sum up
        moments.add(part.reshape(2, -1, 64))
    corrector = GptqRounder(moments.mean())
    right = activations @ weight

    def off(integers: np.ndarray, scales: np.ndarray) -> float:
        found = activations @ restored(integers, scales, INT4)
        return float(np.linalg.norm(found - right) / np.linalg.norm(right))

    ours, plain = corrector.quantize(weight, INT4), nearest(weight, INT4, plain_scales)
    assert off(*ours) < 0.5 * off(*plain)
    assert corrector.error(weight, *ours, INT4) == pytest.approx(off(*ours), rel=1e-3)


@pytest.mark.parametrize("width", [24, 600])  # 600 is inverted by halves
def test_the_factor_is_that_of_the_inverse(width: int) -> None:
    moments = SecondMoments(width)
    moments.add(drawn(3 * width, width))
    corrector = GptqRounder(moments.mean())
    ordered = moments.mean()[np.ix_(corrector.order, corrector.order)] + corrector.damping * np.eye(width)
    factor = corrector.factor.astype(np.float64)
    assert np.allclose(np.tril(factor, -1), 0)
    assert np.allclose(factor.T @ factor @ ordered, np.eye(width), atol=1e-3)


def test_channels_that_are_never_used_do_no_harm() -> None:
    activations = correlated(50, 32)
    activations[:, 5] = 0
    moments = SecondMoments(32)
    moments.add(activations)
    integers, scales = GptqRounder(moments.mean()).quantize(drawn(32, 7), INT4)
    assert np.all(np.isfinite(restored(integers, scales, INT4)))


def test_activations_that_overflow_are_refused() -> None:
    moments = SecondMoments(8)
    moments.add(np.full((2, 8), np.inf, np.float32))
    with pytest.raises(BundleError, match="overflows to NaN or infinity"), np.errstate(invalid="ignore"):
        GptqRounder(moments.mean())
