"""Counts the minimal cost of a bundle's graphs, for the roofline: operations to compute and bytes to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import BRIDGE, DECODER, VISION, GraphSpec
from blip2edge.graph_files import load_graph
from blip2edge.optimization.graph import dims, producer
from blip2edge.shapes.cost import StageCost

PRODUCTS = ("MatMul", "Gemm")
STORED = ("DequantizeLinear", "Cast")
"""Operators that may come between a weight and its matrix multiplication."""


def graph_cost(path: Path, spec: GraphSpec, sizes: Mapping[str, int], asked: int = 1) -> StageCost:
    """Counts the operations and bytes of one run of an exported (not optimized) graph.

    Args:
        path: The ``.onnx`` file.
        spec: The graph's inputs and outputs.
        sizes: Lengths of the dynamic axes by name; for an axis that is missing, its smallest length is used.
        asked: Number of tokens that logits are computed for.
    """
    known = {name: axis.min for name, axis in spec.axes().items()} | dict(sizes) | {"asked": asked}
    total = StageCost(0.0, 0.0, 0.0)
    read: set[str] = set()
    for node in load_graph(path).graph:
        if node.op_type in PRODUCTS:
            total += _product(node, known, read)
        elif node.op_type == "Conv":
            total += _convolution(node, known)
    return total


def decode_cost(bundle: Bundle, past: int) -> StageCost:
    """Counts the operations and bytes of one decode step for one row.

    The bytes include the keys and values of ``past`` tokens, which are read from the KV cache.
    """
    spec, cache = bundle.graph(DECODER).spec, bundle.manifest.cache
    cost = graph_cost(bundle.file(spec.file), spec, {"batch": 1, "past": past, "steps": 1})
    if cache is None:
        return cost
    return cost + StageCost(0.0, 0.0, 8.0 * cache.num_layers * cache.num_heads * cache.head_dim * past)


def stage_costs(bundle: Bundle, prompt: int, tokens: int) -> dict[str, StageCost]:
    """Counts the costs of a caption's stages: vision, bridge, prefill and decode, by name.

    Args:
        bundle: The bundle.
        prompt: Number of tokens in the prefill.
        tokens: Number of tokens of the caption; the decode stage has ``tokens - 1`` steps.
    """
    found: dict[str, StageCost] = {}
    elastic = bundle.manifest.elastic
    queries = 0 if elastic is None else elastic.max_queries  # of an elastic bridge: `bench` uses all of them
    for stage, graph in (("vision", VISION), ("bridge", BRIDGE)):
        if graph in bundle.manifest.graphs:
            spec = bundle.graph(graph).spec
            found[stage] = graph_cost(bundle.file(spec.file), spec, {"batch": 1, "queries": queries})
    spec = bundle.graph(DECODER).spec
    found["prefill"] = graph_cost(bundle.file(spec.file), spec, {"batch": 1, "past": 0, "steps": prompt})
    step, last = decode_cost(bundle, prompt), decode_cost(bundle, prompt + tokens)
    steps = max(tokens - 1, 0)
    found["decode"] = StageCost(
        *(steps * (one + other) / 2 for one, other in zip(vars(step).values(), vars(last).values(), strict=True))
    )
    return found


def _product(node: ir.Node, known: Mapping[str, int], read: set[str]) -> StageCost:
    """Counts the additions and multiplications of a matrix multiplication, and the bytes of its weight.

    The bytes of a weight that several nodes use are counted only once: ``read`` has the names of counted weights.
    """
    first, second = node.inputs[0], node.inputs[1]
    out, inner = _shape(node.outputs[0], known), _shape(first, known)[-1:]
    operations = 2.0 * float(inner[0] if inner else 1)
    for size in out:
        operations *= size
    weight = _stored(second)
    if weight is None:
        return StageCost(operations, 0.0, 0.0)
    array_bytes = 0.0
    if weight.name not in read and weight.const_value is not None:
        read.add(str(weight.name))
        array_bytes = float(weight.const_value.nbytes)
        source = second.producer() if second is not None else None
        scale = source.inputs[1] if source is not None else None
        if weight is not second and scale is not None and scale.const_value is not None:
            array_bytes += float(scale.const_value.nbytes)
    whole = weight is not second
    return StageCost(0.0 if whole else operations, operations if whole else 0.0, array_bytes)


def _stored(value: ir.Value | None) -> ir.Value | None:
    """Returns the initializer behind an operand, before DequantizeLinear or Cast; None if it is an activation."""
    for kind in STORED:
        node = producer(value, kind)
        if node is not None:
            value = node.inputs[0]
    return value if value is not None and value.const_value is not None else None


def _convolution(node: ir.Node, known: Mapping[str, int]) -> StageCost:
    weight = node.inputs[1].const_value if node.inputs[1] is not None else None
    if weight is None:
        return StageCost(0.0, 0.0, 0.0)
    operations = 2.0 * weight.size / weight.shape.numpy()[0]
    for size in _shape(node.outputs[0], known):
        operations *= size
    return StageCost(operations, 0.0, float(weight.nbytes))


def _shape(value: ir.Value | None, known: Mapping[str, int]) -> list[int]:
    """Returns a shape with numbers in place of symbolic lengths; an unknown length counts as 1."""
    out: list[int] = []
    for size in dims(value):
        if isinstance(size, int):
            out.append(size)
        else:
            names = [part.strip() for part in size.split("+")]
            out.append(sum(known[name] for name in names) if all(name in known for name in names) else 1)
    return out
