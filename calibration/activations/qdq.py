"""Writes INT8 into a graph: QuantizeLinear and DequantizeLinear before each matrix multiplication, weights as int8.

    activation [.., K] -> QuantizeLinear (one scale) -> DequantizeLinear --+
    int8 weight [K, N] ---> DequantizeLinear (a scale per column) ---------+-> MatMul -> bias and the rest in float

Ranges are symmetric, zero points are 0, and no bias is INT32: TensorRT's parser requires this. ONNX Runtime runs
the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from blip2edge.calibration.activations.histogram import LEVELS
from blip2edge.calibration.initializers import (
    add_initializer,
    initializer_tensor,
    replace_by_dequantize,
)
from blip2edge.calibration.storage import TensorStore
from blip2edge.calibration.targets import Product
from blip2edge.progress import counted

FP16_OPSET = 19
"""The first opset whose QuantizeLinear takes float16; TensorRT 10.3 reads opsets up to 20."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class QuantizedActivation:
    """An activation that becomes INT8, and the matrix multiplications (MatMul nodes) that read it.

    Attributes:
        name: The activation's name.
        products: The matrix multiplications that read the activation.
        threshold: Values beyond ±threshold saturate.
        divisor: Divisor of each channel before rounding, ``[K]`` (SmoothQuant, arXiv 2211.10438, eq. 3); None for no
            division.
        fold: Initializers of the previous layer, which are divided in place of the activation, each with the slice of
            the last axis that is divided. Empty if a Mul node divides the activation.
        output_error: Power of the rounding error of the outputs of ``products``, divided by the power of these outputs.
    """

    name: str
    products: tuple[Product, ...]
    threshold: float
    divisor: Array | None = None
    fold: tuple[tuple[str, slice], ...] = ()
    output_error: float = 0.0


@dataclass
class ActivationPlan:
    """The activations of a graph that become INT8, and the matrix multiplications that stay in floating point.

    Attributes:
        activations: Activations that become INT8.
        kept_float: The reason why a matrix multiplication is kept in floating point, by the name of its node or weight.
    """

    activations: list[QuantizedActivation] = field(default_factory=list)
    kept_float: dict[str, str] = field(default_factory=dict)

    def weights(self) -> list[str]:
        """Returns the names of the weights that become INT8."""
        return [product.weight for activation in self.activations for product in activation.products]


def quantize_columns(weight: Array, dtype: DTypeLike = np.float32) -> tuple[NDArray[np.int8], Array]:
    """Rounds a matrix to int8 with one scale per column.

    Args:
        weight: The matrix, ``[K, N]``.
        dtype: Type in which the graph stores the scales. The integers are computed with the scales rounded to this
            type.

    Returns:
        Integers int8 ``[K, N]`` within ±127, and scales ``[N]``. A scale that would be zero in ``dtype`` becomes 1.
    """
    scale = (np.abs(weight).max(axis=0) / LEVELS).astype(dtype).astype(np.float32)
    scale[scale == 0] = 1.0
    return np.clip(np.rint(weight / scale), -LEVELS, LEVELS).astype(np.int8), scale


def insert_qdq(
    model: ir.Model,
    plan: ActivationPlan,
    data: TensorStore,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Inserts QuantizeLinear and DequantizeLinear nodes, and writes every initializer of a graph to a new file.

    Args:
        model: The original graph, its initializers external; changed in place. One initializer is in memory at a
            time.
        plan: The activations that become INT8.
        data: Stores the weights.
        progress: Called with initializers done and initializers in all.
    """
    graph = model.graph
    if any(value.dtype == ir.DataType.FLOAT16 for value in graph.initializers.values()):
        graph.opset_imports[""] = max(graph.opset_imports[""], FP16_OPSET)
    changes = _weight_changes(plan)
    quantized = set(plan.weights())
    names = list(graph.initializers)
    for name in counted(names, len(names), progress):
        _store(graph, name, changes.get(name, []), name in quantized, data)
    for activation in plan.activations:
        _insert(graph, activation, data)


WeightChange = Callable[[Array], Array]


def _weight_changes(plan: ActivationPlan) -> dict[str, list[WeightChange]]:
    """Returns the functions that change each initializer for smoothing, by the initializer's name.

    The rows of a weight are multiplied with the divisor of its activation. The initializers of the layer before are
    divided by the same divisor.
    """
    changes: dict[str, list[WeightChange]] = {}
    for activation in plan.activations:
        if activation.divisor is None:
            continue
        for product in activation.products:
            changes.setdefault(product.weight, []).append(_times_rows(activation.divisor))
        for name, part in activation.fold:
            changes.setdefault(name, []).append(_divided(activation.divisor, part))
    return changes


def _times_rows(divisor: Array) -> WeightChange:
    return lambda weight: weight * divisor[:, None]


def _divided(divisor: Array, part: slice) -> WeightChange:
    def change(values: Array) -> Array:
        changed = values.copy()
        changed[..., part] /= divisor
        return changed

    return change


def _store(graph: ir.Graph, name: str, changes: Sequence[WeightChange], quantized: bool, data: TensorStore) -> None:
    value = graph.initializers[name]
    tensor = initializer_tensor(value)
    if not changes and not quantized:
        if isinstance(tensor, ir.ExternalTensor):  # small constants are in the graph itself
            value.const_value = data.copy(name, tensor)
        return
    array = np.asarray(tensor.numpy(), np.float32)
    for change in changes:
        array = change(array)
    if not quantized:
        value.const_value = data.add(name, array.astype(tensor.numpy().dtype), tensor.dtype)
        return
    weight, scale = quantize_columns(array, tensor.numpy().dtype)
    stored = _initializer(graph, data, f"{name}.int8", weight, ir.DataType.INT8)
    steps = _initializer(graph, data, f"{name}.scale", scale, value.dtype)
    zeros = _initializer(graph, data, f"{name}.zero", np.zeros(len(scale), np.int8), ir.DataType.INT8)
    replace_by_dequantize(graph, name, [stored, steps, zeros], {"axis": 1})


def _initializer(
    graph: ir.Graph, data: TensorStore, name: str, array: NDArray[Any], dtype: ir.DataType | None
) -> ir.Value:
    kind = ir.DataType.FLOAT if dtype is None else dtype
    stored = array.astype(kind.numpy())
    tensor: ir.TensorProtocol = data.add(name, stored, kind) if stored.ndim else ir.tensor(stored, name=name)
    return add_initializer(graph, tensor)


def _insert(graph: ir.Graph, activation: QuantizedActivation, data: TensorStore) -> None:
    """Inserts QuantizeLinear and DequantizeLinear for an activation; all MatMul nodes that read it share the result."""
    users = {product.node for product in activation.products}
    readers = [node for node in graph if node.name in users]
    value = readers[0].inputs[0]
    if value is None or value.dtype is None:
        raise ValueError(f"the activation {activation.name} has no type")
    nodes: list[ir.Node] = []
    source = value
    if activation.divisor is not None and not activation.fold:
        factor = _initializer(graph, data, f"{value.name}.smooth", 1.0 / activation.divisor, value.dtype)
        nodes.append(_node("Mul", [source, factor], f"{value.name}.smoothed", value.dtype, value.shape))
        source = nodes[-1].outputs[0]
    scale = _initializer(
        graph, data, f"{value.name}.scale", np.array(activation.threshold / LEVELS, np.float32), value.dtype
    )
    zero = _initializer(graph, data, f"{value.name}.zero", np.array(0, np.int8), ir.DataType.INT8)
    nodes.append(_node("QuantizeLinear", [source, scale, zero], f"{value.name}.int8", ir.DataType.INT8, value.shape))
    nodes.append(
        _node(
            "DequantizeLinear",
            [nodes[-1].outputs[0], scale, zero],
            f"{value.name}.float",
            value.dtype,
            value.shape,
        )
    )
    graph.insert_before(readers[0], nodes)
    for reader in readers:
        reader.replace_input_with(0, nodes[-1].outputs[0])


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Node:
    node = ir.node(op_type, list(inputs), name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, shape
    return node
