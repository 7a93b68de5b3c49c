"""Replaces operators that some versions of TensorRT do not support by equivalent operators.

``Clip`` and ``CumSum`` are documented for floating point only (onnx-tensorrt, docs/operators.md, 10.1 to 10.15), but
T5's graph computes key positions with both operators, in int64. ``Clip`` of integers is replaced by ``Max`` and
``Min``. ``CumSum`` of integers is computed in FP32, which is exact for a mask of up to 2^24 slots.
"""

from __future__ import annotations

import onnx_ir as ir

from blip2edge.engine.support import dtypes_of

INTEGERS = frozenset({"INT32", "INT64"})


def adapt(model: ir.Model) -> int:
    """Replaces ``Clip`` and ``CumSum`` of integers, which some TensorRT versions do not support; changes ``model``.

    Returns:
        The number of replaced nodes.
    """
    types = dtypes_of(model)
    changed = 0
    for node in list(model.graph):
        source = node.inputs[0] if node.inputs else None
        if source is None:
            continue
        dtype = source.dtype.name if source.dtype is not None else types.get(source, "")
        if dtype not in INTEGERS:
            continue
        if node.op_type == "Clip":
            _clip(model.graph, node, source)
        elif node.op_type == "CumSum":
            _count(model.graph, node, source, ir.DataType[dtype])
        else:
            continue
        changed += 1
    return changed


def _clip(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    value = source
    for index, operator in ((1, "Max"), (2, "Min")):
        bound = node.inputs[index] if index < len(node.inputs) else None
        if bound is not None:
            value = _insert(graph, node, operator, [value, bound], source.type)
    _replace(graph, node, value)


def _count(graph: ir.Graph, node: ir.Node, source: ir.Value, dtype: ir.DataType) -> None:
    floating = ir.TensorType(ir.DataType.FLOAT)
    value = _insert(graph, node, "Cast", [source], floating, {"to": int(ir.DataType.FLOAT)})
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    value = _insert(graph, node, "CumSum", [value, *node.inputs[1:]], floating, attributes)
    _replace(graph, node, _insert(graph, node, "Cast", [value], source.type, {"to": int(dtype)}))


def _insert(
    graph: ir.Graph,
    before: ir.Node,
    operator: str,
    inputs: list[ir.Value | None],
    kind: ir.TypeProtocol | None,
    attributes: dict[str, int] | None = None,
) -> ir.Value:
    node = ir.node(operator, inputs, attributes=attributes or {})
    node.outputs[0].name = f"{before.outputs[0].name}.{operator.lower()}.{len(list(graph))}"
    node.outputs[0].type, node.outputs[0].shape = kind, before.outputs[0].shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _replace(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    ir.convenience.replace_all_uses_with(node.outputs[0], value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
