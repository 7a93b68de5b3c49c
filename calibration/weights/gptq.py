"""Rounds weights by GPTQ (Frantar et al., arXiv 2210.17323): later inputs compensate the error of earlier inputs.

The weights are rounded one input after the other. The error of an input is distributed over the remaining inputs such
that the output changes least, by the Cholesky factor of the inverse of ``H = XᵀX`` (X: the activations of the matrix).
Scales are chosen before rounding, so that inputs can be rounded by decreasing activation (act-order) while blocks stay
contiguous. At the end, the scales are fitted to the integers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.calibration.weights.blocks import (
    BlockFormat,
    Floats,
    Integers,
    restored,
    rounded,
    searched_scales,
)
from blip2edge.errors import BundleError, option

DAMPING = 0.01
"""Damping of ``H = XᵀX``: this number times the mean of the diagonal is added to the diagonal (arXiv 2210.17323)."""

LAZY = 128
"""Number of inputs whose corrections are collected before the rest of the matrix is updated."""

LEAF = 256
"""Largest number of rows of a triangular matrix that is inverted as a whole; larger matrices are halved first."""

VALUES = 1 << 22
"""Largest number of weights that are rounded together (16 MiB); the columns of a matrix are independent."""


Scales = Callable[[Floats, BlockFormat], Floats]
"""Function that computes the scales ``[K / block, N]`` of a matrix ``[K, N]``."""


class SecondMoments:
    """Sums up ``XᵀX`` over batches of activations X.

    Args:
        width: K, number of channels of an activation.
    """

    def __init__(self, width: int) -> None:
        self.total = np.zeros((width, width), np.float64)
        self.rows = 0

    def add(self, activations: NDArray[Any]) -> None:
        """Adds a batch of activations ``[..., K]``."""
        flat = activations.reshape(-1, activations.shape[-1]).astype(np.float32, copy=False)
        self.total += flat.T @ flat
        self.rows += len(flat)

    def mean(self) -> NDArray[np.float64]:
        """Returns the mean of ``XᵀX`` over the activations, float64 ``[K, K]``."""
        return self.total / max(self.rows, 1)


class GptqRounder:
    """Rounds the matrices that are multiplied with the same activations, by GPTQ; the matrix H is factorized only once.

    Args:
        moments: Mean of ``XᵀX`` over the activations, ``[K, K]``.

    Raises:
        BundleError: ``moments`` is not finite.
    """

    def __init__(self, moments: NDArray[np.float64]) -> None:
        diagonal = np.diag(moments).copy()
        if not np.isfinite(moments).all():
            raise BundleError(
                "an activation overflows to NaN or infinity on the calibration pictures",
                f"export the checkpoint with {option('precision')} fp32, and calibrate the new bundle",
            )
        self.importance = np.maximum(diagonal, 1e-8 * max(float(diagonal.mean()), 1e-30)).astype(np.float32)
        self.order = np.argsort(-diagonal, kind="stable")
        self.moments = moments.astype(np.float32)
        self.damping = np.float32(max(DAMPING * float(diagonal.mean()), 1e-12))
        ordered = moments[np.ix_(self.order, self.order)]
        ordered[np.diag_indices_from(ordered)] += self.damping
        self.factor = _factor(ordered)

    def quantize(self, weight: Floats, form: BlockFormat) -> tuple[Integers, Floats]:
        """Rounds a matrix ``[K, N]`` to integers ``[K, N]`` and scales ``[K / block, N]``."""
        integers = np.empty(weight.shape, np.int8)
        scales = np.empty((len(weight) // form.block, weight.shape[1]), np.float32)
        for part in _columns(weight):
            chosen = searched_scales(weight[part], form, self.importance)
            integers[part] = self._round(weight[part], chosen, form)
            scales[part] = self._fitted(weight[part], integers[part], chosen, form)
        return integers, scales

    def error(self, weight: Floats, integers: Integers, scales: Floats, form: BlockFormat) -> float:
        """Computes how much rounding changes a matrix's output, as a relative change: ``|X(W - Ŵ)| / |XW|``.

        X are the activations, W is ``weight``, and Ŵ the matrix that ``integers`` and ``scales`` represent.
        """
        moments = self.moments
        lost = whole = 0.0
        for part in _columns(weight):
            given = weight[part]
            gap = given - restored(integers[part], scales[part], form)
            lost += float(np.vdot(gap, moments @ gap))
            whole += float(np.vdot(given, moments @ given))
        return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0

    def _round(self, weight: Floats, scales: Floats, form: BlockFormat) -> Integers:
        rest = weight[self.order]  # a copy, in the order of rounding
        steps = scales[self.order // form.block]
        out = np.empty(rest.shape, np.int8)
        factor = self.factor
        for start in range(0, len(rest), LAZY):
            end = min(start + LAZY, len(rest))
            errors = np.empty((end - start, rest.shape[1]), np.float32)
            for row in range(start, end):
                values = np.clip(np.rint(rest[row] / steps[row]), form.low, form.high)
                out[row] = values
                error = (rest[row] - values * steps[row]) / factor[row, row]
                rest[row + 1 : end] -= np.outer(factor[row, row + 1 : end], error)
                errors[row - start] = error
            rest[end:] -= factor[start:end, end:].T @ errors
        integers = np.empty_like(out)
        integers[self.order] = out
        return integers

    def _fitted(self, weight: Floats, integers: Integers, scales: Floats, form: BlockFormat) -> Floats:
        """Returns the scales ``[K / block, N]`` with the least error for given integers.

        The scales are computed for one block after the other, while the scales of all other blocks are fixed.
        The error of an output is ``eᵀ H e`` with ``e = w - Σ s_b q_b``; it is quadratic in each ``s_b``.
        """
        fitted = scales.copy()
        moments = self.moments
        spread = np.repeat(scales, form.block, axis=0)
        error = weight - integers * spread
        pull = moments @ error + self.damping * error  # [K, N]
        for block in range(len(scales)):
            rows = slice(block * form.block, (block + 1) * form.block)
            values = integers[rows].astype(np.float32)
            bent = moments[:, rows] @ values
            bent[rows] += self.damping * values
            change = (values * pull[rows]).sum(axis=0) / np.maximum((values * bent[rows]).sum(axis=0), 1e-30)
            change = np.clip(change, -0.5 * fitted[block], fitted[block])  # a scale stays positive
            fitted[block] += change
            pull -= bent * change
        return fitted


def nearest(weight: Floats, form: BlockFormat, scales_of: Scales) -> tuple[Integers, Floats]:
    """Rounds a matrix ``[K, N]`` to the nearest integers; ``scales_of`` computes the scales.

    Returns:
        Integers ``[K, N]`` and scales ``[K / block, N]``.
    """
    integers = np.empty(weight.shape, np.int8)
    scales = np.empty((len(weight) // form.block, weight.shape[1]), np.float32)
    for part in _columns(weight):
        scales[part] = scales_of(weight[part], form)
        integers[part] = rounded(weight[part], scales[part], form)
    return integers, scales


def _columns(weight: Floats) -> Iterator[tuple[slice, slice]]:
    """Yields index expressions that divide a matrix into groups of columns."""
    step = max(64, VALUES // len(weight))
    for start in range(0, weight.shape[1], step):
        yield np.s_[:, start : start + step]


def _factor(moments: NDArray[np.float64]) -> Floats:
    """Returns the upper triangular U with ``UᵀU = M⁻¹`` for a positive definite matrix M.

    If the rows and columns of M are reversed, ``M = LLᵀ`` gives ``M⁻¹ = L⁻ᵀL⁻¹``. ``L⁻¹`` with its rows and columns
    reversed again is upper triangular.
    """
    lower = np.linalg.cholesky(moments[::-1, ::-1])
    return np.ascontiguousarray(_inverse(lower)[::-1, ::-1]).astype(np.float32)


def _inverse(lower: NDArray[Any]) -> NDArray[Any]:
    """Inverts a lower triangular matrix by halves, at a third of the cost of a general inverse."""
    if len(lower) <= LEAF:
        leaf: NDArray[Any] = np.linalg.inv(lower)
        return leaf
    half = len(lower) // 2
    out = np.zeros_like(lower)
    out[:half, :half] = _inverse(lower[:half, :half])
    out[half:, half:] = _inverse(lower[half:, half:])
    out[half:, :half] = -out[half:, half:] @ (lower[half:, :half] @ out[:half, :half])
    return out
