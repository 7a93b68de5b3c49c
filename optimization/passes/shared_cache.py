"""Rewrites a decoder such that its KV cache is written in place, by ONNX Runtime's GroupQueryAttention.

The exported (not optimized) decoder concatenates past and new keys at every step, and has a mask as input. In the new
graph each row of the cache has C slots, the row's text begins in slot 0, and ``seqlens_k`` holds its length:

    inputs_embeds        [B, S, D]     shorter rows of a prefill are padded on the right; the padding is not attended to
    position_ids         [B, S]        only for models with learned positions (OPT)
    seqlens_k            int32 [B]     length of each row after this run, minus 1
    total_sequence_length int32 []     length of the longest row after this run
    logits_indices       [B, K]
    past_key_values.{i}.{key,value}    [B, Hkv, C, d], the same buffers as present.{i}.{key,value}

If the cache is not empty, several new tokens must be run for each row separately: the kernel does not support a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.bundle.schema import CacheSpec
from blip2edge.optimization.evaluate import evaluate_graph
from blip2edge.optimization.graph import (
    Array,
    clean,
    dims,
    initializer,
    insert,
    operands,
    permutation,
    producer,
    replace,
    users,
)
from blip2edge.optimization.passes.attention import Core, find_core

MASKED = -1.0e4
"""A key is masked if the bias that is added to its score is below this number."""

PROBED = 3
"""Number of new tokens in the run with which the mask is examined."""


ROTARY_WIDTH = 16
"""The kernel applies rotary positions only if the width of a head is a multiple of this number."""


@dataclass(frozen=True)
class Layer:
    """The values of the attention of one decoder layer.

    Attributes:
        core: Inputs of the attention computation (scores, softmax, weighted sum), and the last node of it.
        query: Queries ``[B, S, H d]``, before they are split into heads and rotated.
        key: Keys ``[B, S, Hkv d]``, before they are split into heads and rotated.
        value: Values ``[B, S, Hkv d]``, before they are split into heads.
        rotation: Cosines and sines of rotary positions, ``[B, 1, S, d / 2]``; None for a model without rotary
            positions.
    """

    core: Core
    query: ir.Value
    key: ir.Value
    value: ir.Value
    rotation: tuple[ir.Value, ir.Value] | None


def share_cache(model: ir.Model, cache: CacheSpec, max_positions: int) -> bool:
    """Rewrites a causal decoder without cross-attention so that the KV cache is written in place.

    Args:
        model: The exported decoder, after ``optimization.graph.prepare``.
        cache: The decoder's KV cache.
        max_positions: The longest context in tokens: length of the tables of rotary angles.

    Returns:
        Whether the decoder was rewritten; any other decoder is not changed.
    """
    graph = model.graph
    layers = [_layer(graph, index) for index in range(cache.num_layers)]
    found = [layer for layer in layers if layer is not None]
    if len(found) < len(layers) or "cross" in " ".join(value.name or "" for value in graph.inputs):
        return False
    window = _window(model, found, max_positions)
    if window is None:
        return False
    rotation = found[0].rotation
    if any(layer.rotation != rotation for layer in found):
        return False
    if rotation is not None and cache.head_dim % ROTARY_WIDTH:
        return False
    tables = _tables(model, rotation, max_positions)
    if rotation is not None and tables is None:
        return False
    lengths = _inputs(graph)
    for index, layer in enumerate(found):
        _rewrite(graph, index, layer, lengths, tables, window, cache)
    _finish(model)
    return True


def _layer(graph: ir.Graph, index: int) -> Layer | None:
    """Finds the attention of a layer by the names of the layer's cache; None if the nodes are not as expected."""
    outputs = {value.name: value for value in graph.outputs}
    key, value = outputs[f"present.{index}.key"], outputs[f"present.{index}.value"]
    news = [_appended(part) for part in (key, value)]
    softmax = _softmax_of(key)
    core = find_core(softmax) if softmax is not None else None
    if core is None or news[0] is None or news[1] is None or not _is_heads_of(core.value, value):
        return None
    turned_query, turned_key = _before_rotation(core.query), _before_rotation(news[0])
    if turned_query is None or turned_key is None or turned_query[1] != turned_key[1]:
        return None
    query, new_key, new_value = (_before_heads(part) for part in (turned_query[0], turned_key[0], news[1]))
    if query is None or new_key is None or new_value is None:
        return None
    return Layer(core, query, new_key, new_value, turned_query[1])


def _appended(present: ir.Value) -> ir.Value | None:
    """Returns the new keys or values that are appended to the past; None if ``present`` is computed in another way."""
    node = producer(present, "Concat")
    past = str(present.name).replace("present", "past_key_values")
    if node is None or len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[0].name != past:
        return None
    return node.inputs[1]


NEXT = {None: ("Unsqueeze", "Transpose"), "Unsqueeze": ("Transpose",), "Transpose": ("MatMul",), "MatMul": ("Add",),
        "Add": ("Softmax",)}  # fmt: skip
"""For each operator on the path from a layer's keys to the softmax: the operators that may come next.

``None`` stands for the keys, where the path begins.
"""


def _softmax_of(key: ir.Value) -> ir.Node | None:
    """Returns the softmax over the scores of a layer's keys; None if the path to it has other nodes than expected."""
    value, kind = key, None
    while True:
        node = next((user for user in users(value) if user.op_type in NEXT[kind]), None)
        if node is None or node.op_type == "Softmax":
            return node
        value, kind = node.outputs[0], node.op_type


def _is_heads_of(value: ir.Value, present: ir.Value) -> bool:
    """Returns whether ``value`` is the cache output ``present``, directly or after an Unsqueeze for grouped heads."""
    node = producer(value, "Unsqueeze")
    return (node.inputs[0] if node is not None else value) is present


def _before_rotation(value: ir.Value | None) -> tuple[ir.Value, tuple[ir.Value, ir.Value] | None] | None:
    """Finds the heads ``[B, H, S, d]`` before their rotation by rotary positions.

    Returns:
        The heads, and the cosines and sines of the rotation (None if the heads are not rotated); None if the nodes are
        not those of a rotation.
    """
    if value is None:
        return None
    grouped = producer(value, "Reshape")
    if grouped is not None and len(dims(value)) == 5 and grouped.inputs[0] is not None:
        value = grouped.inputs[0]
    joined = producer(value, "Concat")
    if joined is None:
        return value, None
    real, imaginary = operands(joined)
    minus, plus = producer(real, "Sub"), producer(imaginary, "Add")
    if minus is None or plus is None:
        return None
    factors = [[operands(node) for node in (_mul(part) for part in operands(half)) if node] for half in (minus, plus)]
    if any(len(half) != 2 for half in factors):
        return None
    (first, cos), (second, sin) = factors[0]
    halves = producer(first, "Split")
    same = factors[1][0] == (second, cos) and factors[1][1] == (first, sin)
    if halves is None or not same or list(halves.outputs) != [first, second] or halves.inputs[0] is None:
        return None
    return halves.inputs[0], (cos, sin)


def _mul(value: ir.Value) -> ir.Node | None:
    return producer(value, "Mul")


def _before_heads(value: ir.Value | None) -> ir.Value | None:
    """Returns ``[B, S, H d]`` before the split into heads ``[B, H, S, d]``.

    The result is None if other nodes are between split and transpose, such as the norms of Qwen3.
    """
    node = producer(value, "Transpose")
    if node is None or permutation(node) != [0, 2, 1, 3]:
        return None
    split = producer(node.inputs[0], "Reshape")
    return split.inputs[0] if split is not None else None


def _window(model: ir.Model, layers: Sequence[Layer], longest: int) -> int | None:
    """Returns how many slots each slot attends to; -1 for all slots before it.

    The bias of the scores is computed over the longest context, for a row without padding and a row with padding. Its
    values are examined, because exporters build masks from different nodes.

    Returns:
        The number of slots; None if the bias cannot be computed, or is not that of a causal mask.
    """
    biases = {_without_group(layer.core.bias) for layer in layers}
    bias = biases.pop()
    if biases or bias is None:
        return None
    padded = min(2, longest - PROBED - 1)
    mask = np.ones((2, longest), np.int64)
    mask[1, :padded] = 0
    given = {"attention_mask": mask}
    for value in model.graph.inputs:
        name = str(value.name)
        if name == "inputs_embeds" or name.startswith("past_key_values"):
            given[name] = np.zeros(_probe_shape(value, longest), np.float32)
    scores = evaluate_graph(model, [bias], given)
    if scores is None:
        return None
    attended = np.broadcast_to(scores[0], (2, 1, PROBED, longest))[:, 0] > MASKED
    for window in (longest, int(attended[0, -1].sum())):
        if np.array_equal(attended, _causal(mask, window)) and not scores[0][scores[0] > MASKED].any():
            return -1 if window == longest else window
    return None


def _probe_shape(value: ir.Value, longest: int) -> list[int]:
    """Returns the shape of a graph input in the test run: two rows, the longest context, :data:`PROBED` new tokens."""
    free = {"batch": 2, "steps": PROBED, "past": longest - PROBED}
    return [size if isinstance(size, int) else free[size] for size in dims(value)]


def _without_group(bias: ir.Value | None) -> ir.Value | None:
    """Returns the bias of the scores without the axis for grouped heads that an Unsqueeze node added."""
    node = producer(bias, "Unsqueeze")
    return node.inputs[0] if node is not None and len(dims(bias)) == 5 else bias


def _causal(mask: Array, window: int) -> Array:
    """Returns which of T slots the last S = :data:`PROBED` slots attend to in a causal mask: bool ``[B, S, T]``."""
    total = mask.shape[1]
    slots, queries = np.arange(total), np.arange(total - PROBED, total)[:, None]
    near = (slots <= queries) & (slots > queries - window)
    return np.asarray(near[None] & (mask[:, None, :] == 1))


def _tables(
    model: ir.Model, rotation: tuple[ir.Value, ir.Value] | None, longest: int
) -> tuple[ir.Value, ir.Value] | None:
    """Computes the tables of cosines and sines of every position, ``[longest, d / 2]``.

    Returns:
        The tables as initializers; None without rotary positions, or if the angles cannot be computed from the
        positions.
    """
    if rotation is None:
        return None
    found = evaluate_graph(model, list(rotation), {"position_ids": np.arange(longest)[None]})
    if found is None:
        return None
    cos, sin = (
        initializer(model.graph, f"rotary.{kind}", array.reshape(longest, -1))
        for kind, array in zip(("cos", "sin"), found, strict=True)
    )
    return cos, sin


def _inputs(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """Adds the two inputs that replace the mask, ``seqlens_k`` and ``total_sequence_length``; returns them."""
    lengths = ir.Value(name="seqlens_k", shape=ir.Shape(["batch"]), type=ir.TensorType(ir.DataType.INT32))
    total = ir.Value(name="total_sequence_length", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.extend([lengths, total])
    return lengths, total


def _rewrite(
    graph: ir.Graph,
    index: int,
    layer: Layer,
    lengths: tuple[ir.Value, ir.Value],
    tables: tuple[ir.Value, ir.Value] | None,
    window: int,
    cache: CacheSpec,
) -> None:
    """Replaces the attention of a layer by one GroupQueryAttention node."""
    named = {str(value.name): value for value in (*graph.inputs, *graph.outputs)}
    pasts = [named[f"past_key_values.{index}.{kind}"] for kind in ("key", "value")]
    presents = [named[f"present.{index}.{kind}"] for kind in ("key", "value")]
    for value in (*pasts, *presents):
        value.shape = ir.Shape(["batch", cache.num_heads, "capacity", cache.head_dim])
    merged = layer.core.last.outputs[0]
    heads = dims(layer.core.query)
    count = int(heads[1]) * (int(heads[2]) if len(heads) == 5 else 1)
    made = insert(
        layer.core.last,
        "GroupQueryAttention",
        [layer.query, layer.key, layer.value, *pasts, *lengths, *(tables or ())],
        [merged, *presents],
        num_heads=count,
        kv_num_heads=cache.num_heads,
        scale=layer.core.scale,
        do_rotary=int(tables is not None),
        local_window_size=window,
    )
    replace(merged, made[0])
    for old, new in zip(presents, made[1:], strict=True):
        replace(old, new)


def _finish(model: ir.Model) -> None:
    """Removes the mask, all nodes that only used the mask, and the positions if no node uses them any more."""
    model.graph.sort()
    clean(model)
    for name in ("attention_mask", "position_ids"):
        value = next(value for value in model.graph.inputs if value.name == name)
        if not value.uses():
            model.graph.inputs.remove(value)
