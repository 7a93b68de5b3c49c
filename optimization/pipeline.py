"""``blip2edge optimize``: makes an optimized copy of a bundle's graphs for one backend, inside the bundle.

1. Try: each graph is rewritten by several recipes, and ONNX Runtime optimizes the result offline.
2. Check: the rewritten graph gives the outputs of the portable one, on images that pass through the whole bundle.
3. Choose: the fastest is kept if it is faster than the portable graph; otherwise the portable graph stays in use.
4. Publish: ``optimized.json`` lists the files with their hashes and names the bundle.

For OpenVINO, the copy of a graph is the compiled model, which runs as fast as the portable graph and opens sooner. For
CUDA, the copy is made by rule, without a GPU: nothing is measured (``by_rule.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.outputs.disk_errors import disk_is_full
from blip2edge.bundle.outputs.publishing import scratch, staged
from blip2edge.bundle.schema import TEXT_ENCODER
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import BackendError, BundleError, UsageError, option
from blip2edge.graph_files import load_graph
from blip2edge.optimization import probe
from blip2edge.optimization.by_rule import RULED_PRECISIONS, ruled
from blip2edge.optimization.checks import CopyTask, agreement, fault_of, probe_session, references, run_graph
from blip2edge.optimization.compiled import compile_to
from blip2edge.optimization.recipes import PassContext, Recipe, apply_recipe, recipes_for
from blip2edge.optimization.storage import optimize_offline, write_copy
from blip2edge.packages import installed, require
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.open_graph import KIND, OptimizedGraph, OptimizedRecord
from blip2edge.runtime.backends.openvino import OpenVinoSession
from blip2edge.runtime.backends.probe import exact_processor
from blip2edge.version import __version__

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
    with staged(directory, force=True, marker=None) as staging:
        task = CopyTask(
            bundle=opened,
            context=PassContext(
                opened.manifest.cache, opened.manifest.max_positions, TEXT_ENCODER in opened.manifest.graphs
            ),
            scratch=scratch(staging, "tried"),
            target=staging,
            within=str(directory.relative_to(opened.path)) if directory.is_relative_to(opened.path) else None,
            upstream={},
        )
        record = _record(task, backend, progress or (lambda stage, done, total: None))
        record.write(staging)
        opened.check_unchanged()
    return OptimizedReport(directory, record, time.perf_counter() - start)


def _record(task: CopyTask, backend: str, report: ProgressCallback) -> OptimizedRecord:
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


def _rewritten(task: CopyTask, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """Writes the fastest rewritten form of a graph that passes the check; or returns why there is none."""
    parent, tolerance = task.parent(name)
    portable, exact = references(task, name)
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
            *(run_graph(task, name, candidate.file, candidate.recipe) for candidate in (one, best))
        ):
            best = one
    files = write_copy(best.file, parent, task.target, name, task.within)
    parity, cosine = agreement(best.result, portable, tolerance)
    milliseconds = (round(portable.seconds * 1e3, 3), round(best.result.seconds * 1e3, 3))
    recipe = best.recipe
    graph = OptimizedGraph(
        f"{name}.onnx", recipe.passes, recipe.one_by_one, recipe.layout, parity, cosine, milliseconds
    )
    return graph, files


def _clearly_faster(one: probe.ProbeResult, other: probe.ProbeResult) -> bool:
    return one.seconds < other.seconds * CLEARLY_FASTER


def _candidates(
    task: CopyTask, name: str, portable: probe.ProbeResult, exact: probe.ProbeResult
) -> tuple[list[_Candidate], str]:
    """The rewritten forms of a graph that pass the check, and what is wrong with one that does not."""
    parent, tolerance = task.parent(name)
    size = sum(task.bundle.manifest.files[data].size for data in task.bundle.graph(name).data_files)
    candidates: list[_Candidate] = []
    fault = ""
    for number, recipe in enumerate(recipes_for(name, load_graph(parent))):
        model = load_graph(parent)
        passes = apply_recipe(model, recipe, task.context)
        if passes is None or any(one.recipe.passes == passes for one in candidates):
            continue
        applied = Recipe(passes)
        if applied.layout and size >= ONE_TRY_FROM:  # it writes its own weights, but a large copy shares all of them
            continue
        try:
            file = optimize_offline(model, task.scratch, f"{name}.{number}")
            result = run_graph(task, name, file, applied)
        except BackendError as error:  # a kernel that does not support these sizes
            if disk_is_full(error):
                raise
            fault = f"{' + '.join(passes)}: {error}"
            continue
        difference = fault_of(result, portable, exact, tolerance)
        if difference:
            fault = f"{' + '.join(passes)}: {difference}"
            continue
        candidates.append(_Candidate(applied, file, result))
        if size >= ONE_TRY_FROM:
            break
    return candidates, fault


def _compiled(task: CopyTask, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """Writes a graph as OpenVINO has compiled it; or returns why there is no such copy.

    A graph that OpenVINO cannot load has no copy; the other graphs do.
    """
    parent, tolerance = task.parent(name)
    portable, exact = references(task, name)
    task.upstream.update(portable.outputs)
    blob = task.target / f"{name}.blob"
    try:
        milliseconds = compile_to(parent, blob)
        result = probe_session(task, name, OpenVinoSession(blob, 1, compiled=True))
    except BundleError as error:
        blob.unlink(missing_ok=True)
        return error.problem
    fault = fault_of(result, portable, exact, tolerance)
    if milliseconds[1] > milliseconds[0] * CLEARLY_FASTER:
        fault = fault or f"the portable graph opens as fast here ({milliseconds[0]:.0f} ms)"
    if fault:
        blob.unlink()
        return fault
    parity, cosine = agreement(result, portable, tolerance)
    graph = OptimizedGraph(blob.name, ("compiled",), False, False, parity, cosine, milliseconds)
    return graph, {blob.name: FileRecord.of(blob)}


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
    make: Callable[[CopyTask, str], tuple[OptimizedGraph, dict[str, FileRecord]] | str]


BACKENDS: Mapping[str, Maker] = {
    "cpu": Maker(PRECISIONS, _rewritten),
    "openvino": Maker((*PRECISIONS, "fp16"), _compiled),
    "cuda": Maker(RULED_PRECISIONS, ruled),
}
"""Backends that copies are made for."""
