"""Gives a decoder a KV cache of constant capacity; new keys and values are written at ``cache_position``.

In an exported decoder the cache grows: ``present = Concat(past, new)``, so every step has other shapes. Here ``past``
and ``present`` both have C slots. The shapes of a step never change, so that a step can be replayed as a CUDA graph:

    inputs_embeds        [B, S, D]
    attention_mask int64 [B, C]      0 masks a slot (padding on the left); slots after the last token are always masked
    position_ids   int64 [B, S]
    logits_indices int64 [B, K]      which K of the S new tokens need logits
    cache_position int64 [1]         slot of the first of the S new tokens, the same in all rows
    past_key_values.{i}.{key,value}  [B, H, C, d]     unwritten slots must hold finite values
    -> logits [B, K, V], present.{i}.{key,value} [B, H, C, d]

The ONNX graph is rewritten, not traced again. So weights, casts, Q/DQ nodes and block scales are those that the export
verified, and the new graph uses the same data file. For each slot, ``index = slot - cache_position`` is the number of
the new token that belongs into the slot; ``Where(0 <= index < S, Gather(new, index), past)`` writes this token. Every
TensorRT from 10.3 supports these operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
from onnx_ir.passes import common as passes

from blip2edge.bundle.schema import Axis, CacheSpec, Dim, GraphSpec, TensorSpec
from blip2edge.errors import EngineError
from blip2edge.runtime.decoding.kv.fixed import CACHE_POSITION

CAPACITY = "capacity"  # the axis
SLOTS_AXIS = 2  # of [B, H, C, d]
BOOLEANS = dict.fromkeys(("GreaterOrEqual", "Less", "And"), ir.DataType.BOOL)


def constant_shape_spec(spec: GraphSpec, cache: CacheSpec, capacity: int) -> GraphSpec:
    """Returns the inputs and outputs of the decoder with constant shapes.

    Args:
        spec: Inputs and outputs of the exported decoder.
        cache: KV cache of the exported decoder.
        capacity: C, number of slots of each row in the KV cache.

    Raises:
        ValueError: ``capacity`` is below 2.
    """
    if capacity < 2:
        raise ValueError(f"expected a capacity of at least 2 slots, for a prompt and a token, got {capacity}")
    slots = Axis(CAPACITY, capacity, capacity, capacity)
    position = TensorSpec(CACHE_POSITION, "int64", (1,))

    def resized(tensor: TensorSpec) -> TensorSpec:
        dims: list[Dim] = []
        for dim in tensor.dims:
            if isinstance(dim, Axis) and "past" in dim.name.split(" + "):
                dims.append(slots)
            elif isinstance(dim, Axis) and dim.name == "steps":
                dims.append(replace(dim, max=min(dim.max, capacity)))
            else:
                dims.append(dim)
        return replace(tensor, dims=tuple(dims))

    inputs = [resized(tensor) for tensor in spec.inputs]
    first = next(at for at, tensor in enumerate(inputs) if tensor.name == cache.past_names()[0])
    inputs.insert(first, position)
    return GraphSpec(spec.name, tuple(inputs), tuple(resized(tensor) for tensor in spec.outputs))


def to_constant_shape(model: ir.Model, cache: CacheSpec, name: str) -> None:
    """Rewrites an exported decoder to constant shapes; changes ``model`` itself.

    Args:
        model: The exported graph, in any precision.
        cache: The decoder's KV cache.
        name: Name of the graph's file, for errors.

    Raises:
        EngineError: The graph appends to its KV cache with other nodes than the graphs of ``blip2edge export``.
    """
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    missing = [past for past in cache.past_names() if past not in inputs]
    if missing:
        raise _unsupported(name, f"the graph has no input {missing[0]}")
    position = ir.Value(name=CACHE_POSITION, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.insert(list(graph.inputs).index(inputs[cache.past_names()[0]]), position)
    writer = _Writer(graph, inputs[cache.past_names()[0]], position)
    for past_name, present_name in zip(cache.past_names(), cache.present_names(), strict=True):
        past = inputs[past_name]
        concats = [node for node, _ in past.uses() if node.op_type == "Concat"]
        if len(concats) != 1 or _axis(concats[0]) not in (SLOTS_AXIS, -2) or len(concats[0].inputs) != 2:
            raise _unsupported(name, f"{past_name} is not appended to by one Concat along its slots")
        writer.write(concats[0], past, present_name)
    _replace_past_length(graph, inputs[cache.past_names()[0]], writer.position, name)
    rename_slots(graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)


class _Writer:
    """Inserts the nodes that write new keys and values into the cache.

    Args:
        graph: The decoder.
        past: One of the graph's cache inputs; the inserted nodes compute the capacity from the shape of this input.
        position: The graph's input ``cache_position``.
    """

    def __init__(self, graph: ir.Graph, past: ir.Value, position: ir.Value) -> None:
        self._graph = graph
        self._past = past
        self._index: ir.Value | None = None
        self._inside: ir.Value | None = None
        self.position: ir.Value = self._add("Squeeze", [position], "cache_position_scalar")

    def write(self, concat: ir.Node, past: ir.Value, present: str) -> None:
        """Replaces ``Concat(past, new)`` by nodes that write the new keys or values into their slots.

        Args:
            concat: The node to replace.
            past: The cache input.
            present: Name of the cache output.
        """
        new = concat.inputs[1]
        if new is None:
            raise ValueError(f"the Concat of {present} has no second input")
        if self._index is None or self._inside is None:
            self._index, self._inside = self._token_of_slot(new)
        moved = self._add("Gather", [new, self._index], f"{present}.moved", {"axis": SLOTS_AXIS})
        moved.type = past.type
        written = self._add("Where", [self._inside, moved, past], f"{present}.written")
        old = concat.outputs[0]
        written.type, written.shape = past.type, past.shape
        ir.convenience.replace_all_uses_with(old, written, replace_graph_outputs=True)
        self._graph.remove(concat, safe=True)
        old.name, written.name = None, present

    def _token_of_slot(self, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Adds nodes that compute which new token is written into each slot of the KV cache.

        Returns:
            For each slot, the index of the new token, int64 ``[C]``; and whether the slot gets one, bool ``[C, 1]``.
        """
        zero, one = self._constant("cache_zero", 0), self._constant("cache_one", 1)
        scalar = {"start": SLOTS_AXIS, "end": SLOTS_AXIS + 1}
        capacity = self._squeezed(self._add("Shape", [self._past], "cache_capacity", scalar))
        steps = self._squeezed(self._add("Shape", [new], "cache_steps", scalar))
        slots = self._add("Range", [zero, capacity, one], "cache_slots")
        token = self._add("Sub", [slots, self.position], "cache_token")
        last = self._add("Sub", [steps, one], "cache_last")
        index = self._add("Min", [self._add("Max", [token, zero], "cache_from"), last], "cache_index")
        begun = self._add("GreaterOrEqual", [token, zero], "cache_begun")
        within = self._add("Less", [token, steps], "cache_within")
        inside = self._add("And", [begun, within], "cache_inside")
        axis = self._constant("cache_last_axis", [-1])
        written = self._add("Unsqueeze", [inside, axis], "cache_written")
        written.type = inside.type
        return index, written

    def _squeezed(self, value: ir.Value) -> ir.Value:
        return self._add("Squeeze", [value], f"{value.name}_scalar")

    def _constant(self, name: str, number: int | list[int]) -> ir.Value:
        value = ir.tensor(number, dtype=ir.DataType.INT64, name=name)
        return self._add("Constant", [], name, {"value": value})

    def _add(
        self,
        op: str,
        inputs: list[ir.Value],
        name: str,
        attributes: Mapping[str, int | ir.TensorProtocol] | None = None,
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes=dict(attributes or {}))
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(BOOLEANS.get(op, ir.DataType.INT64))
        self._graph.append(node)
        return node.outputs[0]


def _replace_past_length(graph: ir.Graph, past: ir.Value, position: ir.Value, name: str) -> None:
    """Replaces the number of filled slots by ``cache_position`` everywhere in the graph.

    An exported graph computes this number once, as ``Squeeze(Shape(past)[2:3])``. In the rewritten graph, the shape of
    ``past`` gives the capacity.
    """
    lengths = [node for node, _ in past.uses() if node.op_type == "Shape"]
    old = [node for node in lengths if not str(node.outputs[0].name).startswith("cache_")]
    if len(old) != 1:
        raise _unsupported(name, f"the length of its past is read {len(old)} times, not once")
    squeezed = [node for node, _ in old[0].outputs[0].uses()]
    if [node.op_type for node in squeezed] != ["Squeeze"]:
        raise _unsupported(name, "the length of its past is not read as a number")
    ir.convenience.replace_all_uses_with(squeezed[0].outputs[0], position)
    graph.remove([squeezed[0], old[0]], safe=True)


def rename_slots(graph: ir.Graph, capacity: int | str = CAPACITY) -> None:
    """Replaces the axes ``past`` and ``past + steps`` by the capacity in the shapes of all values of a graph.

    Args:
        graph: The decoder; changed in place.
        capacity: Number of slots, or the name of the axis that stands for this number.
    """
    for value in [*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None and any(_is_past(dim) for dim in value.shape):
            value.shape = ir.Shape([capacity if _is_past(dim) else dim for dim in value.shape])


def _is_past(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and "past" in str(dim.value).replace("+", " ").split()


def _axis(node: ir.Node) -> int | None:
    axis = node.attributes.get("axis")
    return None if axis is None else axis.as_int()


def _unsupported(name: str, what: str) -> EngineError:
    return EngineError(
        f"the decoder {name} cannot be rewritten to a KV cache of constant capacity: {what}",
        "export the checkpoint again with this version of blip2edge",
    )
