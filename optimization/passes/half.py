"""Changes the floating type of a whole graph: to FP32 for the passes, and to FP16 afterwards.

The passes can rewrite only graphs in FP32. So a graph in FP16 is first widened: its casts disappear. When the passes
are done, all floating tensors become FP16, except in nodes whose values would overflow or be rounded too much. Large
weights are converted one by one when they are written. A weight that was FP16 in the bundle is not converted: the
bundle's own tensor is used.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import Array, clean, constant, dims, producer, replace, users
from blip2edge.optimization.passes.norms import IN_FP32

FP16, FP32 = ir.DataType.FLOAT16, ir.DataType.FLOAT
LARGEST_FP16 = 65504.0
EAGER = 1 << 16  # elements of a tensor that is converted at once
WIDENED = "widened"
"""Key in ``Value.meta`` of a weight that was converted to FP32: the original FP16 tensor."""

NORM = "SimplifiedLayerNormalization"
FRAGILE = ("Softmax", "ReduceMean", "ReduceSum", "ReduceL2", "Sqrt", "Reciprocal")
"""Operators that stay in FP32.

In FP16, sums of squares overflow beyond 65504, and softmax sums lose small terms, because the mantissa has 11 bits.
"""

SQUARES = ("Pow", "Mul")
ANGLES = ("Cos", "Sin")
"""Operators whose input is an angle; they and all nodes that compute the angle stay in FP32.

In FP16, an angle of 2000 has no digits after the decimal point.
"""

RESIDUAL = ("Add", "GatherElements")
"""Operators on the residual stream: its sums, and the selection of the positions whose logits are computed."""

STAYS = ("present.", "cross.")
"""Beginnings of the names of outputs that become FP16, because a later run reads them on the GPU.

All other outputs are cast back to their type.
"""


def widen(model: ir.Model) -> int:
    """Turns every FP16 tensor of a graph into FP32 and removes the casts between both types.

    Returns:
        The number of changed tensors.
    """
    graph = model.graph
    narrow = [value for value in _values(graph) if value.dtype == FP16]
    if not narrow:
        return 0
    for node in graph:
        if node.op_type != "Cast" and any(output.dtype == FP32 for output in node.outputs):
            node.meta[IN_FP32] = True
    for value in narrow:
        value.type = ir.TensorType(FP32)  # a new one: values may share a type
        if value.const_value is not None:
            value.meta[WIDENED] = value.const_value
            value.const_value = converted(value, value.const_value.numpy, FP32)
    for node in list(graph):
        _retype_attributes(node, FP16, FP32)
        source = node.inputs[0] if node.op_type == "Cast" else None
        if source is not None and source.dtype == FP32 and node.outputs[0].dtype == FP32:
            replace(node.outputs[0], source)
    clean(model)
    return len(narrow)


def halve(model: ir.Model) -> int:
    """Turns the FP32 tensors of a graph into FP16, except in nodes that need FP32; returns the number of tensors."""
    graph = model.graph
    kept = needing_fp32(graph)
    kinds = {str(value.name): value.dtype for value in graph.outputs}
    changed = 0
    for node in graph:
        if node not in kept:
            _retype_attributes(node, FP32, FP16)
    for value in _values(graph):
        if value.dtype != FP32 or (value.const_value is not None and _only_for(value, kept)):
            continue
        value.type = ir.TensorType(FP16)
        changed += 1
        if value.const_value is not None:
            before = value.meta.get(WIDENED)
            value.const_value = before or converted(value, value.const_value.numpy, FP16)
    for node in kept:
        _keep_fp32(graph, node)
    for index, output in enumerate(list(graph.outputs)):
        name = str(output.name)
        if output.dtype == FP16 and kinds[name] == FP32 and not name.startswith(STAYS):
            output.name = f"{name}_fp16"
            cast = _cast(output, FP32, name)
            graph.append(cast)
            graph.outputs[index] = cast.outputs[0]
    return changed


def dequantize(model: ir.Model) -> int:
    """Removes the rounding of activations, and turns integer weights back into floating-point weights.

    Returns:
        The number of removed DequantizeLinear nodes.
    """
    clean(model)  # a weight of a fused product is not used any more
    found = 0
    for node in list(model.graph):
        if node.op_type != "DequantizeLinear":
            continue
        rounded = producer(node.inputs[0], "QuantizeLinear")
        source = rounded.inputs[0] if rounded is not None else None
        weight = node.inputs[0]
        if source is None and weight is not None and weight.const_value is not None:
            source = _dequantized(model.graph, node, weight)
        if source is not None:
            replace(node.outputs[0], source)
            found += 1
    clean(model)
    return found


def _dequantized(graph: ir.Graph, node: ir.Node, weight: ir.Value) -> ir.Value:
    """Adds an initializer for the floating values of an integer weight; they are computed when the graph is written."""
    value = ir.Value(name=f"{weight.name}.{node.outputs[0].name}", shape=weight.shape, type=ir.TensorType(FP32))
    value.const_value = converted(value, lambda: _restored(node), FP32)
    graph.register_initializer(value)
    return value


def _restored(node: ir.Node) -> Array:
    """Computes the floating values of a DequantizeLinear node whose inputs are initializers."""
    integers, scales = (constant(value) for value in node.inputs[:2])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if integers is None or scales is None:
        raise ValueError(f"{node.name}: expected constant weights and scales, got computed ones")
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0

    def spread(part: Array) -> Array:
        if block:
            return np.repeat(part, block, axis=axis)
        return part if part.ndim == 0 else part.reshape([-1 if at == axis else 1 for at in range(integers.ndim)])

    values = integers.astype(np.float32)
    if zero is not None:
        values = values - spread(zero.astype(np.float32))
    return np.asarray(values * spread(scales.astype(np.float32)), np.float32)


def converted(value: ir.Value, read: Callable[[], Array], target: ir.DataType) -> ir.TensorProtocol:
    """Returns an initializer's tensor in another type; a large tensor is converted at each use of its values."""

    def convert() -> ir.TensorProtocol:
        array = read()
        if target == FP16:
            array = np.clip(array, -LARGEST_FP16, LARGEST_FP16)
        return ir.tensor(array.astype(target.numpy()), dtype=target, name=value.name)

    shape = ir.Shape(value.shape if value.shape is not None else read().shape)
    size = int(np.prod([int(size) for size in dims(value)]))
    return convert() if size <= EAGER else ir.LazyTensor(convert, target, shape, name=str(value.name))


def needing_fp32(graph: ir.Graph) -> dict[ir.Node, None]:
    """Finds the nodes whose values would overflow or be rounded too much in FP16, in the order of the graph."""
    kept = {node for node in graph if node.op_type in FRAGILE or node.meta.get(IN_FP32)}
    for node in list(kept):
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if before is not None and before.op_type in SQUARES:
            kept.add(before)
    kept |= _ancestors(node for node in graph if node.op_type in ANGLES)
    # A norm reads the values of FP32 nodes as they are.
    kept |= {node for node in graph if node.op_type == NORM and _after(node, kept)}
    return {node: None for node in graph if node in kept}


def _after(node: ir.Node, kept: Container[ir.Node]) -> bool:
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    return source is not None and source in kept


def keep_residuals(model: ir.Model) -> int:
    """Marks the nodes of the residual stream as FP32, if the model has root-mean-square norms.

    The last matrix multiplications of the feed-forward blocks, whose outputs are added to the stream, are marked too.
    These outputs reach 66246 in Flan-T5 (transformers#5651), more than the largest FP16 number, 65504.

    Returns:
        The number of marked nodes.
    """
    found: set[ir.Node] = set()
    for node in model.graph:
        if node.op_type == NORM:
            waiting = [node.inputs[0]]
            while waiting:
                value = waiting.pop()
                before = value.producer() if value is not None else None
                if before is None or before.op_type not in RESIDUAL or before in found:
                    continue
                found.add(before)
                waiting += list(before.inputs)
    products = {product for node in found for value in node.inputs if (product := _feed_forward(value)) is not None}
    for node in found | products:
        node.meta[IN_FP32] = True
    return len(found | products)


def _feed_forward(value: ir.Value | None) -> ir.Node | None:
    """Returns the last matrix multiplication of a feed-forward block if it computes ``value``; otherwise None.

    The multiplication is recognised by its input, which comes from an activation function.
    """
    node = producer(value, "MatMul") or producer(value, "MatMulNBits")
    before = node.inputs[0].producer() if node is not None and node.inputs[0] is not None else None
    return node if before is not None and before.op_type in ("Mul", "Relu", "Gelu", "BiasGelu", "FastGelu") else None


def _ancestors(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """Returns the given nodes and all nodes before them whose outputs are FP32 numbers."""
    found: set[ir.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node in found or all(output.dtype != FP32 for output in node.outputs):
            continue
        found.add(node)
        waiting += [before for value in node.inputs if value is not None and (before := value.producer()) is not None]
    return found


def _keep_fp32(graph: ir.Graph, node: ir.Node) -> None:
    """Inserts casts from FP16 before a node and to FP16 after it; between two FP32 nodes, there is no cast."""
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != FP16:
            continue
        cast = producer(value, "Cast")
        if cast is not None and cast.inputs[0] is not None and cast.inputs[0].dtype == FP32:
            node.replace_input_with(index, cast.inputs[0])
            continue
        made = _cast(value, FP32, f"{value.name}_fp32_{node.outputs[0].name}_{index}")
        graph.insert_before(node, made)
        node.replace_input_with(index, made.outputs[0])
    for output in node.outputs:
        if output.dtype != FP16:
            continue
        output.type = ir.TensorType(FP32)
        if not users(output) and not output.is_graph_output():
            continue
        cast = _cast(output, FP16, f"{output.name}_fp16")
        graph.insert_after(node, cast)
        for user, index in list(output.uses()):
            if user is not cast:
                user.replace_input_with(index, cast.outputs[0])
        for index, value in enumerate(list(graph.outputs)):
            if value is output:
                graph.outputs[index] = cast.outputs[0]
                output.name, cast.outputs[0].name = f"{output.name}_fp32", output.name


def _cast(value: ir.Value, target: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(target)})
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(target)
    return node


def _retype_attributes(node: ir.Node, source: ir.DataType, target: ir.DataType) -> None:
    """Changes the output type of a Cast or ConstantOfShape node from ``source`` to ``target``."""
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.as_int() == source:
        node.attributes["to"] = ir.AttrInt64("to", int(target))
    value = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and value is not None and value.as_tensor().dtype == source:
        array = value.as_tensor().numpy().astype(target.numpy())
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array, dtype=target))


def _only_for(value: ir.Value, nodes: Container[ir.Node]) -> bool:
    """Returns whether all users of a value are among ``nodes``."""
    return all(user in nodes for user, _ in value.uses()) and not value.is_graph_output()


def _values(graph: ir.Graph) -> list[ir.Value]:
    return [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]
