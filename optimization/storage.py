"""Writing a copy: optimised by ONNX Runtime once, here, and without storing weights twice that did not change."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime

from blip2edge.errors import BackendError
from blip2edge.manifest import FileRecord

SMALLEST = 1024  # bytes of an initializer that goes to the data file
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasSkipLayerNormFusion"]
"""What ONNX Runtime would do and the recipes decide."""


def settle(model: ir.Model, folder: Path, name: str) -> Path:
    """Lets ONNX Runtime fold constants and fuse what it can, as it would at every load.

    Args:
        model: The rewritten graph.
        folder: Where files are written.
        name: Of the graph.

    Returns:
        The settled graph's file.

    Raises:
        BackendError: ONNX Runtime cannot load the rewritten graph.
    """
    rewritten, settled = folder / f"{name}.rewritten.onnx", folder / f"{name}.settled.onnx"
    ir.save(model, rewritten, external_data=f"{rewritten.name}.data", size_threshold_bytes=SMALLEST)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Extended, not all: the rest lays tensors out for the processor at hand.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(settled)
    for key, value in (
        ("file_name", f"{settled.name}.data"), ("min_size_in_bytes", str(SMALLEST)),
    ):  # fmt: skip
        options.add_session_config_entry(f"session.optimized_model_external_initializers_{key}", value)
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        onnxruntime.InferenceSession(
            str(rewritten), options, providers=["CPUExecutionProvider"], disabled_optimizers=SLOW_FUSIONS
        )
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        reason = str(error).strip().splitlines()[0]
        raise BackendError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load the optimised {name} ({reason})",
            "run the bundle as it is: leave the optimisation out with --no-optimize",
        ) from error
    return settled


def publish(
    settled: Path, parent: Path, sealed: Mapping[str, FileRecord], target: Path, name: str
) -> dict[str, FileRecord]:
    """Writes a settled graph to the copy; weights that the parent has as well are its own file, linked.

    Args:
        settled: The graph.
        parent: The portable graph's file.
        sealed: The parent bundle's files.
        target: The copy's directory.
        name: Of the graph.

    Returns:
        The files that were written, with their seals.
    """
    model, source = ir.load(settled), ir.load(parent)
    files: dict[str, FileRecord] = {}
    theirs = source.graph.initializers
    shared = {value.const_value.location for value in theirs.values() if _is_external(value)}  # type: ignore[union-attr]
    for key, value in model.graph.initializers.items():
        known = theirs.get(key)
        if known is not None and _is_external(known) and _same(known, value):
            tensor = known.const_value
            value.const_value = ir.ExternalTensor(
                tensor.location, tensor.offset, tensor.length, tensor.dtype,  # type: ignore[union-attr]
                shape=tensor.shape, name=key, base_dir=target,  # type: ignore[union-attr, arg-type]
            )  # fmt: skip
    kept = {
        value.const_value.location  # type: ignore[union-attr]
        for value in model.graph.initializers.values()
        if _is_external(value) and value.const_value.location in shared  # type: ignore[union-attr]
    }
    for location in sorted(kept):
        link(parent.parent / location, target / location)
        files[location] = sealed[location]
    return files | _write(model, target, name, kept)


def _write(model: ir.Model, target: Path, name: str, kept: set[str]) -> dict[str, FileRecord]:
    """The graph and the weights that are its own."""
    own = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not (_is_external(value) and value.const_value.location in kept)  # type: ignore[attr-defined]
        and value.const_value.nbytes >= SMALLEST
    ]
    files: dict[str, FileRecord] = {}
    data = target / f"{name}.own.data"
    if own:
        tensors = [value.const_value for value in own if value.const_value is not None]
        moved = ir.external_data.convert_tensors_to_external(tensors, target, data.name)
        for value, tensor in zip(own, moved, strict=True):
            value.const_value = tensor
        files[data.name] = FileRecord.of(data)
    graph = target / f"{name}.onnx"
    ir.save(model, graph)
    files[graph.name] = FileRecord.of(graph)
    return files


def _is_external(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)


def _same(one: ir.Value, other: ir.Value) -> bool:
    first, second = one.const_value, other.const_value
    if first is None or second is None or first.dtype != second.dtype or first.shape != second.shape:
        return False
    return np.array_equal(np.asarray(first.numpy()), np.asarray(second.numpy()))


def link(source: Path, target: Path) -> None:
    """The same file under a second name; a copy where the file system has no such thing."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def scratch(beside: Path) -> tempfile.TemporaryDirectory[str]:
    """A directory for what is tried, on the file system of the copy."""
    return tempfile.TemporaryDirectory(prefix=".trying.", dir=beside)
