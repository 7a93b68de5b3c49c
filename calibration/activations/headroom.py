"""Measures the FP16 headroom of each tensor of a graph: 65504, the largest FP16 number, divided by the largest value.

A CPU computes fp16 graphs in fp32, so that a run on a CPU does not overflow. The largest values show which tensors
would overflow in fp16. Nodes that are added to the graph compute the largest values, so that a run outputs one number
per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from blip2edge.bundle.manifest import GraphRecord
from blip2edge.calibration.activations.probe import open_probe
from blip2edge.calibration.batches import Feeds
from blip2edge.progress import counted

FP16_MAX = 65504.0
MIN_HEADROOM = 4.0
"""A tensor with less headroom should be kept in FP32: two bits are reserved for pictures that were not measured."""

RUNS = 32  # recorded inputs that are run
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
PASS_TO_SOFTMAX = ("Add", "Cast", "Expand", "Unsqueeze", "Where")
"""Nodes allowed between a score or a mask and its softmax. There, minus infinity has the same effect as any large
negative number."""
PREFIX = "headroom/"


@dataclass(frozen=True)
class TensorRange:
    """The largest value of a tensor over all runs.

    If only a softmax reads the tensor, only positive values count: a masked score may become minus infinity.

    Attributes:
        tensor: The tensor's name.
        op_type: Operator of the node that computes the tensor.
        node: Name of this node.
        reads: Names of the initializers that the node reads; they show the node's place in the model.
        dtype: The tensor's type in the graph.
        largest: Largest |x|; for a tensor that only a softmax reads, the largest x.
    """

    tensor: str
    op_type: str
    node: str
    reads: tuple[str, ...]
    dtype: str
    largest: float

    @property
    def headroom(self) -> float:
        """65504 (the largest FP16 number) divided by the tensor's largest value; infinite if all values are zero."""
        return FP16_MAX / self.largest if self.largest > 0 else np.inf

    @property
    def reason(self) -> str:
        """The reason why the tensor should be kept in FP32; empty if FP16 is enough."""
        if self.headroom >= MIN_HEADROOM:
            return ""
        return f"reaches {self.largest:.4g} on these pictures; 65504 is {self.headroom:.2g} times that"


def measure_headroom(
    graph: ir.Model,
    record: GraphRecord,
    feeds: Feeds,
    weights: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TensorRange]:
    """Runs a graph on some recorded inputs and measures the largest value of each floating tensor.

    Args:
        graph: The graph, in fp32 or fp16.
        record: The graph's record in the manifest.
        feeds: The recorded inputs; at most :data:`RUNS` of them are run.
        weights: The directory of the graph's external data.
        threads: CPU threads; None for all cores.
        progress: Called with runs done and runs in all.

    Returns:
        The tensors, the one with the least headroom first.
    """
    found = {
        str(output.name): node
        for node in graph.graph
        for output in node.outputs
        if output.name and output.dtype in FLOATS and node.op_type not in ("Constant", "Shape")
    }
    scores = _scores(graph)
    proto = _with_largest(graph, {name: name in scores for name in found})
    size = sum((weights / file).stat().st_size for file in record.data_files)
    session = open_probe(proto, weights, size, threads)
    names = [PREFIX + name for name in found]
    largest = np.zeros(len(names))
    total = min(RUNS, feeds.count(record.spec.name))
    for inputs in counted(feeds.runs(record.spec.name, RUNS), total, progress):
        values = [float(value) if value.size else 0.0 for value in session.run(inputs, names).values()]
        largest = np.maximum(largest, values)
    ranges = [
        TensorRange(name, node.op_type, str(node.name), _reads(node), _dtype(node, name), float(value))
        for (name, node), value in zip(found.items(), largest, strict=True)
    ]
    return sorted(ranges, key=lambda tensor: tensor.headroom)


def headroom_json(ranges: list[TensorRange]) -> dict[str, Any]:
    """Makes the ``headroom`` object of a graph for the report.

    Returns:
        ``limit`` (65504), the ``lowest`` headroom, ``keep_fp32`` (tensors with less than :data:`MIN_HEADROOM`, with
        the reason), and ``tensors``: every tensor's name, operator, type, largest value and headroom.
    """
    keep = [
        {
            "tensor": tensor.tensor,
            "node": tensor.node,
            "op_type": tensor.op_type,
            "reads": list(tensor.reads),
            "largest": tensor.largest,
            "reason": tensor.reason,
        }
        for tensor in ranges
        if tensor.reason
    ]
    return {
        "limit": FP16_MAX,
        "lowest": ranges[0].headroom if ranges else None,
        "keep_fp32": keep,
        "tensors": [
            {
                "tensor": tensor.tensor,
                "op_type": tensor.op_type,
                "dtype": tensor.dtype,
                "largest": tensor.largest,
                "headroom": None if np.isinf(tensor.headroom) else tensor.headroom,
            }
            for tensor in ranges
        ],
    }


def _scores(graph: ir.Model) -> set[str]:
    """Returns the names of the tensors that only Softmax nodes read, directly or through :data:`PASS_TO_SOFTMAX`."""
    found: set[str] = set()
    outputs = {value.name for value in graph.graph.outputs}
    for node in reversed(graph.graph):
        for value in node.outputs:
            users = [user for user, _ in value.uses()]
            ends = all(
                user.op_type == "Softmax"
                or (user.op_type in PASS_TO_SOFTMAX and all(output.name in found for output in user.outputs))
                for user in users
            )
            if users and ends and value.name not in outputs:
                found.add(str(value.name))
    return found


def _with_largest(graph: ir.Model, tensors: Mapping[str, bool]) -> onnx.ModelProto:
    """Returns a copy of the graph whose only outputs are the largest values of some tensors.

    Args:
        graph: The graph; not changed.
        tensors: Names of the tensors. If the value of a name is true, the output is the largest positive x (0 if there
            is none); otherwise, the largest ``|x|``.
    """
    proto = ir.to_proto(graph)
    outputs = []
    for name, signed in tensors.items():
        wide, size, largest = f"{PREFIX}wide/{name}", f"{PREFIX}size/{name}", PREFIX + name
        proto.graph.node.extend(
            [
                helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT),
                helper.make_node("Relu" if signed else "Abs", [wide], [size]),
                helper.make_node("ReduceMax", [size], [largest], keepdims=0),
            ]
        )
        outputs.append(helper.make_tensor_value_info(largest, TensorProto.FLOAT, []))
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    return proto


def _reads(node: ir.Node) -> tuple[str, ...]:
    return tuple(str(value.name) for value in node.inputs if value is not None and value.const_value is not None)


def _dtype(node: ir.Node, name: str) -> str:
    kinds: Mapping[str, ir.DataType | None] = {str(output.name): output.dtype for output in node.outputs}
    kind = kinds[name]
    return kind.name if kind is not None else ""
