"""Runs a graph segment by segment, so that each matrix is rounded on activations of the already rounded graph.

The graph is cut before each matrix multiplication that reads a new activation. A segment is run once for each set of
inputs, with the weights that were rounded so far, so the whole pass costs one run of the graph. Between two segments,
only the tensors that later segments read are kept, and only the weights of one segment are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from blip2edge.calibration.activations.probe import open_probe
from blip2edge.calibration.initializers import initializer_tensor
from blip2edge.calibration.targets import Product
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

Array = NDArray[Any]


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a graph that are run separately, with their inputs and outputs.

    Attributes:
        nodes: The nodes, in order.
        inputs: Names of the segment's inputs: outputs of earlier segments, or inputs of the graph.
        outputs: Names of the tensors that later segments read.
        constants: Names of the initializers that the nodes read.
        activation: Name of the activation that the matrix multiplications after this segment read.
    """

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: tuple[str, ...]
    activation: str


def cut_graph(graph: onnx.GraphProto, products: Sequence[Product]) -> list[Segment]:
    """Cuts a graph into segments at the matrix multiplications whose weights are rounded.

    Each activation that these MatMuls read gives one cut, before the first MatMul that reads it. The segment before a
    cut computes the activation; the weights of the MatMuls that read it are then rounded with it. The nodes after the
    last cut are in no segment, because no rounding needs their outputs.

    Args:
        graph: The graph, its nodes in the order in which they run.
        products: The matrix multiplications whose weights are rounded.

    Returns:
        The segments, in the order in which they run.
    """
    wanted = {product.weight: product.activation for product in products}
    seen: set[str] = set()
    cuts: list[tuple[int, str]] = []
    last_read: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        last_read.update(dict.fromkeys(node.input, index))
        activation = wanted.get(node.input[1]) if node.op_type == "MatMul" else None
        if activation is not None and activation not in seen:
            seen.add(activation)
            cuts.append((index, activation))
    constants = {tensor.name for tensor in graph.initializer}
    known = {value.name for value in graph.input}
    segments, start = [], 0
    for end, activation in cuts:
        nodes = tuple(graph.node[start:end])
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input}
        outputs = tuple(sorted(name for name in made if last_read.get(name, -1) >= end))
        inputs, fixed = tuple(sorted(read & known)), tuple(sorted(read & constants))
        segments.append(Segment(nodes, inputs, outputs, fixed, activation))
        known |= made
        start = end
    return segments


class SegmentRunner:
    """Runs the segments of a graph over several sets of inputs, in order.

    Args:
        model: The graph. It must not be changed until the last segment has run.
        products: The matrix multiplications before which the graph is cut.
        feeds: Sets of graph inputs, each by input name.
        threads: CPU threads; None for all cores.
    """

    def __init__(
        self,
        model: ir.Model,
        products: Sequence[Product],
        feeds: Sequence[Mapping[str, Array]],
        threads: int | None = None,
    ) -> None:
        self._initializers = {name: initializer_tensor(value) for name, value in model.graph.initializers.items()}
        proto = ir.to_proto(model)
        self._opsets = list(proto.opset_import)
        self._segments = cut_graph(proto.graph, products)
        self._threads = threads
        self._live = [dict(feed) for feed in feeds]
        self._last: dict[str, int] = {}
        for at, segment in enumerate(self._segments):
            self._last.update(dict.fromkeys((*segment.inputs, *segment.constants, segment.activation), at))
        self._changed: dict[str, Array] = {}

    def __iter__(self) -> Iterator[tuple[str, Iterator[Array]]]:
        """Yields each activation's name with an iterator over its values, one array per set of inputs.

        The caller must read all values before it continues with the next activation, and may call :meth:`replace`
        before that.
        """
        for at, segment in enumerate(self._segments):
            yield segment.activation, self._advance(segment)
            for live in (*self._live, self._changed):
                for name in [name for name in live if self._last.get(name, -1) <= at]:
                    del live[name]

    def replace(self, weight: str, values: Array) -> None:
        """Replaces the values of the initializer ``weight`` in all segments that have not run yet."""
        self._changed[weight] = values

    def _advance(self, segment: Segment) -> Iterator[Array]:
        session = self._session(segment) if segment.outputs else None
        for live in self._live:
            if session is not None:
                given = {name: live[name] for name in segment.inputs}
                live.update(session.run(given))
            yield live[segment.activation]

    def _session(self, segment: Segment) -> OnnxRuntimeSession:
        tensors = [numpy_helper.from_array(self._value(name), name) for name in segment.constants]
        first = self._live[0]
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(first[name].dtype), None)
            for name in segment.inputs
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in segment.outputs]
        graph = helper.make_graph(list(segment.nodes), "segment", inputs, outputs, tensors)
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=10)
        return open_probe(model, threads=self._threads)

    def _value(self, name: str) -> Array:
        changed = self._changed.get(name)
        if changed is not None:
            return changed
        # ascontiguousarray would give a scalar an axis
        return np.asarray(self._initializers[name].numpy(), order="C")
