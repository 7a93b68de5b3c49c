"""Reads, adds and replaces the initializers of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir


def initializer_tensor(value: ir.Value) -> ir.TensorProtocol:
    """Returns the tensor of an initializer.

    Raises:
        ValueError: ``value`` has no tensor.
    """
    if value.const_value is None:
        raise ValueError(f"the initializer {value.name} has no value")
    return value.const_value


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds a tensor to a graph's initializers, under the tensor's name."""
    value = ir.Value(
        name=tensor.name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def replace_by_dequantize(graph: ir.Graph, name: str, inputs: Sequence[ir.Value], attributes: dict[str, int]) -> None:
    """Replaces an initializer by a new DequantizeLinear node.

    Args:
        graph: The graph; changed in place.
        name: Name of the initializer.
        inputs: Inputs of the new node: integers, scales, and zero points if there are any.
        attributes: Attributes of the new node.
    """
    value = graph.initializers[name]
    users = list(value.uses())
    node = ir.node("DequantizeLinear", inputs, attributes=attributes, name=f"{name}.dequantize")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}.float", value.shape, value.type
    graph.insert_before(users[0][0], node)
    for user, index in users:
        user.replace_input_with(index, output)
    del graph.initializers[name]
