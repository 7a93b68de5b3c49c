"""FP16 and BF16 as a change of the graph: what is cast, and what stays in FP32.

The graph is traced in FP32. Here every floating tensor takes the target type, except the nodes that a rule names:
they keep FP32 weights and get a cast on either side. The rules that fired stand in the manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.contract import GraphSpec
from blip2edge.export.to_onnx import Traced

PRECISIONS: dict[str, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""Names on the command line, and the dtype of the graphs' floating tensors."""


@dataclass(frozen=True)
class Fp32Exception:
    """Nodes that stay in FP32.

    Attributes:
        op_type: The kind of node.
        reason: Why, as the manifest tells it.
    """

    op_type: str
    reason: str


EXCEPTIONS: tuple[Fp32Exception, ...] = (
    Fp32Exception("Softmax", "sums of exponentials lose small weights in 11 bits of mantissa"),
)


def convert(traced: Traced, precision: str, exceptions: Sequence[Fp32Exception] = EXCEPTIONS) -> tuple[str, ...]:
    """Casts a traced graph in place.

    Args:
        traced: An FP32 graph; its spec is replaced by that of the new precision.
        precision: A key of :data:`PRECISIONS`.
        exceptions: What stays in FP32.

    Returns:
        The exceptions that fired, one sentence each.
    """
    if precision == "fp32":
        return ()
    dtype = PRECISIONS[precision]
    target = ir.DataType[dtype.upper()]
    graph = traced.model.graph
    spec = traced.spec.with_float(dtype)
    reasons = {exception.op_type: exception.reason for exception in exceptions}
    fired = {node.op_type for node in graph if node.op_type in reasons}
    for node in graph:
        _retype_attributes(node, target)
    for value in _values(graph):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = target
            if value.const_value is not None:
                value.const_value = ir.tensor(_cast(value.const_value.numpy(), target), dtype=target, name=value.name)
    for node in list(graph):
        if node.op_type in reasons:
            _keep_fp32(graph, node, target)
    _keep_fp32_outputs(graph, spec, target)
    traced.spec = spec
    return tuple(f"{kind}: {reasons[kind]}" for kind in sorted(fired))


def _values(graph: ir.Graph) -> list[ir.Value]:
    inner = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *inner]


def _cast(array: np.ndarray, target: ir.DataType) -> np.ndarray:
    limit = 65504.0 if target == ir.DataType.FLOAT16 else 3.3895e38
    return np.clip(array, -limit, limit).astype(target.numpy())


def _retype_attributes(node: ir.Node, target: ir.DataType) -> None:
    to = node.attributes.get("to")
    if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.FLOAT:
        node.attributes["to"] = ir.AttrInt64("to", int(target))
    value = node.attributes.get("value")
    if node.op_type in ("Constant", "ConstantOfShape") and value is not None:
        tensor = value.as_tensor()
        if tensor.dtype == ir.DataType.FLOAT:
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(_cast(tensor.numpy(), target), dtype=target))


def _keep_fp32(graph: ir.Graph, node: ir.Node, target: ir.DataType) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype == target:
            cast = _cast_node(value, ir.DataType.FLOAT, f"{value.name}_fp32")
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    for output in node.outputs:
        if output.dtype == target:
            output.dtype = ir.DataType.FLOAT
            cast = _cast_node(output, target, f"{output.name}_cast")
            graph.insert_after(node, cast)
            users = [(user, index) for user, index in output.uses() if user is not cast]
            for user, index in users:
                user.replace_input_with(index, cast.outputs[0])


def _keep_fp32_outputs(graph: ir.Graph, spec: GraphSpec, target: ir.DataType) -> None:
    """Casts the outputs that the spec wants in FP32 (the logits)."""
    for index, (value, tensor) in enumerate(zip(list(graph.outputs), spec.outputs, strict=True)):
        if tensor.dtype != "float32" or value.dtype != target:
            continue
        name = value.name
        value.name = f"{name}_{target.name.lower()}"
        cast = _cast_node(value, ir.DataType.FLOAT, str(name))
        graph.append(cast)
        graph.outputs[index] = cast.outputs[0]


def _cast_node(value: ir.Value, target: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": int(target)})
    output = node.outputs[0]
    output.name, output.shape, output.dtype = name, value.shape, target
    return node
