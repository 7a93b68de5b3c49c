"""Stores the weights of a graph in FP16, and casts them back to FP32: half the bytes, the same FP32 arithmetic.

    weight FP16 [K, N] -> Cast -> weight FP32 -> MatMul

Matrix multiplications are computed in FP32, from rounded weights. ``optimize`` skips such graphs, so they can be slower
than the optimized copies of FP32 graphs (measured values: docs/precision.md). This format is for a small bundle on a
CPU; for FP16 arithmetic on a GPU, export with ``--precision fp16``.
"""

from __future__ import annotations

import time

import numpy as np
import onnx_ir as ir

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import FP16
from blip2edge.calibration.initializers import add_initializer, initializer_tensor
from blip2edge.calibration.results import StagedGraph
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.weight_only import copy_others
from blip2edge.graph_files import load_graph

LARGEST = float(np.finfo(np.float16).max)
TOO_LARGE = "a weight is larger than the largest FP16 number"


def store_half(context: CalibrationContext, record: GraphRecord) -> StagedGraph:
    """Writes one graph with the weights of its matrix multiplications in FP16 to the staging directory.

    The outputs of the new graph are compared with the original outputs.

    Args:
        context: The calibration.
        record: The graph's entry in the manifest of the original bundle.
    """
    start = time.perf_counter()
    model = load_graph(context.parent.file(record.spec.file))
    weights = model.graph.initializers
    names = list(dict.fromkeys(product.weight for product in find_targets(model).products))
    wide = [name for name in names if weights[name].dtype == ir.DataType.FLOAT]
    kept: dict[str, str] = {}
    done: list[str] = []
    path = context.staging / f"{record.spec.name}.onnx.data"
    with DataFile(path) as file:
        for name in wide:
            array = np.asarray(initializer_tensor(weights[name]).numpy())
            if np.abs(array).max(initial=0.0) > LARGEST:
                kept[name] = TOO_LARGE
            else:
                _replace_by_cast(model.graph, name, file, array)
                done.append(name)
        stored = {f"{name}.half" for name in done}
        copy_others(model, file, stored)
    return context.stage(
        model, record, FP16, {path.name: file.record}, start=start, products=len(done), kept_float=kept
    )


def _replace_by_cast(graph: ir.Graph, name: str, file: DataFile, array: Array) -> None:
    """Replaces an initializer by its FP16 copy and a Cast node."""
    value = graph.initializers[name]
    users = list(value.uses())
    half = add_initializer(graph, file.add(f"{name}.half", array.astype(np.float16)))
    node = ir.node("Cast", [half], attributes={"to": ir.DataType.FLOAT}, name=f"{name}.cast")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{name}.float", value.shape, value.type
    using = {id(user) for user, _ in users}
    graph.insert_before(next(one for one in graph if id(one) in using), node)  # uses() has no order
    for user, index in users:
        user.replace_input_with(index, output)
    del graph.initializers[name]
