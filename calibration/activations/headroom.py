"""Would this graph overflow in FP16: the largest value of every tensor on real pictures.

A CPU computes fp16 graphs in fp32, so running one there shows no overflow; the ranges do. Each tensor gets a small
branch inside the graph that gives its largest magnitude, so that no tensor leaves it.
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
from blip2edge.calibration.activations.observe import open_probe
from blip2edge.calibration.batches import Feeds
from blip2edge.progress import counted

LARGEST = 65504.0  # of fp16
SPARE = 4.0
"""A tensor whose headroom is less is named as one to keep in FP32: two bits for what the pictures did not show."""

RUNS = 32
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
ON_THE_WAY = ("Add", "Cast", "Expand", "Unsqueeze", "Where")
"""What may lie between a score or a mask and its softmax, where minus infinity is as good as any large negative."""
PREFIX = "headroom/"


@dataclass(frozen=True)
class TensorReach:
    """A tensor over all runs.

    What only a softmax reads counts with its positive values: a masked score may overflow downwards.

    Attributes:
        tensor: Its name.
        op_type: Of the node that makes it.
        node: That node's name.
        reads: Initializers that the node reads: they say where in the model it is.
        dtype: The type that the graph has it in.
        largest: Largest |x|, or largest x before a softmax.
    """

    tensor: str
    op_type: str
    node: str
    reads: tuple[str, ...]
    dtype: str
    largest: float

    @property
    def headroom(self) -> float:
        """65504 over the largest value; infinite for zeros."""
        return LARGEST / self.largest if self.largest > 0 else np.inf

    @property
    def reason(self) -> str:
        """Why it should stay in FP32; empty where it need not."""
        if self.headroom >= SPARE:
            return ""
        return f"reaches {self.largest:.4g} on these pictures, {self.headroom:.2g} times below 65504"


def sweep(
    graph: ir.Model,
    record: GraphRecord,
    feeds: Feeds,
    weights: Path,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[TensorReach]:
    """Runs a graph on some of what it is given and notes how far each floating tensor reaches.

    Args:
        graph: The graph, in fp32 or fp16.
        record: Its entry in the manifest.
        feeds: The inputs; :data:`RUNS` of them are run.
        weights: The directory of its external data.
        threads: CPU threads.
        progress: Called with runs done and runs in all.

    Returns:
        The tensors, least headroom first.
    """
    found = {
        str(output.name): node
        for node in graph.graph
        for output in node.outputs
        if output.name and output.dtype in FLOATS and node.op_type not in ("Constant", "Shape")
    }
    scores = _scores(graph)
    proto = _with_reach(graph, {name: name in scores for name in found})
    size = sum((weights / file).stat().st_size for file in record.data_files)
    session = open_probe(proto, weights, size, threads)
    names = [PREFIX + name for name in found]
    largest = np.zeros(len(names))
    total = min(RUNS, feeds.count(record.spec.name))
    for inputs in counted(feeds.runs(record.spec.name, RUNS), total, progress):
        values = [float(value) if value.size else 0.0 for value in session.run(names, inputs)]
        largest = np.maximum(largest, values)
    reaches = [
        TensorReach(name, node.op_type, str(node.name), _reads(node), _dtype(node, name), float(reach))
        for (name, node), reach in zip(found.items(), largest, strict=True)
    ]
    return sorted(reaches, key=lambda reach: reach.headroom)


def to_json(reaches: list[TensorReach]) -> dict[str, Any]:
    """The report's object.

    Returns:
        ``lowest`` headroom, ``keep_fp32`` (tensors with less than :data:`SPARE`, with the reason), and ``tensors``:
        every tensor's name, kind of node, largest value and headroom.
    """
    keep = [
        {
            "tensor": reach.tensor,
            "node": reach.node,
            "op_type": reach.op_type,
            "reads": list(reach.reads),
            "largest": reach.largest,
            "reason": reach.reason,
        }
        for reach in reaches
        if reach.reason
    ]
    return {
        "limit": LARGEST,
        "lowest": reaches[0].headroom if reaches else None,
        "keep_fp32": keep,
        "tensors": [
            {
                "tensor": reach.tensor,
                "op_type": reach.op_type,
                "dtype": reach.dtype,
                "largest": reach.largest,
                "headroom": None if np.isinf(reach.headroom) else reach.headroom,
            }
            for reach in reaches
        ],
    }


def _scores(graph: ir.Model) -> set[str]:
    """Tensors that nothing but a softmax reads in the end."""
    found: set[str] = set()
    outputs = {value.name for value in graph.graph.outputs}
    for node in reversed(graph.graph):
        for value in node.outputs:
            users = [user for user, _ in value.uses()]
            ends = all(
                user.op_type == "Softmax"
                or (user.op_type in ON_THE_WAY and all(output.name in found for output in user.outputs))
                for user in users
            )
            if users and ends and value.name not in outputs:
                found.add(str(value.name))
    return found


def _with_reach(graph: ir.Model, names: Mapping[str, bool]) -> onnx.ModelProto:
    """The graph with the largest ``|x|`` of the tensors as its outputs, or the largest ``x`` where that is asked."""
    proto = ir.to_proto(graph)
    outputs = []
    for name, signed in names.items():
        wide, size, reach = f"{PREFIX}wide/{name}", f"{PREFIX}size/{name}", PREFIX + name
        proto.graph.node.extend(
            [
                helper.make_node("Cast", [name], [wide], to=TensorProto.FLOAT),
                helper.make_node("Relu" if signed else "Abs", [wide], [size]),
                helper.make_node("ReduceMax", [size], [reach], keepdims=0),
            ]
        )
        outputs.append(helper.make_tensor_value_info(reach, TensorProto.FLOAT, []))
    del proto.graph.output[:]
    proto.graph.output.extend(outputs)
    return proto


def _reads(node: ir.Node) -> tuple[str, ...]:
    return tuple(
        str(value.name) for value in node.inputs if value is not None and value.const_value is not None
    )


def _dtype(node: ir.Node, name: str) -> str:
    kinds: Mapping[str, ir.DataType | None] = {str(output.name): output.dtype for output in node.outputs}
    kind = kinds[name]
    return kind.name if kind is not None else ""
