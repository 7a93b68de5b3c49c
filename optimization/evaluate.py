"""Computes values inside a graph from the graph's inputs, with ONNX Runtime.

Passes identify a mask or a table of rotary angles by its values, because exporters compute masks and tables with
different nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime

from blip2edge.optimization.graph import Array, constant, subgraph

LARGEST = 1 << 16  # elements of an initializer that is computed with; weights are larger
IR_VERSION = 10


def evaluate_graph(model: ir.Model, targets: Sequence[ir.Value], given: Mapping[str, Array]) -> list[Array] | None:
    """Computes the arrays of some values inside a graph.

    Args:
        model: The graph; it is not changed.
        targets: The values to compute.
        given: Arrays of the graph inputs that the values depend on, by name.

    Returns:
        The array of each target; None if a target depends on an input that is not given, or on weights.
    """
    inputs = {str(value.name): value for value in model.graph.inputs if value.name in given}
    needed: set[ir.Node] = set()
    for target in targets:
        found = subgraph(model, target, inputs)
        if found is None:
            return None
        needed.update(found)
    nodes = [node for node in model.graph if node in needed]
    held: dict[str, Array] = {}
    for source in (source for node in nodes for source in node.inputs if source is not None):
        if source.const_value is not None and source.const_value.size > LARGEST:
            return None
        array = constant(source)
        if array is not None:
            held[str(source.name)] = array
    read = {str(source.name) for node in nodes for source in node.inputs if source is not None} & set(inputs)
    graph = onnx.helper.make_graph(
        [ir.to_proto(node) for node in nodes],
        "part",
        [_info(name, given[name]) for name in sorted(read)],
        [onnx.ValueInfoProto(name=str(target.name)) for target in targets],
        [onnx.numpy_helper.from_array(array, name) for name, array in held.items()],
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found_values = session.run([str(target.name) for target in targets], {name: given[name] for name in read})
    return [np.asarray(array) for array in found_values]


def _info(name: str, array: Array) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, array.shape)
