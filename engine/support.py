"""Checks, before a build, whether a TensorRT version supports a graph: operators, opset and types, node by node."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from blip2edge.engine.operators import CONSTANT_INPUTS, SINGLE_OUTPUT, VERSIONS, ParserVersion
from blip2edge.errors import EngineError, option

BOOLEAN = frozenset({"And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Xor", "IsNaN"})
INDICES = frozenset({"Shape", "Size", "ArgMax", "ArgMin"})
QUANTISED_OPSET_OPERATORS = frozenset({"QuantizeLinear", "DequantizeLinear"})
INPUT_TYPES = frozenset({"FLOAT", "FLOAT16", "BFLOAT16", "INT32", "INT64", "BOOL", "UINT8"})


@dataclass(frozen=True)
class Finding:
    """Something in a graph that a TensorRT version does not support: a node, an input, or the opset.

    Attributes:
        node: Name of the node (of the node's first output if the node has no name) or of the graph's input; ``graph``
            if the opset is not supported.
        operator: The node's operator, ``input`` or ``opset``.
        problem: What is not supported.
        fix: How to export a graph without this problem.
    """

    node: str
    operator: str
    problem: str
    fix: str


def version_for(target: str, version: tuple[int, int]) -> ParserVersion:
    """Returns the table of supported operators of a TensorRT version.

    Args:
        target: ``tensorrt`` or ``rtx``.
        version: Major and minor version number.
    """
    if target == "rtx":
        return VERSIONS["rtx"]
    numbered = {tuple(map(int, name.split("."))): table for name, table in VERSIONS.items() if name != "rtx"}
    older = [number for number in numbered if number <= version]
    return numbered[max(older, default=min(numbered))]


def check_graph(model: ir.Model, version: ParserVersion) -> list[Finding]:
    """Checks that a TensorRT version supports the opset, the inputs and every node of a graph.

    Args:
        model: The graph; its weights are not read.
        version: The TensorRT version that will parse the graph.

    Returns:
        One finding for each node and input that is not supported, and one if the opset is too new.
    """
    types = dtypes_of(model)
    findings = [*_inputs(model.graph.inputs), *_opset(model, version)]
    for node in model.graph:
        problem = _problem(node, types, version)
        if problem is not None:
            findings.append(Finding(_name(node), node.op_type, *problem))
    return findings


def refuse(file: str, findings: list[Finding], version: ParserVersion) -> None:
    """Raises EngineError if there are findings; the message describes the first, and counts the others.

    Args:
        file: Name of the graph's file.
        findings: What :func:`check_graph` found.
        version: The TensorRT version.
    """
    if not findings:
        return
    first, rest = findings[0], len(findings) - 1
    more = f", and {rest} more nodes are not supported" if rest else ""
    raise EngineError(
        f"{version.name} does not support the node {first.node!r} ({first.operator}) of {file}: {first.problem}{more}",
        first.fix,
    )


def dtypes_of(model: ir.Model) -> dict[ir.Value, str]:
    """Returns the dtype of every value of a graph, such as ``FLOAT16``; omits values whose dtype is unknown.

    If the graph does not store the dtype of a value, the dtype follows from the operator that computes the value.
    """
    types: dict[ir.Value, str] = {}
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        dtype = value.dtype or (value.const_value.dtype if value.const_value is not None else None)
        if dtype is not None:
            types[value] = dtype.name
    for node in model.graph:
        for index, output in enumerate(node.outputs):
            name = output.dtype.name if output.dtype is not None else _computed(node, index, types)
            if name is not None:
                types[output] = name
    return types


def _computed(node: ir.Node, index: int, types: dict[ir.Value, str]) -> str | None:
    """Derives the dtype of a node's output from the operator and the dtypes of the inputs; None if unknown.

    Args:
        node: The node.
        index: Index of the output.
        types: Dtypes of the values that earlier nodes compute.
    """
    if node.op_type in BOOLEAN:
        return "BOOL"
    if node.op_type in INDICES or (node.op_type == "TopK" and index == 1):
        return "INT64"
    if node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int()).name
    if node.op_type == "Constant":
        value = node.attributes.get("value")
        return None if value is None else value.as_tensor().dtype.name
    source = {"DequantizeLinear": 1, "QuantizeLinear": 2, "Where": 1}.get(node.op_type, 0)
    if source >= len(node.inputs):
        return "UINT8" if node.op_type == "QuantizeLinear" else None
    chosen = node.inputs[source]
    return None if chosen is None else types.get(chosen)


def _inputs(values: Iterable[ir.Value]) -> list[Finding]:
    return [
        Finding(
            str(value.name),
            "input",
            f"its type is {value.dtype.name}, not one of {', '.join(sorted(INPUT_TYPES))}",
            "export the checkpoint again",
        )
        for value in values
        if value.dtype is not None and value.dtype.name not in INPUT_TYPES
    ]


def _opset(model: ir.Model, version: ParserVersion) -> list[Finding]:
    """Returns a finding if the graph's opset is too new; graphs with Q/DQ nodes may have a newer opset than others."""
    opset = model.opset_imports.get("", 0)
    kinds = {node.op_type for node in model.graph}
    newest = version.quantised_opset if kinds & QUANTISED_OPSET_OPERATORS else version.opset
    if opset <= newest:
        return []
    problem = f"the graph has opset {opset}, but {version.name} documents opsets up to {newest}"
    return [
        Finding(
            "graph",
            "opset",
            problem,
            f"use a newer TensorRT, or {option('precision')} fp16 without {option('weights')}",
        )
    ]


def _problem(node: ir.Node, types: dict[ir.Value, str], version: ParserVersion) -> tuple[str, str] | None:
    again = "export the checkpoint again with this version of blip2edge"
    if node.domain not in ("", "ai.onnx"):
        return (
            f"its domain is {node.domain}, which only ONNX Runtime supports",
            "build from the bundle itself, not from its optimized copy",
        )
    known = version.types_of(node.op_type)
    if known is None:
        return f"{version.name} has no such operator", again
    first = node.inputs[0] if node.inputs else None
    dtype = types.get(first) if first is not None else None
    if node.op_type == "Where" and len(node.inputs) > 1 and node.inputs[1] is not None:
        dtype = types.get(node.inputs[1])
    if dtype is not None and dtype not in known:
        return f"its input has the type {dtype}, expected one of {', '.join(sorted(known))}", again
    if node.op_type in SINGLE_OUTPUT and len(node.outputs) > 1:
        return "only its first output is supported", again
    for index in CONSTANT_INPUTS.get(node.op_type, ()):
        asked = node.inputs[index] if index < len(node.inputs) else None
        if asked is not None and node.op_type not in version.loose_axes and not _is_constant(asked):
            return f"its input {index} must be a constant", again
    if node.op_type in QUANTISED_OPSET_OPERATORS:
        return _quantisation(node, dtype, version)
    return None


def _quantisation(node: ir.Node, dtype: str | None, version: ParserVersion) -> tuple[str, str] | None:
    block = node.attributes.get("block_size")
    if (
        block is not None
        and block.as_int() > 0
        and node.op_type == "DequantizeLinear"
        and dtype is not None
        and dtype not in version.block_types
    ):
        kinds = " or ".join(sorted(version.block_types))
        return (
            f"one scale per block is supported for {kinds} only, not for {dtype}",
            f"calibrate with {option('weights')} int4, or without",
        )
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is not None and zero.const_value is not None and zero.const_value.numpy().any():
        return "its zero point is not 0", "calibrate again: this project writes symmetric scales"
    return None


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)
