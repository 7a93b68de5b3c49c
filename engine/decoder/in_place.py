"""Gives a decoder a KV cache that is updated in place, for TensorRT 10.15 and newer and TensorRT for RTX.

The constant-shape decoder (``constant_shape.py``) copies the whole cache in every step: each layer reads ``past`` and
writes all C slots of ``present``. In the in-place decoder, ``present`` and ``past`` have one address, and
``TensorScatter`` (opset 24) writes only the S new keys and values. ``Attention`` (opset 24) is one node, for which
TensorRT has a fused kernel:

    inputs_embeds         [B, S, D]
    attention_mask  int64 [B, C]     0 masks a slot, for example padding; slots after the last token are always masked
    position_ids    int64 [B, S]
    logits_indices  int64 [B, K]     which K of the S new tokens need logits
    cache_position  int64 [B]        slot of the first of the S new tokens of each row: TensorScatter's write_indices
    past_key_values.{i}.{key,value}  [B, H, C, d]      unwritten slots must hold finite values: 0 * NaN is NaN
    -> logits [B, K, V], present.{i}.{key,value} [B, H, C, d], which are the updated past_key_values

The rest of the graph stays as it was exported: weights, casts, Q/DQ nodes and block scales. These things change:

- Rows: each row has its own ``cache_position``, so rows of different lengths need no padding between them.
- Masked scores: the exported graph adds -30000 to masked scores; ``Attention`` has a bool mask instead. In both graphs
  the weights of masked slots are 0. A bias that also holds relative positions (T5) stays as it is.
- Softmax: in fp16 graphs, casts make the softmax FP32. TensorRT's parser refuses ``softmax_precision``, so TensorRT's
  kernel decides the precision of the softmax.
- Grouped-query attention: ``Attention`` supports fewer key and value heads than query heads, so keys and values need
  not be repeated.

Two inputs of ``Attention`` that look suitable are not used: TensorRT's parser ignores ``nonpad_kv_seqlen`` without a
message, and treats ``is_causal`` as aligned to the upper left corner, which is wrong for a cache. The mask is therefore
computed in the graph, from ``cache_position``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnx_ir.passes import common as passes

from blip2edge.bundle.schema import CacheSpec, GraphSpec, TensorSpec
from blip2edge.engine.decoder.constant_shape import constant_shape_spec, rename_slots
from blip2edge.errors import EngineError, option
from blip2edge.runtime.backends.engine_files import CONSTANT
from blip2edge.runtime.decoding.kv.fixed import CACHE_POSITION

OPSET = 24  # of TensorScatter, and of Attention with bool masks over a cache
SLOTS_AXIS = -2  # TensorRT updates a cache along this axis only
HIDING = -1e4  # a bias below it hides a slot: its weight is 0 in fp32 and fp16
BOOL, INT64 = ir.TensorType(ir.DataType.BOOL), ir.TensorType(ir.DataType.INT64)
COMPARISONS = frozenset({"Greater", "Equal", "LessOrEqual", "Not", "Or", "Sub"})
"""Operators that exported graphs apply to the slot numbers of the new tokens before they add the axis of the rows."""


def in_place_spec(spec: GraphSpec, cache: CacheSpec, capacity: int) -> GraphSpec:
    """Returns the inputs and outputs of the decoder whose cache is updated in place.

    Args:
        spec: Inputs and outputs of the exported decoder.
        cache: KV cache of the exported decoder.
        capacity: C, number of slots of each row in the KV cache.

    Raises:
        ValueError: ``capacity`` is below 2.
    """
    constant = constant_shape_spec(spec, cache, capacity)
    rows = next(tensor for tensor in constant.inputs if tensor.name == cache.past_names()[0]).dims[0]
    position = TensorSpec(CACHE_POSITION, "int64", (rows,))
    inputs = tuple(position if tensor.name == CACHE_POSITION else tensor for tensor in constant.inputs)
    return replace(constant, inputs=inputs)


def to_in_place(model: ir.Model, cache: CacheSpec, capacity: int, name: str) -> None:
    """Rewrites an exported decoder so that it updates its KV cache in place.

    Args:
        model: The exported graph, in any precision; changed in place.
        cache: The decoder's KV cache.
        capacity: C, number of slots of each row; TensorRT needs a constant.
        name: Name of the graph's file, for errors.

    Raises:
        EngineError: The graph computes attention over its KV cache with other nodes than the graphs of
            ``blip2edge export``.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    missing = [past for past in cache.past_names() if past not in inputs]
    if missing:
        raise _unsupported(name, f"the graph has no input {missing[0]}")
    pasts = [inputs[past] for past in cache.past_names()]
    rewriter = _Rewriter(graph, name, pasts[0])
    rewriter.count_per_row()
    for past, present in zip(pasts, cache.present_names(), strict=True):
        rewriter.scatter(past, present)
    for key, value in zip(cache.present_names()[0::2], cache.present_names()[1::2], strict=True):
        rewriter.attend(key, value)
    rename_slots(graph, capacity)
    graph.opset_imports[""] = OPSET
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    others = [node.op_type for past in pasts for node, _ in past.uses() if node.op_type != "TensorScatter"]
    if others:
        raise _unsupported(name, f"its past is also read by {others[0]}")


def allow_decomposition(model: ir.Model) -> None:
    """Allows TensorRT to compute ``Attention`` with several operators where TensorRT has no fused kernel.

    TensorRT has no fused kernel for FP32, for example; without this permission, such a build fails. The function sets
    an attribute that only TensorRT supports; ONNX Runtime refuses a graph with this attribute.
    """
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrInt64("TRT_decomposable", 1))


@dataclass(frozen=True)
class _Product:
    """The inputs and the output of the attention in one layer, which one ``Attention`` node replaces.

    Attributes:
        query: Scaled queries ``[B, H, S, d]``, before the exported graph reshapes them to groups of heads.
        mask: bool ``[B, 1, S, C]``, true where a query attends to a slot; or a bias ``[B, H, S, C]`` that is added to
            the scores.
        output: Sums of the values, weighted by the softmax, ``[B, H, S, d]``.
    """

    query: ir.Value
    mask: ir.Value
    output: ir.Value


class _Rewriter:
    """Replaces the nodes that append to the cache by ``TensorScatter``, and those of attention by ``Attention``.

    Args:
        graph: The decoder.
        name: Name of the graph's file, for errors.
        past: The first cache input of the graph.
    """

    def __init__(self, graph: ir.Graph, name: str, past: ir.Value) -> None:
        self._graph = graph
        self._name = name
        self._past = past
        rows = past.shape[0] if past.shape is not None else None
        self._position = ir.Value(name=CACHE_POSITION, shape=ir.Shape([rows]), type=INT64)
        graph.inputs.insert(list(graph.inputs).index(past), self._position)
        self._masks: dict[ir.Value, ir.Value] = {}

    def count_per_row(self) -> None:
        """Computes the slot numbers of the new tokens for each row of the batch: token s of row b has its own number.

        An exported graph computes the numbers as ``Unsqueeze(Range(S) + Squeeze(Shape(past)[2:3]), 1)``, shape
        ``[S, 1]``, equal for all rows. It compares them with the slots ``[1, C]``, and adds the axis of the rows to the
        results. The rewritten graph computes ``cache_position[b] + s``, shape ``[B, S, 1]``, so the results of the
        comparisons have shape ``[B, S, C]``.
        """
        length = self._only(self._only(self._past, "Shape").outputs[0], "Squeeze").outputs[0]
        added = self._only(length, "Add")
        column = self._only(added.outputs[0], "Unsqueeze")
        steps = next(value for value in added.inputs if value is not length)
        if steps is None or self._axes(column) != [1]:
            raise self._error("the slots of its new tokens are not a column")
        first = self._add("Unsqueeze", [self._position, self._axis("rows", 1)], "cache_first")  # [B, 1]
        slots = self._add("Add", [first, steps], "cache_slots")  # [B, S]
        queries = self._add("Unsqueeze", [slots, self._axis("slots", 2)], "cache_queries")  # [B, S, 1]
        ir.convenience.replace_all_uses_with(column.outputs[0], queries)
        self._drop_row_axes(queries)

    def _drop_row_axes(self, queries: ir.Value) -> None:
        """Removes the ``Unsqueeze`` nodes that add the axis of the rows, because the values already have this axis.

        Args:
            queries: Slot numbers of the new tokens, int64 ``[B, S, 1]``.
        """
        waiting, known = [queries], {queries}
        while waiting:
            for node, _ in list(waiting.pop().uses()):
                output = node.outputs[0]
                if node.op_type == "Unsqueeze" and self._axes(node) == [0]:
                    ir.convenience.replace_all_uses_with(output, self._present(node.inputs[0]))
                elif node.op_type not in COMPARISONS:
                    raise self._error(f"the slots of its new tokens are read by {node.op_type}")
                elif output not in known:
                    output.shape = None
                    known.add(output)
                    waiting.append(output)

    def scatter(self, past: ir.Value, present: str) -> None:
        """Replaces ``Concat(past, new)`` by ``TensorScatter(past, new, cache_position)``."""
        concat = self._only(past, "Concat")
        axis, new = concat.attributes.get("axis"), concat.inputs[1]
        if new is None or len(concat.inputs) != 2 or axis is None or axis.as_int() not in (2, SLOTS_AXIS):
            raise self._error(f"{past.name} is not appended to along its slots")
        old = concat.outputs[0]
        updated = self._add("TensorScatter", [past, new, self._position], f"{present}.updated", {"axis": SLOTS_AXIS})
        updated.type, updated.shape = past.type, past.shape
        ir.convenience.replace_all_uses_with(old, updated, replace_graph_outputs=True)
        self._graph.remove(concat, safe=True)
        old.name, updated.name = None, present

    def attend(self, key: str, value: str) -> None:
        """Replaces the nodes that compute the attention of one layer by one ``Attention`` node.

        ``key`` and ``value`` are the names of the layer's cache outputs.

        The ``scale`` of the new node is 1, because the exported graph scales the queries.
        """
        outputs = {str(output.name): output for output in self._graph.outputs}
        product = self._match(outputs[key], outputs[value])
        inputs = [product.query, outputs[key], outputs[value], product.mask]
        found = self._add("Attention", inputs, f"{product.output.name}.attention", {"scale": 1.0})
        found.type, found.shape = product.output.type, product.output.shape
        ir.convenience.replace_all_uses_with(product.output, found)

    def _match(self, key: ir.Value, value: ir.Value) -> _Product:
        """Finds the nodes that compute the attention of one layer, given the layer's keys and values."""
        grouped = any(node.op_type == "Unsqueeze" for node, _ in key.uses())
        if grouped:
            key, value = (self._only(part, "Unsqueeze").outputs[0] for part in (key, value))
        scores = self._only(self._only(key, "Transpose").outputs[0], "MatMul")
        biased = self._only(scores.outputs[0], "Add")
        bias = biased.inputs[1 - list(biased.inputs).index(scores.outputs[0])]
        softmax = self._through_cast(biased.outputs[0], "Softmax")
        weighted = self._through_cast(softmax.outputs[0], "MatMul")
        if weighted.inputs[1] is not value:
            raise self._error(f"the weights of {key.name} are not multiplied by its values")
        last = self._only(weighted.outputs[0], "Reshape") if grouped else weighted
        mask = self._mask(self._present(bias), grouped)
        return _Product(self._query(scores.inputs[0], grouped), mask, last.outputs[0])

    def _query(self, query: ir.Value | None, grouped: bool) -> ir.Value:
        """Returns the scaled queries ``[B, H, S, d]``; if they were reshaped to groups of heads, undoes the reshape."""
        node = None if query is None else query.producer()
        if query is None or not grouped:
            return self._present(query)
        if node is None or node.op_type != "Mul":
            raise self._error("the queries of its groups are not scaled")
        folded, scale = (self._present(value) for value in node.inputs)
        reshape = self._producer(folded, "Reshape")
        whole = self._present(reshape.inputs[0])
        scaled = self._add("Mul", [whole, scale], f"{query.name}.heads")
        scaled.type, scaled.shape = whole.type, whole.shape
        return scaled

    def _mask(self, bias: ir.Value, grouped: bool) -> ir.Value:
        """Returns the mask input of ``Attention``, given the bias that the exported graph adds to the scores.

        If the bias only hides slots, the mask is bool ``[B, 1, S, C]``; layers with the same bias share the mask. Any
        other bias is returned unchanged, for example T5's relative positions.
        """
        if grouped:
            bias = self._present(self._producer(bias, "Unsqueeze").inputs[0])
        hidden = _hidden_by(bias)
        if hidden is None:
            return bias
        if hidden not in self._masks:
            number = len(self._masks)
            seen = self._add("Not", [hidden], f"cache_seen_{number}", kind=BOOL)
            axis = self._axis(f"heads_{number}", 1)
            self._masks[hidden] = self._add("Unsqueeze", [seen, axis], f"cache_mask_{number}", kind=BOOL)
        return self._masks[hidden]

    def _through_cast(self, value: ir.Value, operator: str) -> ir.Node:
        """Returns the only node ``operator`` that has ``value`` as an input.

        If exactly one Cast node reads ``value``, the node must have the output of this Cast as an input instead.
        """
        casts = [node.outputs[0] for node, _ in value.uses() if node.op_type == "Cast"]
        return self._only(casts[0] if len(casts) == 1 else value, operator)

    def _only(self, value: ir.Value, operator: str) -> ir.Node:
        """Returns the only node with the operator ``operator`` that has ``value`` as an input.

        Raises:
            EngineError: There is no such node, or there are several.
        """
        found = [node for node, _ in value.uses() if node.op_type == operator]
        if len(found) != 1:
            raise self._error(f"{value.name} is read by {len(found)} nodes {operator}, not by one")
        return found[0]

    def _producer(self, value: ir.Value, operator: str) -> ir.Node:
        node = value.producer()
        if node is None or node.op_type != operator:
            raise self._error(f"{value.name} is computed by {node.op_type if node else 'no node'}, not by {operator}")
        return node

    def _present(self, value: ir.Value | None) -> ir.Value:
        if value is None:
            raise self._error("an input of its attention is missing")
        return value

    def _axes(self, node: ir.Node) -> list[int]:
        """Returns the axes of an Unsqueeze node; empty if they are not constant."""
        axes = self._present(node.inputs[1]).const_value
        return [] if axes is None else [int(axis) for axis in axes.numpy()]

    def _axis(self, name: str, axis: int) -> ir.Value:
        value = ir.tensor([axis], dtype=ir.DataType.INT64, name=f"cache_axis_{name}")
        return self._add("Constant", [], f"cache_axis_{name}", {"value": value})

    def _add(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        attributes: Mapping[str, int | float | ir.TensorProtocol] | None = None,
        kind: ir.TypeProtocol = INT64,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=dict(attributes or {}))
        node.outputs[0].name, node.outputs[0].type = name, kind
        self._graph.append(node)
        return node.outputs[0]

    def _error(self, what: str) -> EngineError:
        return _unsupported(self._name, what)


def _hidden_by(bias: ir.Value) -> ir.Value | None:
    """Returns ``hidden``, bool ``[B, S, C]``, if the bias is ``Unsqueeze(Cast(hidden) * -30000)``, else None."""
    value: ir.Value | None = bias
    for operator in ("Unsqueeze", "Mul", "Cast"):
        node = None if value is None else value.producer()
        if node is None or node.op_type != operator:
            return None
        factor = node.inputs[1].const_value if operator == "Mul" and node.inputs[1] is not None else None
        if operator == "Mul" and (factor is None or factor.size != 1 or float(factor.numpy()) > HIDING):
            return None
        value = node.inputs[0]
    return value if value is not None and value.dtype == ir.DataType.BOOL else None


def _unsupported(name: str, what: str) -> EngineError:
    return EngineError(
        f"the decoder {name} cannot be rewritten to a KV cache that is updated in place: {what}",
        f"build with {option('decoder')} {CONSTANT}",
    )
