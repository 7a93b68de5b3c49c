"""Runs a rewritten graph and the exported (not optimized) graph on the same inputs, and compares their outputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import BRIDGE, DECODER, MATCH, TEXT_ENCODER, VISION, Parity
from blip2edge.graph_files import load_graph
from blip2edge.optimization import probe
from blip2edge.optimization.graph import prepare
from blip2edge.optimization.passes.integers import without_rounding
from blip2edge.optimization.recipes import PassContext, Recipe
from blip2edge.optimization.storage import SMALLEST
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.base import OptimizedFile, Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.backends.open_graph import RowByRow
from blip2edge.runtime.bench.certificate.graph_inputs import Arrays, decode, draw_cross_inputs, draw_inputs
from blip2edge.runtime.decoding.decoder import decoder_of

TOLERANCE = 1e-4
"""Largest allowed difference from the exported graph in fp32, as a share of the output's largest value."""

LEAST_COSINE = 0.995
"""Smallest allowed cosine between the outputs of a copy and of the exported graph, if weights or activations are
integers. Such outputs are not equal, because each version of the graph rounds differently."""


PROBED_GRAPHS = (VISION, BRIDGE, DECODER, MATCH, "text_encoder", "cross_kv", "image_features", "text_embeds")
"""Graphs for which this module can make random inputs, to compare and time their versions."""


@dataclass
class CopyTask:
    """Data that is shared while the optimized copies of a bundle's graphs are made.

    Attributes:
        bundle: The bundle.
        context: Facts about the model for the passes.
        scratch: Directory of rewritten graphs, of which only the fastest is kept.
        target: Directory that the copies are written to.
        within: Path of the copy inside the bundle; None if the copy is in the user's cache.
        upstream: Outputs of the exported graphs that ran already, by name; they are inputs of later graphs.
        report: Called with a stage's name, steps done and steps in all.
    """

    bundle: Bundle
    context: PassContext
    scratch: Path
    target: Path
    within: str | None
    upstream: dict[str, Array]
    report: ProgressCallback = lambda stage, done, total: None

    def parent(self, name: str) -> tuple[Path, float]:
        """Returns the file of an exported graph, and the largest relative difference that a copy's outputs may have.

        The difference is infinite for a graph that is not in FP32: the outputs of such graphs are compared by cosine
        only.
        """
        record = self.bundle.graph(name)
        return self.bundle.file(record.spec.file), TOLERANCE if record.precision == "fp32" else math.inf


def agreement(result: Arrays, portable: Arrays, tolerance: float) -> tuple[tuple[Parity, ...], float]:
    """Compares the outputs of a copy with those of the exported graph.

    Args:
        result: Outputs of the copy, by name.
        portable: Outputs of the exported graph, by name.
        tolerance: Largest relative difference. If it is infinite, outputs are compared by cosine only.

    Returns:
        The parity of each output (empty if ``tolerance`` is infinite), and the smallest cosine over all outputs.
    """
    parity = tuple(
        Parity(output, *probe.relative(result[output], wanted), tolerance, ("probe",))
        for output, wanted in portable.items()
        if math.isfinite(tolerance)
    )
    return parity, probe.worst_cosine(result, portable)


@dataclass(frozen=True)
class Form:
    """An ONNX file of one version of a graph, for ONNX Runtime on the CPU.

    Attributes:
        file: The file of the exported (not optimized) graph, or of a rewritten graph.
        recipe: The passes that rewrote the graph; None for the exported graph.
    """

    file: Path
    recipe: Recipe | None = None

    def open(self) -> Session:
        """Loads the graph for one CPU thread; returns the session."""
        if self.recipe is None:
            return OnnxRuntimeSession(self.file, 1)
        session = OnnxRuntimeSession(self.file, 1, optimized=OptimizedFile(self.file.parent, self.recipe.layout))
        return RowByRow(session) if self.recipe.one_by_one else session


def run_session(task: CopyTask, name: str, session: Session) -> Arrays:
    """Runs an opened graph on two rows and closes it; returns the outputs by name.

    For a decoder, the outputs are the logits of several steps.
    """
    try:
        if name == DECODER:
            return decode(decoder_of(task.bundle, session), _cross_inputs(task))
        outputs = session.run(draw_inputs(task.bundle.graph(name).spec, task.upstream))
        return {output: np.asarray(array) for output, array in outputs.items()}
    finally:
        session.close()


def timed_run(task: CopyTask, name: str, session: Session) -> Callable[[], object]:
    """Returns a function that runs an opened graph on one row; for a decoder, a prefill and some decode steps."""
    if name != DECODER:
        return probe.run_of(session, draw_inputs(task.bundle.graph(name).spec, task.upstream))
    manifest = task.bundle.manifest
    prompt = 1 if TEXT_ENCODER in manifest.graphs else min(probe.PROMPT, manifest.max_positions - probe.STEPS)
    return probe.decoding_of(decoder_of(task.bundle, session), _cross_inputs(task), max(prompt, 1))


def _cross_inputs(task: CopyTask) -> dict[str, Array]:
    """Draws the keys, values and mask of a decoder's cross-attention; empty for a decoder without cross-attention."""
    return draw_cross_inputs(task.bundle.graph(DECODER).spec, task.upstream)


def references(task: CopyTask, name: str) -> tuple[Arrays, Arrays]:
    """Runs the exported graph twice on the same inputs: as it is, and with activations that are not rounded.

    Returns:
        The outputs of both runs, by name. If the graph rounds no activations, both are the same.
    """
    parent, _ = task.parent(name)
    portable = run_session(task, name, Form(parent).open())
    model = load_graph(parent)
    prepare(model)
    if not without_rounding(model):
        return portable, portable
    graph = task.scratch / f"{name}.exact.onnx"  # not optimized offline: ONNX Runtime would round activations
    ir.save(model, graph, external_data=f"{graph.name}.data", size_threshold_bytes=SMALLEST)
    return portable, run_session(task, name, Form(graph, Recipe(())).open())


def fault_of(result: Arrays, portable: Arrays, exact: Arrays, tolerance: float) -> str:
    """Describes which output of a rewritten graph differs too much; empty if all outputs are within the limits.

    Args:
        result: Outputs of the rewritten graph, by name.
        portable: Outputs of the exported graph.
        exact: Outputs of the exported graph without rounded activations.
        tolerance: Largest difference, as a share of the output's largest value.
    """
    for output, wanted in portable.items():
        _, share = probe.relative(result[output], wanted)
        if share > tolerance:
            return f"{output} is off by {share:.1e} of its largest value, more than {tolerance:.0e}"
    least = min(LEAST_COSINE, probe.worst_cosine(portable, exact))
    found = probe.worst_cosine(result, exact)
    return "" if found >= least else f"its cosine is {found:.5f}, less than {least:.5f}"
