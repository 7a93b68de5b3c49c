"""A graph run piece by piece: what one matrix meets is known before the next piece is computed.

A graph is cut in front of every product that meets new activations. A piece is run once for each set of inputs, with
the weights as they are by then, so that a matrix is rounded on what the rounded matrices before it give; the whole
pass costs one run of the graph. Between two pieces only the tensors that later pieces read are kept, and memory holds
one piece's weights.
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

from blip2edge.calibration.activations.observe import open_probe
from blip2edge.calibration.targets import Product, held

Array = NDArray[Any]


@dataclass(frozen=True)
class Piece:
    """Some nodes of a graph, and what goes in and out.

    Attributes:
        nodes: In order.
        takes: Tensors of earlier pieces, or the graph's inputs.
        gives: Tensors for later ones.
        constants: Initializers that it reads.
        activation: What the products behind it meet.
    """

    nodes: tuple[onnx.NodeProto, ...]
    takes: tuple[str, ...]
    gives: tuple[str, ...]
    constants: tuple[str, ...]
    activation: str


def pieces_of(graph: onnx.GraphProto, products: Sequence[Product]) -> list[Piece]:
    """Cuts a graph in front of the first product that meets each activation.

    What lies behind the last cut is no piece: nothing there is met by a matrix.
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
    pieces, start = [], 0
    for end, activation in cuts:
        nodes = tuple(graph.node[start:end])
        made = {name for node in nodes for name in node.output}
        read = {name for node in nodes for name in node.input}
        gives = tuple(sorted(name for name in made if last_read.get(name, -1) >= end))
        takes, fixed = tuple(sorted(read & known)), tuple(sorted(read & constants))
        pieces.append(Piece(nodes, takes, gives, fixed, activation))
        known |= made
        start = end
    return pieces


class PieceRunner:
    """Runs the pieces of a graph over several sets of inputs, in order.

    Args:
        model: The graph; not changed, and to be left unchanged until the last piece has run.
        products: What it is cut in front of.
        feeds: Inputs by name.
        threads: CPU threads.
    """

    def __init__(
        self,
        model: ir.Model,
        products: Sequence[Product],
        feeds: Sequence[Mapping[str, Array]],
        threads: int | None = None,
    ) -> None:
        self._initializers = {name: held(value) for name, value in model.graph.initializers.items()}
        proto = ir.to_proto(model)
        self._opsets = list(proto.opset_import)
        self._pieces = pieces_of(proto.graph, products)
        self._threads = threads
        self._live = [dict(feed) for feed in feeds]
        self._last: dict[str, int] = {}
        for at, piece in enumerate(self._pieces):
            self._last.update(dict.fromkeys((*piece.takes, *piece.constants, piece.activation), at))
        self._changed: dict[str, Array] = {}

    def __iter__(self) -> Iterator[tuple[str, Iterator[Array]]]:
        """Piece by piece, an activation's name and its values, an array a set of inputs.

        Whoever reads takes all values, and replaces what it likes, before the next piece.
        """
        for at, piece in enumerate(self._pieces):
            yield piece.activation, self._advance(piece)
            for live in (*self._live, self._changed):
                for name in [name for name in live if self._last.get(name, -1) <= at]:
                    del live[name]

    def replace(self, weight: str, values: Array) -> None:
        """From the next piece on, an initializer has other values."""
        self._changed[weight] = values

    def _advance(self, piece: Piece) -> Iterator[Array]:
        session = self._session(piece) if piece.gives else None
        for live in self._live:
            if session is not None:
                given = {name: live[name] for name in piece.takes}
                live.update(zip(piece.gives, session.run(list(piece.gives), given), strict=True))
            yield live[piece.activation]

    def _session(self, piece: Piece) -> Any:
        tensors = [numpy_helper.from_array(self._value(name), name) for name in piece.constants]
        first = self._live[0]
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(first[name].dtype), None)
            for name in piece.takes
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in piece.gives]
        graph = helper.make_graph(list(piece.nodes), "piece", inputs, outputs, tensors)
        model = helper.make_model(graph, opset_imports=self._opsets, ir_version=10)
        return open_probe(model, threads=self._threads)

    def _value(self, name: str) -> Array:
        changed = self._changed.get(name)
        if changed is not None:
            return changed
        # not ascontiguousarray, which gives a scalar an axis
        return np.asarray(self._initializers[name].numpy(), order="C")
