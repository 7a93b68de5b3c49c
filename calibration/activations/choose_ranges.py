"""Chooses the INT8 range of each activation: by its histogram alone, or by the error of the layer's output.

``--method smooth``, the default, tries several candidates for each activation. A candidate is a division of the
channels, and a threshold beyond which values saturate. The division moves a part of a channel's magnitude into the
weights (SmoothQuant, arXiv 2211.10438); its migration strength alpha says how much. The candidate that causes the least
error in the outputs of the matrix multiplications (MatMul nodes) is used. The error is measured on tokens drawn from
all pictures, and on the tokens with the largest values. A matrix multiplication whose error stays above a limit is kept
in floating point. The other methods (``histogram.py``) choose the threshold of each tensor by its histogram.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.calibration.activations.folding import Fold, find_fold
from blip2edge.calibration.activations.histogram import LEVELS, THRESHOLDS
from blip2edge.calibration.activations.observer import Observation, Observations
from blip2edge.calibration.activations.qdq import ActivationPlan, QuantizedActivation, quantize_columns
from blip2edge.calibration.initializers import initializer_tensor
from blip2edge.calibration.targets import Product, Targets
from blip2edge.progress import counted

ALPHAS = (0.35, 0.5, 0.65, 0.8)
"""Migration strengths that are tried, in addition to no division."""

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.15)
"""Thresholds that are tried, as shares of the largest value."""

COLUMNS = 384
"""Number of columns of a layer's weights for which the error of each candidate (division and threshold) is computed."""

LIMIT = 0.01
"""Largest accepted power of the error of a layer's output, divided by the power of the output (10 % in amplitude)."""

NODE_ABOVE = 1e-3
"""A division of channels that needs its own node is tried only if the error without it is above this value."""

NODE_GAIN = 0.5
"""A division of channels that needs its own node is used only if its error is less than this share of the error
without division."""

ALWAYS_ZERO = "its input is always zero"

Array = NDArray[np.float32]


@dataclass(frozen=True)
class RangeChoice:
    """A candidate for the INT8 range of an activation, and the error that this range causes.

    Attributes:
        output_error: Power of the rounding error of an output, divided by the power of the output: the mean over
            tokens. It is computed for the drawn tokens and for the tokens with the largest values; the larger result
            counts.
        threshold: Largest value of the activation that INT8 can represent, after the division by ``divisor``.
        divisor: Divisor of each channel, ``[K]``; None for no division.
    """

    output_error: float
    threshold: float
    divisor: Array | None


def choose_ranges(
    model: ir.Model,
    targets: Targets,
    observations: Observations,
    method: str,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationPlan:
    """Chooses the INT8 range of each activation of a graph.

    Args:
        model: The graph. Only the weights that are multiplied with one activation are in memory at a time.
        targets: The matrix multiplications (MatMul nodes) of the graph that can be quantized.
        observations: The observation of each activation, by the activation's name.
        method: How a range is chosen, one of :data:`METHODS`.
        progress: Called with the number of finished activations and the number of all activations.

    Returns:
        The activations with their ranges, and the matrix multiplications that stay in floating point, with the reason.
    """
    plan = ActivationPlan()
    groups = targets.by_activation()
    for activation, products in counted(groups.items(), len(groups), progress):
        observation = observations[activation]
        if observation.histogram.maximum == 0.0:
            plan.kept_float |= {product.node: ALWAYS_ZERO for product in products}
            continue
        weights = [_read(model, product) for product in products]
        fold: Fold = ()
        if method in THRESHOLDS:
            threshold = THRESHOLDS[method](observation.histogram)
            error = _Division(observation, _joined(weights), None).output_error(threshold)
            choice = RangeChoice(error, threshold, None)
        else:
            fold = find_fold(model, products)
            shared = any(len(list(model.graph.initializers[product.weight].uses())) > 1 for product in products)
            choice = choose_range(observation, weights, fold != (), shared)
            if choice.output_error > LIMIT:
                reason = f"rounding would change {choice.output_error:.1%} of the power of its output"
                plan.kept_float |= {product.node: reason for product in products}
                continue
        taken = fold if choice.divisor is not None else ()
        plan.activations.append(
            QuantizedActivation(
                activation, tuple(products), choice.threshold, choice.divisor, taken, choice.output_error
            )
        )
    return plan


def choose_range(observation: Observation, weights: Sequence[Array], folds: bool, shared: bool = False) -> RangeChoice:
    """Chooses the range of one activation: the candidate with the least error.

    A division of the channels is used only if it reduces the error. If the division needs a node of its own, it is
    used only if the error becomes less than :data:`NODE_GAIN` times the error without division.

    Args:
        observation: The observation of the activation.
        weights: Weight ``[K, N]`` of each matrix multiplication that reads the activation.
        folds: Whether the channels' division can be folded into the weights of the layer before, so that no node is
            needed.
        shared: Whether another node reads one of the weights too, so that the weight must not be changed.
    """
    weight = _joined(weights)
    plain = _Division(observation, weight, None).best()
    if shared or not (folds or plain.output_error > NODE_ABOVE):
        return plain
    smooth = min(
        (_Division(observation, weight, divisor).best() for divisor in _divisors(observation.channel_max, weight)),
        key=lambda choice: choice.output_error,
    )
    return smooth if smooth.output_error < plain.output_error * (1.0 if folds else NODE_GAIN) else plain


def _read(model: ir.Model, product: Product) -> Array:
    return np.asarray(initializer_tensor(model.graph.initializers[product.weight]).numpy(), np.float32)


def _joined(weights: Sequence[Array]) -> Array:
    """Returns some columns of the weights that are multiplied with one activation, concatenated: ``[K, M]``."""
    return np.concatenate([_some_columns(one, COLUMNS // len(weights)) for one in weights], axis=1)


def _some_columns(weight: Array, count: int) -> Array:
    width = weight.shape[1]
    if width <= count:
        return weight
    return weight[:, np.arange(count) * width // count]


def _divisors(channel_max: Array, weight: Array) -> Iterator[Array]:
    """Yields one divisor ``[K]`` per migration strength alpha (SmoothQuant, eq. 4).

    The divisor of a channel is ``max|x|^alpha / max|w|^(1 - alpha)``, scaled so that the median over the channels is 1.
    """
    largest = np.abs(weight).max(axis=1)
    used = (channel_max > 0) & (largest > 0)
    for alpha in ALPHAS:
        divisor = np.ones_like(channel_max)
        divisor[used] = channel_max[used] ** alpha / largest[used] ** (1 - alpha)
        if used.any():
            divisor[used] /= np.median(divisor[used])
        yield np.clip(divisor, 1e-3, 1e3).astype(np.float32)


class _Division:
    """A division of an activation's channels, and the tokens on which thresholds are tried for this division.

    Args:
        observation: The observation of the activation.
        weight: Weight that is multiplied with the activation, ``[K, N]``.
        divisor: Divisor of each channel, ``[K]``; None for no division.
    """

    def __init__(self, observation: Observation, weight: Array, divisor: Array | None) -> None:
        scaled = weight if divisor is None else weight * divisor[:, None]
        integers, scale = quantize_columns(scaled)
        self.divisor = divisor
        largest = observation.channel_max if divisor is None else observation.channel_max / divisor
        self.maximum = float(largest.max())
        self._rounded = integers * scale
        self._parts = []
        for rows in observation.sample():
            exact = rows @ weight
            power = np.square(exact).sum(axis=1)
            divided = rows if divisor is None else rows / divisor
            self._parts.append((divided, exact, np.maximum(power, max(power.mean() * 0.1, 1e-30))))

    def output_error(self, threshold: float) -> float:
        """Computes the relative error of the layer's output if values beyond ``threshold`` saturate.

        It is the power of the rounding error divided by the power of the output: the mean over the drawn tokens or over
        the tokens with the largest values, whichever is larger.
        """
        step = threshold / LEVELS
        errors = []
        for rows, exact, power in self._parts:
            values = np.clip(np.rint(rows / step), -LEVELS, LEVELS) * step
            errors.append(float((np.square(values @ self._rounded - exact).sum(axis=1) / power).mean()))
        return max(errors)

    def best(self) -> RangeChoice:
        """Returns the range with the least error; thresholds of :data:`SHARES` times the largest value are tried."""
        tried = [(self.output_error(self.maximum * share), self.maximum * share) for share in SHARES]
        return RangeChoice(*min(tried), self.divisor)
