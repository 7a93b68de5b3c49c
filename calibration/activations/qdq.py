"""INT8 as a change of the graph: QuantizeLinear and DequantizeLinear around each product, weights as int8.

    activation [.., K] -> QuantizeLinear (one scale) -> DequantizeLinear --+
    int8 weight [K, N] ---> DequantizeLinear (a scale a column) -----------+-> MatMul -> bias and the rest in float

Symmetric, zero points 0, no INT32 bias: the form that TensorRT's parser takes. ONNX Runtime runs the same file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import DTypeLike, NDArray

from blip2edge.calibration.activations.ranges import LEVELS
from blip2edge.calibration.storage import TensorStore
from blip2edge.calibration.targets import Product, held
from blip2edge.progress import counted

FP16_OPSET = 19
"""The first whose QuantizeLinear takes float16; TensorRT 10.3 reads up to 20."""

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Group:
    """An activation that becomes INT8 and the products that read it.

    Attributes:
        activation: Its name.
        products: The products.
        threshold: Values beyond it saturate.
        divisor: ``[K]``, what each channel is divided by before, or None (SmoothQuant, arXiv 2211.10438, eq. 3).
        fold: Initializers that take the division, so that no node has to: name and the axis of the channels.
            Empty where a Mul does it.
        change: Power that rounding adds to the products' outputs, over their own (``smoothing.py``).
    """

    activation: str
    products: tuple[Product, ...]
    threshold: float
    divisor: Array | None = None
    fold: tuple[tuple[str, slice], ...] = ()
    change: float = 0.0


@dataclass
class Plan:
    """What becomes of a graph.

    Attributes:
        groups: Activations that become INT8.
        left: Products that stay in floating point, by the weight's name, with the reason.
    """

    groups: list[Group] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def quantise_columns(weight: Array, dtype: DTypeLike = np.float32) -> tuple[NDArray[np.int8], Array]:
    """Rounds a matrix to int8 with a scale a column.

    Args:
        weight: ``[K, N]``.
        dtype: In which the graph keeps the scales: the integers are those of the scales as they are kept.

    Returns:
        int8 ``[K, N]`` within ±127, and scales ``[N]``; a column of zeros, or of what is none in ``dtype``, has the
        scale 1.
    """
    scale = (np.abs(weight).max(axis=0) / LEVELS).astype(dtype).astype(np.float32)
    scale[scale == 0] = 1.0
    return np.clip(np.rint(weight / scale), -LEVELS, LEVELS).astype(np.int8), scale


def quantise_graph(
    model: ir.Model,
    plan: Plan,
    data: TensorStore,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Inserts the nodes and writes every initializer of a graph to a new file.

    Args:
        model: The parent's graph, its initializers external; changed in place. One initializer is in memory at a
            time.
        plan: What becomes INT8.
        data: Where the weights go.
        progress: Called with initializers done and initializers in all.
    """
    graph = model.graph
    if any(value.dtype == ir.DataType.FLOAT16 for value in graph.initializers.values()):
        graph.opset_imports[""] = max(graph.opset_imports[""], FP16_OPSET)
    scales = _weight_changes(plan)
    quantised = {product.weight for group in plan.groups for product in group.products}
    names = list(graph.initializers)
    for name in counted(names, len(names), progress):
        _store(graph, name, scales.get(name, []), name in quantised, data)
    for group in plan.groups:
        _insert(graph, group, data)


Change = Callable[[Array], Array]


def _weight_changes(plan: Plan) -> dict[str, list[Change]]:
    """What smoothing does to each initializer: rows times the divisor, and what is before them divided by it."""
    changes: dict[str, list[Change]] = {}
    for group in plan.groups:
        if group.divisor is None:
            continue
        for product in group.products:
            changes.setdefault(product.weight, []).append(_times_rows(group.divisor))
        for name, where in group.fold:
            changes.setdefault(name, []).append(_divided(group.divisor, where))
    return changes


def _times_rows(divisor: Array) -> Change:
    return lambda weight: weight * divisor[:, None]


def _divided(divisor: Array, where: slice) -> Change:
    def change(values: Array) -> Array:
        changed = values.copy()
        changed[..., where] /= divisor
        return changed

    return change


def _store(graph: ir.Graph, name: str, changes: Sequence[Change], quantised: bool, data: TensorStore) -> None:
    value = graph.initializers[name]
    tensor = held(value)
    if not changes and not quantised:
        if isinstance(tensor, ir.ExternalTensor):  # no shape: small constants lie in the graph itself
            value.const_value = data.copy(name, tensor)
        return
    array = np.asarray(tensor.numpy(), np.float32)
    for change in changes:
        array = change(array)
    if not quantised:
        value.const_value = data.add(name, array.astype(tensor.numpy().dtype), tensor.dtype)
        return
    weight, scale = quantise_columns(array, tensor.numpy().dtype)
    users = list(value.uses())
    stored = _initializer(graph, data, f"{name}.int8", weight, ir.DataType.INT8)
    steps = _initializer(graph, data, f"{name}.scale", scale, value.dtype)
    zeros = _initializer(graph, data, f"{name}.zero", np.zeros(len(scale), np.int8), ir.DataType.INT8)
    node = ir.node(
        "DequantizeLinear", [stored, steps, zeros], attributes={"axis": 1}, name=f"{name}.dequantize"
    )
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}.float", value.shape, value.type
    graph.insert_before(users[0][0], node)
    for user, index in users:
        user.replace_input_with(index, output)
    del graph.initializers[name]


def _initializer(
    graph: ir.Graph, data: TensorStore, name: str, array: NDArray[Any], dtype: ir.DataType | None
) -> ir.Value:
    kind = ir.DataType.FLOAT if dtype is None else dtype
    stored = array.astype(kind.numpy())
    tensor: ir.TensorProtocol = data.add(name, stored, kind) if stored.ndim else ir.tensor(stored, name=name)
    value = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(kind), const_value=tensor)
    graph.register_initializer(value)
    return value


def _insert(graph: ir.Graph, group: Group, data: TensorStore) -> None:
    """The nodes of one activation; all its products read the same dequantised value."""
    users = {product.node for product in group.products}
    readers = [node for node in graph if node.name in users]
    value = readers[0].inputs[0]
    if value is None or value.dtype is None:
        raise ValueError(f"the activation {group.activation} has no type")
    nodes: list[ir.Node] = []
    source = value
    if group.divisor is not None and not group.fold:
        factor = _initializer(graph, data, f"{value.name}.smooth", 1.0 / group.divisor, value.dtype)
        nodes.append(_node("Mul", [source, factor], f"{value.name}.smoothed", value.dtype, value.shape))
        source = nodes[-1].outputs[0]
    scale = _initializer(
        graph, data, f"{value.name}.scale", np.array(group.threshold / LEVELS, np.float32), value.dtype
    )
    zero = _initializer(graph, data, f"{value.name}.zero", np.array(0, np.int8), ir.DataType.INT8)
    nodes.append(
        _node("QuantizeLinear", [source, scale, zero], f"{value.name}.int8", ir.DataType.INT8, value.shape)
    )
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


def _node(
    op_type: str, inputs: Sequence[ir.Value], name: str, dtype: ir.DataType, shape: ir.Shape | None
) -> ir.Node:
    node = ir.node(op_type, list(inputs), name=name)
    output = node.outputs[0]
    output.name, output.dtype, output.shape = name, dtype, shape
    return node
