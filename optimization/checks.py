"""Runs a rewritten graph and the portable one on the same inputs, and compares their outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER, TEXT_ENCODER, Parity
from blip2edge.graph_files import load_graph
from blip2edge.optimization import probe
from blip2edge.optimization.graph import prepare
from blip2edge.optimization.passes.integers import without_rounding
from blip2edge.optimization.recipes import PassContext, Recipe
from blip2edge.optimization.storage import SMALLEST
from blip2edge.runtime.backends.base import OptimizedFile, Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.backends.open_graph import RowByRow
from blip2edge.runtime.bench.graph_inputs import draw_cross_inputs, draw_inputs
from blip2edge.runtime.decoding.language_model import decoder_of

TOLERANCE = 1e-4
"""Largest difference from the portable graph in fp32, as a share of the output's largest value."""

LEAST_COSINE = 0.995
"""Smallest cosine to the portable graph if weights or activations are integers: each form rounds differently."""


@dataclass
class CopyTask:
    """Data that all graphs of a copy share while the copy is made.

    Attributes:
        bundle: The bundle.
        context: Facts about the model for the passes.
        scratch: Directory of the rewritten graphs that are tried.
        target: Directory of the copy.
        within: Path of the copy inside the bundle; None if the copy is in the user's cache.
        upstream: Outputs of the portable graphs that ran already, by name; they are inputs of later graphs.
    """

    bundle: Bundle
    context: PassContext
    scratch: Path
    target: Path
    within: str | None
    upstream: dict[str, Array]

    def parent(self, name: str) -> tuple[Path, float]:
        """Returns the file of a portable graph, and the largest relative difference of a copy's outputs.

        The difference is infinite for a graph that is not in FP32: such graphs are compared by cosine only.
        """
        record = self.bundle.graph(name)
        return self.bundle.file(record.spec.file), TOLERANCE if record.precision == "fp32" else math.inf


def agreement(
    result: probe.ProbeResult, portable: probe.ProbeResult, tolerance: float
) -> tuple[tuple[Parity, ...], float]:
    """Compares a copy's outputs with the portable graph's: the parity of each, and the smallest cosine.

    With an infinite tolerance there is no parity, because such outputs are compared by cosine only.
    """
    parity = tuple(
        Parity(output, *probe.relative(result.outputs[output], wanted), tolerance, ("probe",))
        for output, wanted in portable.outputs.items()
        if math.isfinite(tolerance)
    )
    return parity, probe.worst_cosine(result.outputs, portable.outputs)


def run_graph(task: CopyTask, name: str, path: Path, recipe: Recipe | None = None) -> probe.ProbeResult:
    """Runs a graph in ONNX Runtime; ``recipe`` is that of a rewritten graph, None for the portable one."""
    opened = OnnxRuntimeSession(
        path, 1, optimized=None if recipe is None else OptimizedFile(path.parent, recipe.layout)
    )
    return probe_session(task, name, opened, one_by_one=recipe is not None and recipe.one_by_one)


def probe_session(
    task: CopyTask, name: str, opened: Session, *, one_by_one: bool = False, timed: bool = True
) -> probe.ProbeResult:
    """Runs an opened graph, measures its time if ``timed``, and closes it."""
    try:
        session = RowByRow(opened) if one_by_one else opened
        manifest = task.bundle.manifest
        if name != DECODER:
            return probe.run_and_time(session, draw_inputs(task.bundle.graph(name).spec, task.upstream), timed=timed)
        prompt = 1 if TEXT_ENCODER in manifest.graphs else min(probe.PROMPT, manifest.max_positions - 10)
        return probe.decode_and_time(decoder_of(task.bundle, session), _cross_inputs(task), prompt, timed=timed)
    finally:
        opened.close()


def _cross_inputs(task: CopyTask) -> dict[str, Array]:
    """Makes the keys, values and mask of a decoder's cross-attention; empty for a decoder without one."""
    return draw_cross_inputs(task.bundle.graph(DECODER).spec, task.upstream)


def references(task: CopyTask, name: str) -> tuple[probe.ProbeResult, probe.ProbeResult]:
    """Runs the portable graph, and the same graph without rounding its activations (if it rounds any)."""
    parent, _ = task.parent(name)
    portable = run_graph(task, name, parent)
    model = load_graph(parent)
    prepare(model)
    if not without_rounding(model):
        return portable, portable
    graph = task.scratch / f"{name}.exact.onnx"  # not optimized offline: ONNX Runtime would round activations
    ir.save(model, graph, external_data=f"{graph.name}.data", size_threshold_bytes=SMALLEST)
    return portable, run_graph(task, name, graph, Recipe(()))


def fault_of(result: probe.ProbeResult, portable: probe.ProbeResult, exact: probe.ProbeResult, tolerance: float) -> str:
    """Describes how a rewritten graph's outputs differ too much; empty if all are within the limits."""
    for output, wanted in portable.outputs.items():
        _, share = probe.relative(result.outputs[output], wanted)
        if share > tolerance:
            return f"{output} is off by {share:.1e} of its largest value, more than {tolerance:.0e}"
    least = min(LEAST_COSINE, probe.worst_cosine(portable.outputs, exact.outputs))
    found = probe.worst_cosine(result.outputs, exact.outputs)
    return "" if found >= least else f"its cosine is {found:.5f}, less than {least:.5f}"
