"""Finds the attention to the picture in a bridge's graph: the softmax whose keys are computed from the patches."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BundleError

KEY = re.compile(r"^(?P<path>.*)\.key\.(weight|bias)\b")
"""Finds the names of an attention's key weights and key biases; the names are the same in every precision.

An example: ``bridge.qformer.layers.0.cross_attention.key.weight.T``.
"""

PLACES = (
    re.compile(r"\.qformer\.layers\.(?P<layer>\d+)\.cross_attention$"),  # Q-Former, in a bridge or a matcher
    re.compile(r"^bridge\.layers\.(?P<layer>\d+)\.attention$"),  # perceiver: keys of the patches, then of the queries
    re.compile(r"^bridge\.attention$"),  # attention pool: one layer
)
"""Paths of the modules in which queries attend to the picture."""


@dataclass(frozen=True)
class AttentionLayer:
    """A layer of the bridge in which the queries attend to the picture.

    Attributes:
        layer: Number of the layer in the bridge, from 0.
        tensor: Name of the softmax's output in the graph, ``[B, H, Q, K]``: the first keys are the picture's
            embeddings. In a perceiver, the keys of the queries follow.
    """

    layer: int
    tensor: str


@dataclass(frozen=True)
class LayerWeights:
    """The attention weights of one layer for one picture, averaged over the heads.

    Attributes:
        layer: Number of the layer in the bridge, from 0.
        patches: float64 ``[Q, rows, columns]``, the weight of each patch.
        before: float64 ``[Q]``, the sum of the weights of the tokens before the patches: class token, registers.
        queries: float64 ``[Q]``, the sum of the weights of all queries (perceiver), else 0. For each query, the
            weights of `patches`, `before` and `queries` add up to 1.
    """

    layer: int
    patches: NDArray[np.float64]
    before: NDArray[np.float64]
    queries: NDArray[np.float64]

    @property
    def spread(self) -> NDArray[np.float64]:
        """Number of patches that each query attends to, float64 ``[Q]``.

        It is the exponential of the entropy of the weights over the patches. The number is 1 if all the weight is on
        one patch. If all patches have the same weight, it is the number of patches.
        """
        flat = self.patches.reshape(len(self.patches), -1)
        shares = flat / np.maximum(flat.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
        logs = np.log(np.where(shares > 0, shares, 1.0))
        spread: NDArray[np.float64] = np.exp(-(shares * logs).sum(axis=1))
        return spread


def attention_layers(graph: ir.Model) -> list[AttentionLayer]:
    """Finds the layers of a bridge's graph in which queries attend to the picture, in the order of the layers.

    A layer is recognized by the name of the weights that compute its keys. The exporter takes these names from the
    modules of the model, and they are the same in fp16, INT8 and INT4 graphs.
    """
    found: list[AttentionLayer] = []
    for node in graph.graph:
        if node.op_type != "Softmax":
            continue
        layer = _layer_of(_key_module(node))
        if layer is not None:
            found.append(AttentionLayer(layer, str(node.outputs[0].name)))
    return sorted(found, key=lambda one: one.layer)


def layer_weights(layer: AttentionLayer, weights: Array, embeds: int, rows: int, columns: int) -> LayerWeights:
    """Averages the attention weights of one picture over the heads, and splits them by their keys.

    The keys are the patches, the tokens before the patches, and (in a perceiver) the queries.

    Args:
        layer: The layer.
        weights: The softmax's output ``[1, H, Q, K]``, K at least ``embeds``.
        embeds: P, number of the picture's embeddings; the patches are the last ``rows * columns`` of them.
        rows: Rows of patches.
        columns: Columns of patches.
    """
    mean = np.asarray(weights[0], np.float64).mean(axis=0)  # [Q, K]
    first = embeds - rows * columns
    return LayerWeights(
        layer.layer,
        mean[:, first:embeds].reshape(len(mean), rows, columns),
        mean[:, :first].sum(axis=1),
        mean[:, embeds:].sum(axis=1),
    )


def check_lengths(layers: Sequence[AttentionLayer], outputs: Sequence[Array], embeds: int) -> None:
    """Checks that the attention weights have a column for each of the picture's embeddings.

    Raises:
        BundleError: There are fewer columns than embeddings.
    """
    for layer, weights in zip(layers, outputs, strict=True):
        if weights.ndim != 4 or weights.shape[-1] < embeds:
            raise BundleError(
                f"layer {layer.layer} of the bridge: expected attention weights for {embeds} embeddings of the "
                f"picture, got the shape {list(weights.shape)}",
                "export the checkpoint again",
            )


def _key_module(softmax: ir.Node) -> str | None:
    """Finds the module that makes the keys of an attention, from the attention's softmax node.

    Returns the module's path; None if no weight of the keys has a known name.
    """
    scores = next((node for node in _before(softmax.inputs[0]) if node.op_type == "MatMul"), None)
    if scores is None:
        return None
    key = scores.inputs[1]
    for name in _initializers(key):
        match = KEY.match(name)
        if match is not None:
            return match["path"]
    return None


def _layer_of(path: str | None) -> int | None:
    """Returns the number of the layer in a module's path; None if this module's attention is not to the picture."""
    for place in PLACES:
        match = place.search(path or "")
        if match is not None:
            return int(match.groupdict().get("layer") or 0)
    return None


def _before(value: ir.Value | None) -> Iterator[ir.Node]:
    """Yields the nodes that compute a value, directly or through other nodes; the nearest node is first."""
    waiting, seen = deque([value]), set()
    while waiting:
        now = waiting.popleft()
        node = now.producer() if now is not None else None
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        waiting.extend(node.inputs)


def _initializers(value: ir.Value | None) -> Iterator[str]:
    """Yields the names of the initializers and inputs that a value is computed from; the nearest is first."""
    if value is not None and value.producer() is None:
        yield str(value.name)
    for node in _before(value):
        for read in node.inputs:
            if read is not None and read.producer() is None and read.name:
                yield read.name
