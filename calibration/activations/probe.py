"""Reads inner tensors of a graph by making them outputs; each run reads only some tensors, to limit the memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.schema import GraphSpec
from blip2edge.calibration.batches import Feeds
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

OUTPUT_BYTES = 256 << 20  # bytes of inner tensors that one run outputs at most
LOW_MEMORY_ABOVE = 4 << 30  # bytes of weights from which ONNX Runtime neither optimizes nor prepacks a graph


def observe_tensors(
    graph: ir.Model,
    record: GraphRecord,
    names: Sequence[str],
    feeds: Feeds,
    weights: Path,
    update: Callable[[Mapping[str, Array]], None],
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Runs a graph on its recorded inputs and passes the values of some tensors to a function.

    The tensors are divided into groups, so that one run needs little memory. For each group, the graph runs on all
    recorded inputs.

    Args:
        graph: The graph.
        record: The graph's record in the manifest.
        names: Names of the tensors; they may be inputs of the graph.
        feeds: The recorded inputs.
        weights: The directory of the graph's external data.
        update: Called once per run and group, with the values of the group's tensors by name.
        threads: CPU threads; None for all cores.
        progress: Called with the number of finished runs and the number of all runs, over all groups.
    """
    name = record.spec.name
    given = {tensor.name for tensor in record.spec.inputs}
    inner = [tensor for tensor in names if tensor not in given]
    first = next(feeds.runs(name, 1))
    parts = list(_parts(graph, inner, record.spec, first))
    done, total = 0, feeds.count(name) * max(1, len(parts))
    size = sum((weights / file).stat().st_size for file in record.data_files)
    for at, part in enumerate(parts or [[]]):
        session = open_tensors(graph, part, weights, size, threads) if part else None
        for inputs in feeds.runs(name):
            if progress is not None:
                progress(done, total)
            values = session.run(inputs) if session is not None else {}
            if at == 0:
                values |= {tensor: inputs[tensor] for tensor in names if tensor in given}
            update(values)
            done += 1
    if progress is not None:
        progress(total, total)


def open_tensors(
    graph: ir.Model, names: Sequence[str], weights: Path, size: int, threads: int | None = None
) -> OnnxRuntimeSession:
    """Opens a graph with some of its inner tensors as outputs, in place of the graph's own outputs.

    No file is written: ONNX Runtime gets the graph as bytes and reads the weights from the original files.

    Args:
        graph: The graph, its initializers external and in one directory; it is not changed.
        names: Names of the tensors.
        weights: The directory of the external data.
        size: Size of the weights in bytes.
        threads: CPU threads; None for all cores.
    """
    values = values_by_name(graph)
    before = list(graph.graph.outputs)
    try:
        graph.graph.outputs[:] = [values[name] for name in names]
        content = ir.to_proto(graph)
    finally:
        graph.graph.outputs[:] = before
    return open_probe(content, weights, size, threads)


def open_probe(
    graph: onnx.ModelProto, weights: Path | None = None, size: int = 0, threads: int | None = None
) -> OnnxRuntimeSession:
    """Opens in ONNX Runtime a graph that is in memory, not in a file.

    Args:
        graph: The graph.
        weights: The directory of the graph's external data; None if the graph has no external data.
        size: Size of the external data in bytes; above :data:`LOW_MEMORY_ABOVE`, optimizations that copy weights are
            off.
        threads: CPU threads; None for all cores.
    """
    return OnnxRuntimeSession(graph.SerializeToString(), threads, lean=size > LOW_MEMORY_ABOVE, weights=weights)


def values_by_name(graph: ir.Model) -> dict[str, ir.Value]:
    """Returns the graph's inputs and the outputs of its nodes, by name."""
    found = {str(value.name): value for value in graph.graph.inputs}
    for node in graph.graph:
        found |= {str(output.name): output for output in node.outputs if output.name}
    return found


def _parts(graph: ir.Model, names: Sequence[str], spec: GraphSpec, first: Mapping[str, Array]) -> Iterator[list[str]]:
    """Divides tensors into groups of at most :data:`OUTPUT_BYTES`, by their sizes in the first recorded run."""
    lengths = spec.lengths({name: array.shape for name, array in first.items()})
    values = values_by_name(graph)
    part: list[str] = []
    used = 0
    for name in names:
        size = _bytes(values[name], lengths)
        if part and used + size > OUTPUT_BYTES:
            yield part
            part, used = [], 0
        part.append(name)
        used += size
    if part:
        yield part


def _bytes(value: ir.Value, lengths: Mapping[str, int]) -> int:
    """Estimates the bytes of a tensor; for an unknown axis, the longest known axis of the graph's inputs is assumed."""
    if value.shape is None:
        return OUTPUT_BYTES // 16
    size = 4
    for dim in value.shape:
        known = dim if isinstance(dim, int) else lengths.get(str(dim.value), max(lengths.values(), default=1))
        size *= max(1, known)
    return size
