"""Fuses attention over whole sequences (vision encoder, Q-Former, text encoders) into one node.

    q, k, v [B, S or T, H d] --split heads--> q k' + bias --softmax--> @ v --merge heads--> [B, S, H d]

becomes ONNX Runtime's MultiHeadAttention, which avoids storing the scores if it can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import (
    biased,
    constant,
    dims,
    initializer,
    insert,
    only_user,
    permutation,
    producer,
    replace,
    users,
    with_scalar,
)


@dataclass(frozen=True)
class Core:
    """The values and the last node of one attention in a graph.

    Attributes:
        query: Queries ``[B, H, S, d]``.
        key: Keys ``[B, H, T, d]``.
        value: Values ``[B, H, T, d]``.
        bias: Value that is added to the scores; None if nothing is added.
        scale: Factor on the scores.
        last: The node that merges the heads into ``[B, S, H d]``.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    bias: ir.Value | None
    scale: float
    last: ir.Node


def fuse_attention(model: ir.Model) -> int:
    """Fuses attention without a KV cache; returns the number of fused attentions."""
    return sum(_fuse(model.graph, node) for node in list(model.graph) if node.op_type == "Softmax")


def find_core(softmax: ir.Node) -> Core | None:
    """Finds the attention around a softmax node; None if the softmax does not belong to an attention."""
    scores = softmax.inputs[0]
    plus = producer(scores, "Add")
    bias = None
    if plus is not None:
        scores, bias = plus.inputs[0], plus.inputs[1]
        if producer(scores, "MatMul") is None:
            scores, bias = bias, scores
    product = producer(scores, "MatMul")
    out = only_user(softmax.outputs[0], "MatMul")
    if product is None or out is None or out.inputs[0] is not softmax.outputs[0]:
        return None
    query, key = product.inputs[0], _turned(product.inputs[1])
    scaled = with_scalar(producer(query, "Mul"))
    scale = 1.0
    if scaled is not None:
        query, scale = scaled
    merged = only_user(_behind_groups(out.outputs[0]), "Transpose")
    last = only_user(merged.outputs[0], "Reshape") if permutation(merged) == [0, 2, 1, 3] and merged else None
    if query is None or key is None or last is None or out.inputs[1] is None:
        return None
    return Core(query, key, out.inputs[1], bias, scale, last)


def _behind_groups(value: ir.Value) -> ir.Value:
    """Follows the reshape of grouped heads ``[B, G, H / G, S, d]``; returns the heads ``[B, H, S, d]``.

    A value without an axis for the groups is returned unchanged.
    """
    node = only_user(value, "Reshape")
    return node.outputs[0] if node is not None and len(dims(value)) == 5 else value


def _turned(value: ir.Value | None) -> ir.Value | None:
    """Finds the keys ``[B, H, T, d]`` before they are transposed to ``[B, H, d, T]`` for the scores.

    Returns:
        The input of the Transpose node that swaps the last two axes. If this node also moves the axis of the heads, its
        output ``value`` is returned unchanged. None if no Transpose node computes ``value``.
    """
    node = producer(value, "Transpose")
    if node is None:
        return None
    order = permutation(node)
    if order[:-2] == list(range(len(order) - 2)) and order[-2:] == [len(order) - 1, len(order) - 2]:
        return node.inputs[0]
    return value  # transposed from [B, T, H, d] in one step, which flat() recognises


def flat(value: ir.Value | None, heads_last: tuple[int, ...] = (0, 2, 1, 3)) -> ir.Value | None:
    """Finds the value ``[B, S, H d]`` before it is split into heads; None if other nodes are in between.

    Args:
        value: The value after the split, ``[B, H, S, d]`` for the default of ``heads_last``.
        heads_last: Permutation of the Transpose after the reshape.
    """
    node = producer(value, "Transpose")
    if node is None or permutation(node) not in (list(heads_last), [0, 2, 3, 1]):
        return None
    split = producer(node.inputs[0], "Reshape")
    return split.inputs[0] if split is not None and len(dims(split.outputs[0])) == 4 else None


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    core = find_core(softmax)
    if core is None:
        return False
    query, key, value = flat(core.query), flat(core.key), flat(core.value)
    shape, merged = dims(core.query), core.last.outputs[0]
    if query is None or key is None or value is None or len(shape) != 4 or not isinstance(shape[1], int):
        return False
    rows = {str(dims(part)[0]) for part in (query, key, value)}
    spread = _spread(graph, core, dims(query), dims(key))
    if len(rows) > 1 or not _fits(spread, dims(query), dims(key)):
        return False
    bias = None
    if all(_read_once(part) for part in (core.query, core.key, core.value)):
        (query, key, value), bias = _without_bias(graph, query, key, value)
    inputs = [query, key, value, bias, None, spread]
    made = insert(core.last, "MultiHeadAttention", inputs, [merged], num_heads=shape[1], scale=core.scale)
    replace(merged, made[0])
    return True


def _read_once(value: ir.Value) -> bool:
    """Returns whether a tensor has only one user after its split into heads, and only the split as user before it."""
    node = value.producer()
    split = node.inputs[0] if node is not None else None
    return len(users(value)) == 1 and split is not None and len(users(split)) == 1


def _spread(graph: ir.Graph, core: Core, query: list[int | str], key: list[int | str]) -> ir.Value | None:
    """Expands a bias ``[B, 1, 1, T]`` (one value for each key) to all queries, if their number is known.

    Returns:
        The expanded bias; any other bias unchanged; None if there is no bias.
    """
    if core.bias is None or core.bias.shape is None or not isinstance(query[1], int):
        return core.bias
    shape = dims(core.bias)
    if len(shape) != 4 or shape[2:] != [1, key[1]]:
        return core.bias
    target = initializer(graph, f"queries_{query[1]}", np.array([1, 1, query[1], 1], np.int64))
    like = ir.Value(shape=ir.Shape([*core.bias.shape[:2], query[1], key[1]]), type=core.bias.type)
    return insert(core.last, "Expand", [core.bias, target], [like], domain="")[0]


def _fits(bias: ir.Value | None, query: list[int | str], key: list[int | str]) -> bool:
    """Returns whether a bias has the shape ``[B or 1, H or 1, S, T]``: the kernel broadcasts no other axes."""
    if bias is None:
        return True
    shape = dims(bias)
    return len(shape) == 4 and shape[2:] == [query[1], key[1]]


def _without_bias(
    graph: ir.Graph, query: ir.Value, key: ir.Value, value: ir.Value
) -> tuple[tuple[ir.Value, ir.Value, ir.Value], ir.Value | None]:
    """Finds query, key and value before their biases are added; the kernel adds the biases while it copies.

    Returns:
        Query, key and value without biases, and the biases as one vector. If the biases cannot be separated, the given
        values and None.
    """
    packed = producer(query, "Split")
    if packed is not None and all(part.producer() is packed for part in (key, value)):
        before = biased(packed.inputs[0])
        order = [part.index() for part in (query, key, value)]
        if before is None or order != [0, 1, 2] or users(before[0]) != _addition_before(packed):
            return (query, key, value), None
        packed.replace_input_with(0, before[0])
        return (query, key, value), before[1]
    parts = [biased(part) for part in (query, key, value)]
    known = [part for part in parts if part is not None]
    if len(known) < 3 or any(len(users(part)) > 1 for part in (query, key, value)):
        return (query, key, value), None
    vectors = [constant(bias) for _, bias in known]
    joined = np.concatenate([array for array in vectors if array is not None])
    bias = initializer(graph, f"{known[0][1].name}.qkv", joined)
    first, second, third = (source for source, _ in known)
    return (first, second, third), bias


def _addition_before(packed: ir.Node) -> list[ir.Node]:
    """Returns the node before a Split (the addition of a bias), in a list; empty if there is none."""
    value = packed.inputs[0]
    node = value.producer() if value is not None else None
    return [node] if node is not None else []
