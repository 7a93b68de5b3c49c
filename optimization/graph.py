"""Helper functions with which the passes read and rewrite graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

Array = NDArray[Any]

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators
(https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md)."""


def prepare(model: ir.Model) -> None:
    """Prepares a graph for the passes: turns constants into initializers, imports ONNX Runtime's operator domain."""
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.graph.opset_imports[CONTRIB] = 1


def clean(model: ir.Model) -> None:
    """Removes the nodes and initializers of a graph that are not used any more."""
    passes.RemoveUnusedNodesPass()(model)


def constant(value: ir.Value | None) -> Array | None:
    """Returns the array of a value that is an initializer; None for any other value."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """Returns the number of an initializer that has exactly one element; None for any other value."""
    array = constant(value) if value is None or value.shape is None or _is_small(value.shape) else None
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _is_small(shape: ir.Shape) -> bool:
    return all(isinstance(size, int) and size <= 1 for size in shape)


def vector(value: ir.Value | None) -> Array | None:
    """Returns the array of an initializer ``[N]``; None for any other value."""
    if value is None or value.shape is None or len(value.shape) != 1:
        return None
    return constant(value)


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Returns the node that computes ``value``, if its operator is ``op_type``; else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def users(value: ir.Value) -> list[ir.Node]:
    """Returns the nodes that have ``value`` as an input, each once."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def only_user(value: ir.Value, op_type: str) -> ir.Node | None:
    """Returns the only node that uses ``value``, if its operator is ``op_type``; else None.

    If the value is an output of the graph, the result is None too.
    """
    found = users(value)
    return found[0] if len(found) == 1 and found[0].op_type == op_type and not value.is_graph_output() else None


def operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Returns the two inputs of a node that has exactly two."""
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        raise ValueError(f"{node.op_type} {node.name} lacks an input")
    return first, second


def with_scalar(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """Splits the inputs of a node such as ``x + 2`` into a value and a scalar constant.

    Returns:
        The value and the constant; None if no input of the node is a scalar constant.
    """
    if node is None:
        return None
    first, second = operands(node)
    for value, other in ((first, second), (second, first)):
        number = scalar(other)
        if number is not None:
            return value, number
    return None


def other_operand(node: ir.Node, value: ir.Value) -> ir.Value:
    """Returns the other input of a node with two inputs, one of which is ``value``."""
    first, second = operands(node)
    return second if first is value else first


def with_bias(product: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """Finds the node that adds a bias, a constant vector ``[N]``, to the result of a matrix multiplication.

    Args:
        product: The MatMul node.

    Returns:
        The addition and the bias; if there is no bias, the MatMul node and None.
    """
    out = product.outputs[0]
    plus = only_user(out, "Add")
    if plus is None or vector(other_operand(plus, out)) is None:
        return product, None
    return plus, other_operand(plus, out)


def biased(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """Splits a sum with a constant vector ``[N]`` into the other operand and the vector; None for any other value."""
    node = producer(value, "Add")
    if node is None:
        return None
    first, second = operands(node)
    for source, bias in ((first, second), (second, first)):
        if vector(bias) is not None:
            return source, bias
    return None


def permutation(node: ir.Node | None) -> list[int]:
    """Returns the permutation of a Transpose node; an empty list if ``node`` is None."""
    attribute = node.attributes.get("perm") if node is not None else None
    return list(attribute.as_ints()) if attribute is not None else []


def dims(value: ir.Value | None) -> list[int | str]:
    """Returns the shape of a value: numbers, and names of dynamic axes as text. Empty if the shape is unknown."""
    if value is None or value.shape is None:
        return []
    return [size if isinstance(size, int) else str(size) for size in value.shape]


def initializer(graph: ir.Graph, name: str, array: Array) -> ir.Value:
    """Returns an initializer with the content ``array``.

    If an initializer ``name`` with this content exists, it is returned. If ``name`` exists with another content,
    underscores are added to the name.
    """
    known = graph.initializers.get(name)
    if known is not None and known.const_value is not None:
        held = known.const_value.numpy()
        if held.dtype == array.dtype and np.array_equal(held, array):
            return known
        return initializer(graph, f"{name}_", array)
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def insert(
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    like: Sequence[ir.Value | None],
    domain: str = CONTRIB,
    **attributes: Any,
) -> list[ir.Value]:
    """Inserts a new node before another node.

    Args:
        before: The node that the new node is inserted before.
        op_type: The new node's operator.
        inputs: The new node's inputs; None for an optional input that is omitted.
        like: For each output, an existing value with the same type and shape; None if they are unknown.
        domain: The operator's domain.
        **attributes: The node's attributes.

    Returns:
        The new node's outputs.
    """
    graph = before.graph
    if graph is None:
        raise ValueError(f"{before.op_type} {before.name} belongs to no graph")
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    node = ir.node(op_type, given, domain=domain, attributes=attributes, num_outputs=len(like))
    for output, value in zip(node.outputs, like, strict=True):
        if value is not None:
            output.type, output.shape = value.type, value.shape
    graph.insert_before(before, node)
    return list(node.outputs)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Replaces all uses of the value ``old`` by ``new``; an output of the graph keeps its name."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}_before"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def subgraph(model: ir.Model, target: ir.Value, inputs: Mapping[str, ir.Value]) -> list[ir.Node] | None:
    """Returns the nodes that compute ``target`` from ``inputs`` and initializers, in order.

    Returns:
        The nodes; None if ``target`` depends on other inputs.
    """
    needed: dict[ir.Node, None] = {}
    waiting = [target]
    while waiting:
        value = waiting.pop()
        if value.name in inputs or constant(value) is not None:
            continue
        node = value.producer()
        if node is None:
            return None
        if node not in needed:
            needed[node] = None
            waiting += [source for source in node.inputs if source is not None]
    return [node for node in model.graph if node in needed]
