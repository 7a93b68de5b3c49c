"""Writes optimized copies: graphs that ONNX Runtime optimized, without the weights that the bundle's files have."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import BackendError, one_line
from blip2edge.graph_files import load_graph
from blip2edge.runtime.backends.onnxruntime_cpu import PROVIDERS, SLOW_FUSIONS

SMALLEST = 1024  # bytes of an initializer that goes to the data file


def optimize_offline(model: ir.Model, folder: Path, name: str) -> Path:
    """Optimizes a graph with ONNX Runtime once (constant folding, fused nodes), so that loading does not repeat it.

    Args:
        model: The rewritten graph.
        folder: Directory of the files that are written.
        name: The graph's name.

    Returns:
        The optimized graph's file.

    Raises:
        BackendError: ONNX Runtime cannot load the rewritten graph.
    """
    rewritten, optimized = folder / f"{name}.rewritten.onnx", folder / f"{name}.optimized.onnx"
    ir.save(model, rewritten, external_data=f"{rewritten.name}.data", size_threshold_bytes=SMALLEST)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Extended, not all: the last level also lays weights out for this processor.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized)
    for key, value in (
        ("file_name", f"{optimized.name}.data"), ("min_size_in_bytes", str(SMALLEST)),
    ):  # fmt: skip
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(str(rewritten), options, providers=PROVIDERS, disabled_optimizers=SLOW_FUSIONS)
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the optimized graph {name} ({one_line(error)})",
            "use the bundle without an optimized copy (--no-optimize of export and calibrate)",
        ) from error
    return optimized


def write_copy(optimized: Path, parent: Path, target: Path, name: str, within: str | None) -> dict[str, FileRecord]:
    """Writes an optimized graph into the copy; weights that are also in the bundle's file are not stored again.

    (A link to the bundle's file does not work: ONNX Runtime and onnx follow no links out of a directory, and onnx_ir
    refuses a file with two names.)

    Args:
        optimized: The file of the optimized graph.
        parent: The file of the exported (not optimized) graph.
        target: The directory of the copy.
        name: The graph's name.
        within: The copy's path inside the bundle; None if the copy is elsewhere and shares no weights.

    Returns:
        The records of the files that were written.
    """
    model = ir.load(optimized)
    if within is not None:
        _share(model, load_graph(parent), parent.parent)
    own = [value for value in model.graph.initializers.values() if _is_own(value, parent.parent)]
    files: dict[str, FileRecord] = {}
    if own:
        data = f"{name}.own.data"
        tensors = [value.const_value for value in own if value.const_value is not None]
        moved = ir.external_data.convert_tensors_to_external(tensors, target, data)
        for value, tensor in zip(own, moved, strict=True):
            value.const_value = _relocated(tensor, f"{within}/{data}" if within else data, target)
        files[data] = FileRecord.of(target / data)
    graph = target / f"{name}.onnx"
    ir.save(model, graph)
    files[graph.name] = FileRecord.of(graph)
    return files


def _share(model: ir.Model, source: ir.Model, folder: Path) -> None:
    """Replaces weights by references to the bundle's files if the files contain equal values.

    Args:
        model: The graph whose weights are replaced.
        source: The exported (not optimized) graph with weights in the bundle's files.
        folder: The folder that the paths in the references are relative to.
    """
    theirs = source.graph.initializers
    for name, value in model.graph.initializers.items():
        known = theirs.get(name)
        if known is not None and isinstance(known.const_value, ir.ExternalTensor) and _same(known, value):
            value.const_value = _relocated(known.const_value, known.const_value.location, folder)


def _relocated(tensor: ir.TensorProtocol, location: str | os.PathLike[str], folder: Path) -> ir.TensorProtocol:
    """Returns the tensor with its file given as ``location``, a path relative to ``folder``; the bytes are the same."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor
    shape = ir.Shape(tensor.shape)
    return ir.ExternalTensor(
        location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=shape,
        name=str(tensor.name),
        base_dir=folder,
    )


def _is_own(value: ir.Value, folder: Path) -> bool:
    """Returns whether a weight is large and not in the file of the exported graph."""
    tensor = value.const_value
    if tensor is None or tensor.nbytes < SMALLEST:
        return False
    return not (isinstance(tensor, ir.ExternalTensor) and Path(tensor.base_dir) == folder)


def _same(one: ir.Value, other: ir.Value) -> bool:
    first, second = one.const_value, other.const_value
    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    return np.array_equal(np.asarray(first.numpy()), np.asarray(second.numpy()))
