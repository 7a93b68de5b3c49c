"""Fuses attention whose keys and values are split into heads already: a decoder's KV cache, or its cross-attention.

    q [B, H, S, d], k, v [B, H, T, d] --q k' + bias--> softmax --@ v--> merge heads --> [B, S, H d]

becomes ONNX Runtime's MultiHeadAttention with keys and values of four axes. The graph still appends to the KV cache.
T5, BERT and Flamingo decoders use this operator, because GroupQueryAttention supports neither relative positions nor
cross-attention. This pass also fuses two kinds of attention that ``attention.py`` does not fuse: with learned queries
that have no batch axis, and with a mask of keys over a variable number of queries.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import clean, dims, initializer, insert, replace
from blip2edge.optimization.passes.attention import Core, find_core, flat

HEADS_AXES = 4


def fuse_heads(model: ir.Model) -> int:
    """Fuses attention over keys and values ``[B, H, T, d]``; returns the number of fused attentions."""
    clean(model)  # nodes of other fused attentions
    fuser = _Fuser(model.graph)
    return sum(fuser.fuse(node) for node in list(model.graph) if node.op_type == "Softmax")


class _Fuser:
    """Fuses the attentions of one graph. If several layers share a mask, the mask is expanded only once.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._expanded: dict[ir.Value, ir.Value] = {}

    def fuse(self, softmax: ir.Node) -> bool:
        """Fuses the attention around a softmax node; returns whether it was fused."""
        core = find_core(softmax)
        if core is None:
            return False
        query, bias, (key, value) = dims(core.query), dims(core.bias), _keys(core)
        if len(query) != HEADS_AXES or not isinstance(query[1], int) or not isinstance(query[3], int):
            return False
        shapes = [_unsplit(dims(part), query) for part in (key, value)]
        if shapes[0] != shapes[1] or not shapes[0]:
            return False
        rows, keys, _ = shapes[0]
        if core.bias is not None and (len(bias) != HEADS_AXES or bias[3] != keys or bias[2] not in (1, query[2])):
            return False
        merged = core.last.outputs[0]
        inputs = [self._query(core, rows), key, value, None, None, self._bias(core, query[2])]
        (made,) = insert(core.last, "MultiHeadAttention", inputs, [merged], num_heads=query[1], scale=core.scale)
        replace(merged, made)
        return True

    def _query(self, core: Core, rows: int | str) -> ir.Value:
        """Returns the queries ``[B, S, H d]``, from before they were split into heads.

        If the queries were rotated after the split, nodes that merge their heads are inserted.
        """
        batch, heads, steps, width = dims(core.query)
        query = flat(core.query)
        wide = ir.Shape([batch, steps, int(heads) * int(width)])
        if query is None:
            like = ir.Value(shape=ir.Shape([batch, steps, heads, width]), type=core.query.type)
            (turned,) = insert(core.last, "Transpose", [core.query], [like], domain="", perm=[0, 2, 1, 3])
            target = initializer(self._graph, f"merged_{heads}x{width}", np.array([0, 0, int(heads) * int(width)]))
            like = ir.Value(shape=wide, type=core.query.type)
            (query,) = insert(core.last, "Reshape", [turned, target], [like], domain="")
        if batch == rows:
            return query
        # Learned queries are the same for all rows.
        (count,) = insert(core.last, "Shape", [core.value], [None], domain="", start=0, end=1)
        ones = initializer(self._graph, "ones_2", np.array([1, 1]))
        (target,) = insert(core.last, "Concat", [count, ones], [None], domain="", axis=0)
        like = ir.Value(shape=ir.Shape([rows, *list(wide)[1:]]), type=query.type)
        return insert(core.last, "Expand", [query, target], [like], domain="")[0]

    def _bias(self, core: Core, steps: int | str) -> ir.Value | None:
        """Returns the bias, expanded to one row per query: the kernel broadcasts over batch and heads only."""
        if core.bias is None or dims(core.bias)[2] == steps:
            return core.bias
        if core.bias not in self._expanded:
            (count,) = insert(core.last, "Shape", [core.query], [None], domain="", start=2, end=3)
            one, ones = (initializer(self._graph, f"ones_{size}", np.array([1] * size)) for size in (1, 2))
            (target,) = insert(core.last, "Concat", [ones, count, one], [None], domain="", axis=0)
            shape = dims(core.bias)
            like = ir.Value(shape=ir.Shape([*shape[:2], steps, shape[3]]), type=core.bias.type)
            self._expanded[core.bias] = insert(core.last, "Expand", [core.bias, target], [like], domain="")[0]
        return self._expanded[core.bias]


def _keys(core: Core) -> tuple[ir.Value, ir.Value]:
    """Returns the keys and values of an attention: ``[B, T, H d]`` if nodes of this graph split both into heads.

    Otherwise, for example if they come from a KV cache, their shape is ``[B, H, T, d]``.
    """
    key, value = flat(core.key), flat(core.value)
    return (core.key, core.value) if key is None or value is None else (key, value)


def _unsplit(shape: list[int | str], query: list[int | str]) -> list[int | str]:
    """Returns the shape ``[B, T, H d]`` that keys have before their split into heads.

    The shape is empty if the keys do not fit queries ``[B, H, S, d]``.
    """
    width = int(query[1]) * int(query[3])
    if len(shape) == HEADS_AXES and shape[1::2] == query[1::2]:
        return [shape[0], shape[2], width]
    return shape if len(shape) == HEADS_AXES - 1 and shape[2] == width else []
