"""``blip2edge optimize``: makes an optimized copy of a bundle's graphs for one backend, inside the bundle.

1. Try: each graph is rewritten by several recipes, and ONNX Runtime optimizes the result offline.
2. Check: the rewritten graph gives the outputs of the portable one, on images that pass through the whole bundle.
3. Choose: the fastest is kept if it is faster than the portable graph; otherwise the portable graph stays in use.
4. Publish: ``optimized.json`` lists the files with their hashes and names the bundle.

For OpenVINO, the copy of a graph is its compiled model: it runs as fast as the portable graph, and opens sooner.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.integrity import FileRecord
from blip2edge.bundle.publishing import staged
from blip2edge.bundle.schema import CROSS_KV, CROSS_MASK, DECODER, TEXT_ENCODER, Parity
from blip2edge.errors import BackendError, BundleError, UsageError, option
from blip2edge.optimization import probe
from blip2edge.optimization.compiled import compile_to
from blip2edge.optimization.graph import prepare
from blip2edge.optimization.passes.integers import without_rounding
from blip2edge.optimization.recipes import PassContext, Recipe, apply_recipe, recipes_for
from blip2edge.optimization.storage import SMALLEST, optimize_offline, scratch_directory, write_copy
from blip2edge.packages import installed, require
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.base import OptimizedFile, Session
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.backends.open_graph import KIND, OptimizedGraph, OptimizedRecord, RowByRow
from blip2edge.runtime.backends.openvino import OpenVinoSession
from blip2edge.runtime.backends.probe import exact_processor
from blip2edge.runtime.decoding.language_model import decoder_of
from blip2edge.version import __version__

TOLERANCE = 1e-4
"""Largest difference from the portable graph in fp32, as a share of the output's largest value."""

LEAST_COSINE = 0.995
"""Smallest cosine to the portable graph if weights or activations are integers: each form rounds differently."""

CLEARLY_FASTER = 0.95
"""A later recipe is preferred to an earlier one if it takes less than this share of its time in two measurements."""

SLOWER_MOST = {False: 1.1, True: 1.0}
"""Largest time of a rewritten graph as a multiple of the portable graph's, by whether its weights are prepacked at load
time. A graph without prepacking opens faster, so that it may be slightly slower; measured times have an error too."""

ONE_TRY_FROM = 1 << 30
"""Bytes of a graph from which only the first recipe is tried that shares the bundle's weights: each try reads and
writes the weights several times."""

PRECISIONS = ("fp32", "int8", "int4", "int8-weights")
"""Precisions with CPU kernels in ONNX Runtime; it computes fp16 in fp32 between casts."""


@dataclass(frozen=True)
class OptimizedReport:
    """The result of :func:`optimize`.

    Attributes:
        directory: The directory of the copy.
        record: The contents of the copy's ``optimized.json``.
        seconds: Time to make the whole copy.
    """

    directory: Path
    record: OptimizedRecord
    seconds: float


@dataclass(frozen=True)
class _Candidate:
    """A graph rewritten by a recipe.

    Attributes:
        recipe: The passes that changed something.
        file: The rewritten graph.
        result: Its outputs and its time.
    """

    recipe: Recipe
    file: Path
    result: probe.ProbeResult


@dataclass
class _CopyTask:
    """What the graphs of a copy share while the copy is made.

    Attributes:
        bundle: The bundle.
        context: What passes know about the model.
        scratch: Directory of the rewritten graphs that are tried.
        target: Directory of the copy.
        within: Path of the copy inside the bundle; None if the copy is in the user's cache.
        upstream: Outputs of the portable graphs so far, by name: the inputs of later graphs.
    """

    bundle: Bundle
    context: PassContext
    scratch: Path
    target: Path
    within: str | None
    upstream: dict[str, Array]

    def parent(self, name: str) -> tuple[Path, float]:
        """The file of a portable graph, and the largest difference from it; infinite for graphs with integers.

        Those are compared by cosine.
        """
        record = self.bundle.graph(name)
        return self.bundle.file(record.spec.file), TOLERANCE if record.precision == "fp32" else math.inf


def optimize(bundle: str | Path, backend: str = "cpu", *, progress: ProgressCallback | None = None) -> OptimizedReport:
    """Makes the optimized copy of a bundle for a backend; an existing copy is replaced.

    Args:
        bundle: The directory of the bundle.
        backend: The backend that will run the copy, one of :data:`BACKENDS`.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        UsageError: Copies are not made for this backend.
        BundleError: The directory is not a bundle, or contains engines only.
        BackendError: onnxruntime, onnx or the backend's package is not installed.
        OutputError: The copy cannot be written.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"expected {option('backend')} to be one of {', '.join(BACKENDS)}, got {backend}",
            "other backends run the bundle's own graphs and need no optimized copy",
        )
    require("onnxruntime", "the check of an optimized copy", BackendError)
    start = time.perf_counter()
    opened = Bundle.open(bundle)
    opened.require_graphs("an optimized copy")
    directory = opened.derive(KIND) / backend
    with staged(directory, force=True, marker=None) as staging, scratch_directory(staging) as folder:
        task = _CopyTask(
            bundle=opened,
            context=PassContext(opened.manifest.cache, opened.manifest.max_positions),
            scratch=Path(folder),
            target=staging,
            within=str(directory.relative_to(opened.path)) if directory.is_relative_to(opened.path) else None,
            upstream={},
        )
        record = _record(task, backend, progress or (lambda stage, done, total: None))
        record.write(staging)
    return OptimizedReport(directory, record, time.perf_counter() - start)


def _record(task: _CopyTask, backend: str, report: ProgressCallback) -> OptimizedRecord:
    """Makes the copies of all graphs; returns their record."""
    manifest, maker = task.bundle.manifest, BACKENDS[backend]
    graphs: dict[str, OptimizedGraph] = {}
    skipped: dict[str, str] = {}
    files: dict[str, FileRecord] = {}
    for done, (name, graph) in enumerate(manifest.graphs.items()):
        report(f"optimise {name}", done, len(manifest.graphs))
        if graph.precision not in maker.precisions:
            skipped[name] = f"it is in {graph.precision}, for which the CPU has no kernels of its own"
        elif name not in probe.PROBED_GRAPHS:
            skipped[name] = "there is no recipe for it"
        else:
            found = maker.make(task, name)
            if isinstance(found, str):
                skipped[name] = found
            else:
                graphs[name], written = found
                files |= written
    report("optimise", len(manifest.graphs), len(manifest.graphs))
    return OptimizedRecord(
        backend=backend,
        bundle_sha256=task.bundle.sha256,
        graphs=graphs,
        left=skipped,
        files=files,
        versions=versions(),
        machine=exact_processor(),
    )


def _rewritten(task: _CopyTask, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """Writes the fastest rewritten form of a graph that passes the check; or returns why there is none."""
    parent, tolerance = task.parent(name)
    portable, exact = _references(task, name)
    candidates, fault = _candidates(task, name, portable, exact)
    task.upstream.update(portable.outputs)
    if not candidates:
        return fault or "no recipe applies to this graph"
    candidates = [one for one in candidates if one.result.seconds <= portable.seconds * SLOWER_MOST[one.recipe.layout]]
    if not candidates:
        return f"the portable graph is faster here ({portable.seconds * 1e3:.1f} ms)"
    best = candidates[0]
    for one in candidates[1:]:
        if _clearly_faster(one.result, best.result) and _clearly_faster(
            *(_run(task, name, candidate.file, candidate.recipe) for candidate in (one, best))
        ):
            best = one
    files = write_copy(best.file, parent, task.target, name, task.within)
    parity, cosine = _agreement(best.result, portable, tolerance)
    milliseconds = (round(portable.seconds * 1e3, 3), round(best.result.seconds * 1e3, 3))
    recipe = best.recipe
    graph = OptimizedGraph(
        f"{name}.onnx", recipe.passes, recipe.one_by_one, recipe.layout, parity, cosine, milliseconds
    )
    return graph, files


def _clearly_faster(one: probe.ProbeResult, other: probe.ProbeResult) -> bool:
    return one.seconds < other.seconds * CLEARLY_FASTER


def _candidates(
    task: _CopyTask, name: str, portable: probe.ProbeResult, exact: probe.ProbeResult
) -> tuple[list[_Candidate], str]:
    """The rewritten forms of a graph that pass the check, and what is wrong with one that does not."""
    parent, tolerance = task.parent(name)
    size = sum(task.bundle.manifest.files[data].size for data in task.bundle.graph(name).data_files)
    candidates: list[_Candidate] = []
    fault = ""
    for number, recipe in enumerate(recipes_for(name, ir.load(parent))):
        model = ir.load(parent)
        passes = apply_recipe(model, recipe, task.context)
        if passes is None or any(one.recipe.passes == passes for one in candidates):
            continue
        applied = Recipe(passes)
        if applied.layout and size >= ONE_TRY_FROM:  # it writes its own weights, but a large copy shares all of them
            continue
        try:
            file = optimize_offline(model, task.scratch, f"{name}.{number}")
            result = _run(task, name, file, applied)
        except BackendError as error:  # a kernel that does not support these sizes
            fault = f"{' + '.join(passes)}: {error}"
            continue
        difference = _fault(result, portable, exact, tolerance)
        if difference:
            fault = f"{' + '.join(passes)}: {difference}"
            continue
        candidates.append(_Candidate(applied, file, result))
        if size >= ONE_TRY_FROM:
            break
    return candidates, fault


def _compiled(task: _CopyTask, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """Writes a graph as OpenVINO has compiled it; or returns why there is no such copy.

    A graph that OpenVINO cannot load has no copy; the other graphs do.
    """
    parent, tolerance = task.parent(name)
    portable, exact = _references(task, name)
    task.upstream.update(portable.outputs)
    blob = task.target / f"{name}.blob"
    try:
        milliseconds = compile_to(parent, blob)
        result = _probe(task, name, OpenVinoSession(blob, 1, compiled=True))
    except BundleError as error:
        blob.unlink(missing_ok=True)
        return error.problem
    fault = _fault(result, portable, exact, tolerance)
    if milliseconds[1] > milliseconds[0] * CLEARLY_FASTER:
        fault = fault or f"the portable graph opens as fast here ({milliseconds[0]:.0f} ms)"
    if fault:
        blob.unlink()
        return fault
    parity, cosine = _agreement(result, portable, tolerance)
    graph = OptimizedGraph(blob.name, ("compiled",), False, False, parity, cosine, milliseconds)
    return graph, {blob.name: FileRecord.of(blob)}


def _agreement(
    result: probe.ProbeResult, portable: probe.ProbeResult, tolerance: float
) -> tuple[tuple[Parity, ...], float]:
    """The difference of a copy's outputs from the portable graph's: the parity of each, and the smallest cosine."""
    parity = tuple(
        Parity(output, *probe.relative(result.outputs[output], wanted), tolerance, ("probe",))
        for output, wanted in portable.outputs.items()
    )
    return parity, probe.worst_cosine(result.outputs, portable.outputs)


def _run(task: _CopyTask, name: str, path: Path, recipe: Recipe | None = None) -> probe.ProbeResult:
    """Runs a graph in ONNX Runtime: the portable one, or with a recipe a rewritten one."""
    opened = OnnxRuntimeSession(
        path, 1, optimized=None if recipe is None else OptimizedFile(path.parent, recipe.layout)
    )
    return _probe(task, name, opened, one_by_one=recipe is not None and recipe.one_by_one)


def _probe(task: _CopyTask, name: str, opened: Session, *, one_by_one: bool = False) -> probe.ProbeResult:
    """Runs and times an opened graph, and closes it."""
    try:
        session = RowByRow(opened) if one_by_one else opened
        manifest = task.bundle.manifest
        if name != DECODER:
            return probe.run_and_time(session, probe.draw_inputs(task.bundle.graph(name).spec, task.upstream))
        prompt = 1 if TEXT_ENCODER in manifest.graphs else min(probe.PROMPT, manifest.max_positions - 10)
        return probe.decode_and_time(decoder_of(task.bundle, session), _cross_inputs(task), prompt)
    finally:
        opened.close()


def _cross_inputs(task: _CopyTask) -> dict[str, Array]:
    """The keys, values and mask that a decoder's cross-attention reads; empty for a decoder without any."""
    if CROSS_KV not in task.bundle.manifest.graphs:
        return {}
    drawn = probe.draw_inputs(task.bundle.graph(DECODER).spec, task.upstream)
    inputs = {name: array for name, array in drawn.items() if name.startswith("cross.")}
    if CROSS_MASK in drawn:
        keys = next(iter(inputs.values())).shape[2]
        shape = drawn[CROSS_MASK].shape[:-1]
        mask = np.ones((*shape, keys), np.int64)
        mask[-1, ..., -1] = 0
        inputs[CROSS_MASK] = mask
    return inputs


def _references(task: _CopyTask, name: str) -> tuple[probe.ProbeResult, probe.ProbeResult]:
    """Runs the portable graph, and the same graph without rounding its activations (if it rounds any)."""
    parent, _ = task.parent(name)
    portable = _run(task, name, parent)
    model = ir.load(parent)
    prepare(model)
    if not without_rounding(model):
        return portable, portable
    graph = task.scratch / f"{name}.exact.onnx"  # not optimized offline: ONNX Runtime would round activations
    ir.save(model, graph, external_data=f"{graph.name}.data", size_threshold_bytes=SMALLEST)
    return portable, _run(task, name, graph, Recipe(()))


def _fault(result: probe.ProbeResult, portable: probe.ProbeResult, exact: probe.ProbeResult, tolerance: float) -> str:
    """What is wrong with a rewritten graph's outputs; empty if nothing is."""
    for output, wanted in portable.outputs.items():
        _, share = probe.relative(result.outputs[output], wanted)
        if share > tolerance:
            return f"{output} is off by {share:.1e} of its largest value, more than {tolerance:.0e}"
    least = min(LEAST_COSINE, probe.worst_cosine(portable.outputs, exact.outputs))
    found = probe.worst_cosine(result.outputs, exact.outputs)
    return "" if found >= least else f"its cosine is {found:.5f}, less than {least:.5f}"


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make or run a copy, by package name."""
    packages = ("onnxruntime", "openvino", "onnx", "onnx_ir", "numpy")
    return {"blip2edge": __version__, **{name: installed(name) for name in packages}}


@dataclass(frozen=True)
class Maker:
    """How the optimized copies for one backend are made.

    Attributes:
        precisions: Precisions of the graphs that are optimized.
        make: Function that writes a graph's copy; returns the copy's record and files, or why there is no copy.
    """

    precisions: tuple[str, ...]
    make: Callable[[_CopyTask, str], tuple[OptimizedGraph, dict[str, FileRecord]] | str]


BACKENDS: Mapping[str, Maker] = {
    "cpu": Maker(PRECISIONS, _rewritten),
    "openvino": Maker((*PRECISIONS, "fp16"), _compiled),
}
"""Backends that copies are made for."""
