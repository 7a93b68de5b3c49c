"""Converts graphs to FP16 and BF16, with exceptions that stay in FP32.

Graphs are traced in FP32. Every floating-point tensor then gets the target type, except in nodes that match a rule:
these nodes stay in FP32, between Cast nodes. The manifest lists the rules that matched.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common as passes

from blip2edge.bundle.schema import GraphSpec
from blip2edge.choices import PRECISIONS
from blip2edge.export.to_onnx import Traced
from blip2edge.model.models import Config
from blip2edge.model.retrieval import RetrievalConfig

SCOPES = "pkg.torch.onnx.name_scopes"
"""Metadata key under which torch's exporter stores the module path of a node."""


@dataclass(frozen=True)
class Fp32Exception:
    """A rule for nodes that stay in FP32.

    Attributes:
        name: Name of the exception in the manifest.
        path: Regular expression that is searched in the path of a node's module.
        op_type: Regular expression that the whole operator name must match.
        reason: Why these nodes stay in FP32.
    """

    name: str
    path: str
    op_type: str
    reason: str

    def fits(self, node: ir.Node) -> bool:
        """Returns whether the rule matches a node."""
        return bool(re.fullmatch(self.op_type, node.op_type) and re.search(self.path, module_path(node)))


EXCEPTIONS: tuple[Fp32Exception, ...] = (
    Fp32Exception("softmax", "", "Softmax", "sums of exponentials lose small weights in 11 bits of mantissa"),
    Fp32Exception("RMSNorm", r"norm\d?$", "(?!LayerNormalization).*", "squares overflow: 256 squared is beyond 65504"),
    Fp32Exception("unit length", r"unit$", ".*", "a sum of squares overflows beyond 65504"),
    Fp32Exception(
        "token matching",
        r"(^|\.)matching$",
        ".*",
        "cosines that differ in the fourth digit decide which patches are merged",
    ),
    Fp32Exception("rotary positions", r"rotary$", ".*", "an angle of 2000 has no digits after the decimal point"),
)
"""Rules for nodes that stay in FP32 in every model."""

BY_LANGUAGE: dict[str, tuple[Fp32Exception, ...]] = {
    "t5": (
        Fp32Exception(
            "T5 feed-forward output",
            r"^language\..*feed_forward\.down$",
            "MatMul",
            "reaches 66246 in Flan-T5 (transformers#5651)",
        ),
        Fp32Exception(
            "T5 residual",
            r"^language\..*layers\.\d+$",
            "Add",
            "carries the feed-forward output from layer to layer",
        ),
        Fp32Exception(
            "T5 selection",
            r"^language$",
            "GatherElements",
            "takes the last tokens of the residual before the final norm",
        ),
    ),
}
"""Additional rules for nodes that stay in FP32, by the ``model_type`` of the language model."""


def module_path(node: ir.Node) -> str:
    """Returns the dotted path of the torch module that a node was traced from; empty if the node does not record it."""
    scopes = node.metadata_props.get(SCOPES)
    return str(ast.literal_eval(scopes)[-2]) if scopes and len(ast.literal_eval(scopes)) > 1 else ""


def exceptions_of(config: Config) -> tuple[Fp32Exception, ...]:
    """Returns the rules for the nodes of a model that stay in FP32."""
    kind = config.text.kind if isinstance(config, RetrievalConfig) else config.language.kind
    return (*EXCEPTIONS, *BY_LANGUAGE.get(kind, ()))


def convert(traced: Traced, precision: str, exceptions: Sequence[Fp32Exception]) -> tuple[str, ...]:
    """Converts a traced graph to another precision, in place.

    Args:
        traced: An FP32 graph; its spec is replaced by the spec of the new precision.
        precision: A key of :data:`blip2edge.choices.PRECISIONS`.
        exceptions: The rules for nodes that stay in FP32.

    Returns:
        The rules that matched, one sentence each.
    """
    graph = traced.model.graph
    fired: dict[str, str] = {}
    if precision != "fp32":
        dtype = PRECISIONS[precision]
        target = ir.DataType[dtype.upper()]
        kept = [(node, rule) for node in graph for rule in exceptions if rule.fits(node)]
        fired = {rule.name: f"{rule.name}: {rule.reason}" for _, rule in kept}
        spec = traced.spec.with_float(dtype)
        _retype(graph, target, {node for node, _ in kept})
        for node in dict.fromkeys(node for node, _ in kept):
            _keep_fp32(graph, node, target)
        _keep_fp32_outputs(graph, spec, target)
        passes.RemoveUnusedNodesPass()(traced.model)
        traced.spec = spec
    for node in graph:
        node.metadata_props.clear()
    return tuple(fired[name] for name in sorted(fired))


def _retype(graph: ir.Graph, target: ir.DataType, kept: Container[ir.Node]) -> None:
    """Sets the type of every FP32 tensor to the target type, except constants that only the ``kept`` nodes use."""
    for node in graph:
        if node not in kept and not (node.op_type == "Constant" and _only_for(node.outputs[0], kept)):
            _retype_attributes(node, target)
    for value in _values(graph):
        is_constant = value.const_value is not None or _is_constant(value)
        if value.dtype == ir.DataType.FLOAT and not (is_constant and _only_for(value, kept)):
            value.dtype = target
            if value.const_value is not None:
                value.const_value = ir.tensor(_cast(value.const_value.numpy(), target), dtype=target, name=value.name)


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Constant"


def _only_for(value: ir.Value, nodes: Container[ir.Node]) -> bool:
    """Returns whether a value is an input only of ``nodes``, and not an output of the graph."""
    return all(user in nodes for user, _ in value.uses()) and not value.is_graph_output()


def _values(graph: ir.Graph) -> list[ir.Value]:
    inner = [output for node in graph for output in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *inner]


def _cast(array: NDArray[Any], target: ir.DataType) -> NDArray[Any]:
    limit = 65504.0 if target == ir.DataType.FLOAT16 else 3.3895e38
    cast: NDArray[Any] = np.clip(array, -limit, limit).astype(target.numpy())
    return cast


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
    """Inserts Cast nodes before and after a node that stays in FP32; no Cast between two such nodes."""
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != target:
            continue
        producer = value.producer()
        uncast = producer.inputs[0] if producer is not None and producer.op_type == "Cast" else None
        if uncast is not None and uncast.dtype == ir.DataType.FLOAT:
            node.replace_input_with(index, uncast)
            continue
        cast = _cast_node(value, ir.DataType.FLOAT, f"{value.name}_fp32_{node.name}_{index}")
        graph.insert_before(node, cast)
        node.replace_input_with(index, cast.outputs[0])
    for output in node.outputs:
        if output.dtype != target:
            continue
        output.dtype = ir.DataType.FLOAT
        cast = _cast_node(output, target, f"{output.name}_{target.name.lower()}")
        graph.insert_after(node, cast)
        for user, index in list(output.uses()):
            if user is not cast:
                user.replace_input_with(index, cast.outputs[0])
        for index, value in enumerate(list(graph.outputs)):
            if value is output:
                graph.outputs[index] = cast.outputs[0]
                output.name, cast.outputs[0].name = f"{output.name}_fp32", output.name


def _keep_fp32_outputs(graph: ir.Graph, spec: GraphSpec, target: ir.DataType) -> None:
    """Inserts a Cast to FP32 before each graph output that is FP32 in the spec, such as the logits."""
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
