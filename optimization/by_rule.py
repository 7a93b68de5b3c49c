"""Makes the copy of a graph for ONNX Runtime's CUDA provider by fixed rules, without a GPU.

The copy is in FP16, with the fused operators that have a CUDA kernel. It is checked on the CPU in two steps:

1. The outputs of the fused graph in FP32 are compared with those of the exported (not optimized) graph in FP32: only
   the order of the sums differs.
2. The outputs of the fused graph in FP16 are compared with those of the exported graph, within the tolerance of an FP16
   export.

The copy's speed is not measured.
"""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.schema import DECODER, VISION
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import BackendError
from blip2edge.graph_files import load_graph
from blip2edge.optimization.checks import TOLERANCE, CopyTask, agreement, fault_of, run_session
from blip2edge.optimization.graph import prepare
from blip2edge.optimization.passes.half import dequantize, halve, widen
from blip2edge.optimization.recipes import CUDA, CUDA_DECODERS, HALF, Recipe, apply_recipe
from blip2edge.optimization.storage import SMALLEST, write_copy
from blip2edge.runtime.backends.base import OptimizedFile
from blip2edge.runtime.backends.onnxruntime_cuda import open_on_host
from blip2edge.runtime.backends.optimized_copy import OptimizedGraph
from blip2edge.runtime.bench.certificate.graph_inputs import Arrays

FP16_TOLERANCE = 1e-1
"""Largest allowed difference of a graph in FP16, as a share of the output's largest value; as for an FP16 export."""

RULED_PRECISIONS = ("fp32", "fp16", "int8", "int4", "int8-weights")

LARGE = 1 << 30
"""Size of an FP16 graph, in bytes, from which the comparison in FP32 (step 1 of this module) is skipped.

This step needs the graph in FP32 on disk and in memory.
"""

Copy = tuple[OptimizedGraph, dict[str, FileRecord]]


def ruled(task: CopyTask, name: str) -> Copy | str:
    """Writes the copy of a graph for CUDA.

    Args:
        task: The bundle, and the directories of the copies.
        name: The graph's name.

    Returns:
        The copy's record and files; or the reason why there is no copy, as text.
    """
    record = task.bundle.graph(name)
    parent = task.bundle.file(record.spec.file)
    if name == VISION and task.bundle.manifest.merging is not None and record.precision != "fp16":
        return "the choice of merged patches needs FP32: export with --precision fp16, which keeps that part in FP32"
    portable = _run(task, name, parent, None)
    task.upstream.update(portable)
    exact = _exact(task, name, parent, portable)
    fault = "no recipe applies to this graph"
    for number, recipe in enumerate(CUDA_DECODERS if name == DECODER else CUDA):
        model = load_graph(parent)
        passes = apply_recipe(model, recipe, task.context)
        if passes is None:
            continue
        try:
            if exact is not None:
                fused = _saved(task, model, f"{name}.{number}.fp32")
                result = _run(task, name, fused, fused.parent)
                fault = fault_of(result, exact, exact, TOLERANCE)
                if fault:
                    continue
            halve(model)
            file = _saved(task, model, f"{name}.{number}.fp16")
            result = _run(task, name, file, file.parent)
        except BackendError as error:  # a kernel that does not support these sizes
            fault = f"{' + '.join(passes)}: {error}"
            continue
        wanted = exact or portable
        tolerance = max((one.tolerance for one in record.parity if record.precision == "fp16"), default=FP16_TOLERANCE)
        fault = fault_of(result, wanted, wanted, tolerance)
        if not fault:
            parity, cosine = agreement(result, wanted, tolerance)
            files = write_copy(file, parent, task.target, name, task.within)
            made = Recipe((*passes, HALF))
            return OptimizedGraph(f"{name}.onnx", made.passes, False, False, parity, cosine, None), files
    return fault


def _exact(task: CopyTask, name: str, parent: Path, portable: Arrays) -> Arrays | None:
    """Computes the exported graph's outputs in FP32, without INT8 activations; None for a large FP16 graph."""
    model = load_graph(parent)
    prepare(model)
    changed = bool(widen(model))
    size = sum(task.bundle.manifest.files[data].size for data in task.bundle.graph(name).data_files)
    if changed and size >= LARGE:
        return None
    changed = bool(dequantize(model)) or changed
    if not changed:
        return portable
    file = _saved(task, model, f"{name}.exact")
    return _run(task, name, file, file.parent)


def _saved(task: CopyTask, model: ir.Model, name: str) -> Path:
    model.graph.sort()
    file = task.scratch / f"{name}.onnx"
    ir.save(model, file, external_data=f"{file.name}.data", size_threshold_bytes=SMALLEST)
    return file


def _run(task: CopyTask, name: str, path: Path, weights: Path | None) -> Arrays:
    """Runs a graph on the CPU with the code of the CUDA backend; returns its outputs."""
    session = open_on_host(path, None if weights is None else OptimizedFile(weights))
    return run_session(task, name, session)
