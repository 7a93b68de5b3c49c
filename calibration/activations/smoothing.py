"""Ranges chosen for whole layers: what rounding changes of a layer's output decides.

Every activation gets, out of a few candidates, the division of its channels (SmoothQuant, arXiv 2211.10438: a
channel's reach moves into the weights by the power alpha) and the threshold under which its products' outputs change
least, on tokens drawn from the pictures and on those with the largest values, which few pictures could do without.
A product that no candidate brings below a limit stays in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.calibration.activations.folding import find_fold
from blip2edge.calibration.activations.observations import Observation, Observations
from blip2edge.calibration.activations.qdq import Group, Plan, quantise_columns
from blip2edge.calibration.activations.ranges import LEVELS
from blip2edge.calibration.targets import Product, Targets, held
from blip2edge.progress import counted

ALPHAS = (0.35, 0.5, 0.65, 0.8)
"""Powers of the activation's reach that are tried, beside no division at all."""

SHARES = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25, 0.15)
"""Thresholds that are tried, as shares of the largest value."""

COLUMNS = 384
"""Columns of a layer's weights on which the candidates are compared."""

LIMIT = 0.01
"""A token's output may change by this share of its power (10 % in amplitude); more, and the layer stays as it is."""

NODE_ABOVE = 1e-3
"""A division that needs a node of its own is made only where the change without it is more than this..."""

A_NODE = 0.5
"""...and then it must leave less than this share of it."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Choice:
    """A candidate and what it changes.

    Attributes:
        change: Mean over tokens of the power that rounding adds to an output over the output's own; of the drawn
            and the largest tokens, whichever is more.
        threshold: Of the divided activation.
        divisor: ``[K]``, or None.
    """

    change: float
    threshold: float
    divisor: Array | None


def plan_by_output(
    model: ir.Model,
    targets: Targets,
    observations: Observations,
    *,
    limit: float = LIMIT,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """A range and a division an activation.

    Args:
        model: The graph; its weights are read one activation's products at a time.
        targets: The products.
        observations: By activation.
        limit: See :data:`LIMIT`.
        progress: Called with activations done and activations in all.
    """
    plan = Plan()
    groups = targets.by_activation()
    for activation, products in counted(groups.items(), len(groups), progress):
        observation = observations[activation]
        if observation.histogram.maximum == 0.0:
            plan.left |= {product.node: "its input is always zero" for product in products}
            continue
        fold = find_fold(model, products)
        shared = any(len(list(model.graph.initializers[product.weight].uses())) > 1 for product in products)
        choice = choose(observation, [_read(model, product) for product in products], fold != (), shared)
        if choice.change > limit:
            reason = f"rounding would change {choice.change:.1%} of the power of its output"
            plan.left |= {product.node: reason for product in products}
        else:
            taken = fold if choice.divisor is not None else ()
            plan.groups.append(
                Group(activation, tuple(products), choice.threshold, choice.divisor, taken, choice.change)
            )
    return plan


def choose(observation: Observation, weights: Sequence[Array], folds: bool, shared: bool = False) -> Choice:
    """The best candidate for an activation.

    Args:
        observation: Of the activation.
        weights: ``[K, N]`` of each product that reads it.
        folds: Whether a division costs no node.
        shared: Whether a weight is read elsewhere too, so that its rows cannot change.
    """
    weight = _joined(weights)
    plain = _Trial(observation, weight, None).best()
    if shared or not (folds or plain.change > NODE_ABOVE):
        return plain
    smooth = min(
        (_Trial(observation, weight, divisor).best() for divisor in _divisors(observation.reach, weight)),
        key=lambda choice: choice.change,
    )
    return smooth if smooth.change < plain.change * (1.0 if folds else A_NODE) else plain


def _read(model: ir.Model, product: Product) -> Array:
    return np.asarray(held(model.graph.initializers[product.weight]).numpy(), np.float32)


def _some_columns(weight: Array, count: int) -> Array:
    width = weight.shape[1]
    if width <= count:
        return weight
    return weight[:, np.arange(count) * width // count]


def _divisors(reach: Array, weight: Array) -> Iterator[Array]:
    """``reach^alpha / weight^(1 - alpha)`` by channel, with the middle channel at 1."""
    largest = np.abs(weight).max(axis=1)
    used = (reach > 0) & (largest > 0)
    for alpha in ALPHAS:
        divisor = np.ones_like(reach)
        divisor[used] = reach[used] ** alpha / largest[used] ** (1 - alpha)
        if used.any():
            divisor[used] /= np.median(divisor[used])
        yield np.clip(divisor, 1e-3, 1e3).astype(np.float32)


class _Trial:
    """A division of an activation's channels, with the tokens that it is tried on.

    Args:
        observation: Of the activation.
        weight: ``[K, N]``.
        divisor: ``[K]``, or None.
    """

    def __init__(self, observation: Observation, weight: Array, divisor: Array | None) -> None:
        scaled = weight if divisor is None else weight * divisor[:, None]
        integers, scale = quantise_columns(scaled)
        self.divisor = divisor
        self.top = float((observation.reach if divisor is None else observation.reach / divisor).max())
        self._rounded = integers * scale
        self._parts = []
        for rows in observation.sample():
            exact = rows @ weight
            power = np.square(exact).sum(axis=1)
            given = rows if divisor is None else rows / divisor
            self._parts.append((given, exact, np.maximum(power, max(power.mean() * 0.1, 1e-30))))

    def change(self, threshold: float) -> float:
        """See :class:`Choice`."""
        step = threshold / LEVELS
        changes = []
        for rows, exact, power in self._parts:
            values = np.clip(np.rint(rows / step), -LEVELS, LEVELS) * step
            changes.append(float((np.square(values @ self._rounded - exact).sum(axis=1) / power).mean()))
        return max(changes)

    def best(self) -> Choice:
        """The best of the thresholds."""
        found = [(self.change(self.top * share), self.top * share) for share in SHARES]
        return Choice(*min(found), self.divisor)


def change_of(
    model: ir.Model, products: Sequence[Product], observation: Observation, threshold: float
) -> float:
    """What rounding with a threshold changes of the output of some products; see :class:`Choice`."""
    return _Trial(observation, _joined([_read(model, product) for product in products]), None).change(
        threshold
    )


def _joined(weights: Sequence[Array]) -> Array:
    """Some columns of each of the products that read an activation, side by side."""
    return np.concatenate([_some_columns(one, COLUMNS // len(weights)) for one in weights], axis=1)
