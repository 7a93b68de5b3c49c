"""``blip2edge optimize``: a bundle in, a faster copy of its graphs for one backend beside it.

1. Try: each graph is rewritten by the recipes of the backend, and ONNX Runtime settles it once and for all.
2. Check: it answers as the portable graph does, on pictures that go through the whole bundle.
3. Choose: the fastest is kept, if it is faster than the portable graph; otherwise that is run.
4. Publish: ``optimized.json`` seals the copy and names its parent.

A copy for OpenVINO is what that has compiled of each graph: it runs as the portable one does and opens sooner.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

import blip2edge
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest import Bundle, FileRecord, GraphRecord
from blip2edge.bundle.publishing import staged
from blip2edge.bundle.schema import CROSS_KV, CROSS_MASK, DECODER, TEXT_ENCODER, Parity
from blip2edge.errors import BackendError, BundleError, UsageError, option
from blip2edge.optimization import probe
from blip2edge.optimization.compiled import compile_to
from blip2edge.optimization.graph import prepare
from blip2edge.optimization.passes.integers import forget_ranges
from blip2edge.optimization.recipes import Context, Recipe, cook, recipes_for
from blip2edge.optimization.storage import SMALLEST, publish, scratch, settle
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.base import Session, Settled
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.backends.open_graph import OneByOne
from blip2edge.runtime.backends.openvino import OpenVinoSession
from blip2edge.runtime.backends.optimized_copy import KIND, RECORD, OptimizedGraph, OptimizedRecord, installed
from blip2edge.runtime.backends.probe import exact_processor
from blip2edge.runtime.decoding.language_model import decoder_of

TOLERANCE = 1e-4
"""Largest difference to the portable graph in fp32, as a share of the output's largest value."""

LEAST_COSINE = 0.995
"""Where weights or activations are integers: the same graph rounds otherwise, and no digit need agree."""

CLEARLY_FASTER = 0.95
"""A recipe takes the place of a likelier one below this share of its time, twice: noise says less."""

SLOWER_MOST = {False: 1.1, True: 1.0}
"""How much slower than the portable graph a rewritten one may be, by whether it is laid out when it is loaded: one
that is not opens faster, and measuring has its error."""

ONE_TRY_FROM = 1 << 30
"""Bytes of a graph from which only the likeliest recipe that shares the bundle's weights is tried: each try reads and
writes them several times."""

PRECISIONS = ("fp32", "int8", "int4", "int8-weights")
"""What ONNX Runtime's CPU kernels compute as it stands; fp16 is computed in fp32 between casts."""


@dataclass(frozen=True)
class OptimizedReport:
    """What an optimisation made.

    Attributes:
        directory: The copy.
        record: What stands in its ``optimized.json``.
        seconds: From start to end.
    """

    directory: Path
    record: OptimizedRecord
    seconds: float


@dataclass(frozen=True)
class _Tried:
    """A recipe's outcome: the passes that found something, and what came of them."""

    recipe: Recipe
    settled: Path
    answers: probe.Answers


@dataclass
class _Work:
    """What the graphs of a bundle share while they are worked on."""

    bundle: Bundle
    context: Context
    scratch: Path
    target: Path
    within: str | None
    seen: dict[str, Array]


def optimize(
    bundle: str | Path, backend: str = "cpu", *, progress: ProgressCallback | None = None
) -> OptimizedReport:
    """Makes a bundle's copy for a backend; one that is there is replaced.

    Args:
        bundle: The bundle.
        backend: One of :data:`BACKENDS`.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        UsageError: There is no such copy.
        BundleError: No bundle.
        BackendError: onnxruntime, onnx or what runs the copy is not installed.
        OutputError: The copy cannot be written.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"no optimised copy is made for the backend {backend}, which runs a bundle's own graphs",
            f"use {option('backend')} {' or '.join(BACKENDS)}, or caption {option('backend')} {backend} without a copy",
        )
    if importlib.util.find_spec("onnxruntime") is None:
        raise BackendError(
            "an optimised copy is checked in onnxruntime, which is not installed",
            "install it: pip install 'blip2edge[cpu]'",
        )
    start = time.perf_counter()
    opened = Bundle.open(bundle)
    directory = opened.derive(KIND) / backend
    if directory.is_dir() and not (directory / RECORD).is_file():
        shutil.rmtree(directory, ignore_errors=True)  # what is left of a copy: the place is for nothing else
    with staged(directory, True, RECORD) as staging, scratch(staging) as folder:
        work = _Work(
            bundle=opened,
            context=Context(opened.manifest.cache, opened.manifest.max_positions),
            scratch=Path(folder),
            target=staging,
            within=str(directory.relative_to(opened.path)) if directory.is_relative_to(opened.path) else None,
            seen={},
        )
        record = _record(work, backend, progress or (lambda stage, done, total: None))
        record.write(staging)
    return OptimizedReport(directory, record, time.perf_counter() - start)


def _record(work: _Work, backend: str, report: ProgressCallback) -> OptimizedRecord:
    """Makes the copies of all graphs, and tells of them."""
    manifest, maker = work.bundle.manifest, BACKENDS[backend]
    graphs: dict[str, OptimizedGraph] = {}
    left: dict[str, str] = {}
    files: dict[str, FileRecord] = {}
    for done, (name, graph) in enumerate(manifest.graphs.items()):
        report(f"optimise {name}", done, len(manifest.graphs))
        if graph.precision not in maker.precisions:
            left[name] = f"it is in {graph.precision}, for which the CPU has no kernels of its own"
        elif name not in probe.KNOWN:
            left[name] = "there is no recipe for it"
        else:
            found = maker.best(work, name)
            if isinstance(found, str):
                left[name] = found
            else:
                graphs[name], written = found
                files |= written
    report("optimise", len(manifest.graphs), len(manifest.graphs))
    return OptimizedRecord(
        backend=backend,
        bundle_sha256=work.bundle.sha256,
        graphs=graphs,
        left=left,
        files=files,
        versions=versions(),
        machine=exact_processor(),
    )


def _best(work: _Work, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """The fastest of a graph's recipes that answers rightly, written to the copy; or why the portable one stays."""
    record = work.bundle.graph(name)
    parent = work.bundle.file(record.spec.file)
    portable = _answers(work, name, parent)
    exact = _exact(work, name, parent) or portable
    tried, wrong = _try_all(work, name, portable, exact)
    work.seen.update(portable.outputs)
    if not tried:
        return wrong or "no recipe applies to it"
    tried = [one for one in tried if one.answers.seconds <= portable.seconds * SLOWER_MOST[one.recipe.layout]]
    if not tried:
        return f"the portable graph is faster here ({portable.seconds * 1e3:.1f} ms)"
    best = tried[0]
    for one in tried[1:]:
        if _clearly_faster(one.answers, best.answers) and _clearly_faster(
            *(_answers(work, name, contestant.settled, contestant.recipe) for contestant in (one, best))
        ):
            best = one
    files = publish(best.settled, parent, work.target, name, work.within)
    parity, closest = _agreement(best.answers, portable, _tolerance(record))
    took = (round(portable.seconds * 1e3, 3), round(best.answers.seconds * 1e3, 3))
    done = best.recipe
    graph = OptimizedGraph(f"{name}.onnx", done.passes, done.one_by_one, done.layout, parity, closest, took)
    return graph, files


def _clearly_faster(one: probe.Answers, other: probe.Answers) -> bool:
    return one.seconds < other.seconds * CLEARLY_FASTER


def _try_all(
    work: _Work, name: str, portable: probe.Answers, exact: probe.Answers
) -> tuple[list[_Tried], str]:
    """The recipes that answer rightly, and what was wrong with one that does not."""
    record = work.bundle.graph(name)
    parent = work.bundle.file(record.spec.file)
    size = sum(work.bundle.manifest.files[data].size for data in record.data_files)
    tried: list[_Tried] = []
    wrong = ""
    for number, recipe in enumerate(recipes_for(name, ir.load(parent))):
        model = ir.load(parent)
        passes = cook(model, recipe, work.context)
        if passes is None or any(one.recipe.passes == passes for one in tried):
            continue
        done = Recipe(passes)
        if done.layout and size >= ONE_TRY_FROM:  # it writes weights of its own, and a large copy has none
            continue
        try:
            settled = settle(model, work.scratch, f"{name}.{number}")
            answers = _answers(work, name, settled, done)
        except BackendError as error:  # a kernel that takes no such sizes
            wrong = f"{' + '.join(passes)}: {error}"
            continue
        fault = _fault(answers, portable, exact, _tolerance(record))
        if fault:
            wrong = f"{' + '.join(passes)}: {fault}"
            continue
        tried.append(_Tried(done, settled, answers))
        if size >= ONE_TRY_FROM:
            break
    return tried, wrong


def _compiled(work: _Work, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """A graph as OpenVINO has compiled it, written to the copy; or why the portable one stays.

    A graph that OpenVINO cannot load stays portable as well: the other graphs do not wait for it.
    """
    record = work.bundle.graph(name)
    parent = work.bundle.file(record.spec.file)
    portable = _answers(work, name, parent)
    exact = _exact(work, name, parent) or portable
    work.seen.update(portable.outputs)
    blob = work.target / f"{name}.blob"
    try:
        took = compile_to(parent, blob)
        answers = _asked(work, name, OpenVinoSession(blob, 1, compiled=True))
    except BundleError as error:
        blob.unlink(missing_ok=True)
        return error.problem
    fault = _fault(answers, portable, exact, _tolerance(record))
    if took[1] > took[0] * CLEARLY_FASTER:
        fault = fault or f"the portable graph opens as fast here ({took[0]:.0f} ms)"
    if fault:
        blob.unlink()
        return fault
    parity, closest = _agreement(answers, portable, _tolerance(record))
    graph = OptimizedGraph(blob.name, ("compiled",), False, False, parity, closest, took)
    return graph, {blob.name: FileRecord.of(blob)}


def _agreement(
    answers: probe.Answers, portable: probe.Answers, tolerance: float
) -> tuple[tuple[Parity, ...], float]:
    """How far a copy's answers are from the portable graph's: by output, and the smallest cosine."""
    parity = tuple(
        Parity(output, *probe.relative(answers.outputs[output], wanted), tolerance, ("probe",))
        for output, wanted in portable.outputs.items()
    )
    return parity, probe.worst_cosine(answers.outputs, portable.outputs)


def _answers(work: _Work, name: str, path: Path, recipe: Recipe | None = None) -> probe.Answers:
    """What a graph says in ONNX Runtime, portable or (with its recipe) rewritten."""
    opened = OnnxRuntimeSession(
        path, 1, settled=None if recipe is None else Settled(path.parent, recipe.layout)
    )
    return _asked(work, name, opened, one_by_one=recipe is not None and recipe.one_by_one)


def _asked(work: _Work, name: str, opened: Session, *, one_by_one: bool = False) -> probe.Answers:
    """What an opened graph says; it is closed."""
    try:
        session = OneByOne(opened) if one_by_one else opened
        manifest = work.bundle.manifest
        if name != DECODER:
            return probe.ask(session, probe.draw_inputs(work.bundle.graph(name).spec, work.seen))
        prompt = 1 if TEXT_ENCODER in manifest.graphs else min(probe.PROMPT, manifest.max_positions - 10)
        return probe.decode(decoder_of(work.bundle, session), _looks(work), prompt)
    finally:
        opened.close()


def _looks(work: _Work) -> dict[str, Array]:
    """What a decoder looks at beside its text."""
    if CROSS_KV not in work.bundle.manifest.graphs:
        return {}
    drawn = probe.draw_inputs(work.bundle.graph(DECODER).spec, work.seen)
    looks = {name: array for name, array in drawn.items() if name.startswith("cross.")}
    if CROSS_MASK in drawn:
        keys = next(iter(looks.values())).shape[2]
        shape = drawn[CROSS_MASK].shape[:-1]
        mask = np.ones((*shape, keys), np.int64)
        mask[-1, ..., -1] = 0
        looks[CROSS_MASK] = mask
    return looks


def _exact(work: _Work, name: str, parent: Path) -> probe.Answers | None:
    """What a graph says with its activations unrounded; None where none are rounded."""
    model = ir.load(parent)
    prepare(model)
    if not forget_ranges(model):
        return None
    graph = work.scratch / f"{name}.exact.onnx"  # not settled: ONNX Runtime would round activations by itself
    ir.save(model, graph, external_data=f"{graph.name}.data", size_threshold_bytes=SMALLEST)
    return _answers(work, name, graph, Recipe(()))


def _tolerance(record: GraphRecord) -> float:
    """Largest allowed difference; infinite where integers are rounded, and directions are compared."""
    return TOLERANCE if record.precision == "fp32" else math.inf


def _fault(answers: probe.Answers, portable: probe.Answers, exact: probe.Answers, tolerance: float) -> str:
    """What is wrong with a rewritten graph's answers; empty for nothing."""
    for output, wanted in portable.outputs.items():
        _, share = probe.relative(answers.outputs[output], wanted)
        if share > tolerance:
            return f"{output} is off by {share:.1e} of its largest value, more than {tolerance:.0e}"
    least = min(LEAST_COSINE, probe.worst_cosine(portable.outputs, exact.outputs))
    found = probe.worst_cosine(answers.outputs, exact.outputs)
    return "" if found >= least else f"its cosine is {found:.5f}, less than {least:.5f}"


def versions() -> dict[str, str]:
    """What makes a copy, and what has to run it."""
    packages = ("onnxruntime", "openvino", "onnx", "onnx_ir", "numpy")
    return {"blip2edge": blip2edge.__version__, **{name: installed(name) for name in packages}}


@dataclass(frozen=True)
class Maker:
    """How a backend's copies are made.

    Attributes:
        precisions: Of the graphs that it can improve.
        best: Writes a graph's copy, and gives what to tell of it and its files; or why there is none.
    """

    precisions: tuple[str, ...]
    best: Callable[[_Work, str], tuple[OptimizedGraph, dict[str, FileRecord]] | str]


BACKENDS: Mapping[str, Maker] = {
    "cpu": Maker(PRECISIONS, _best),
    "openvino": Maker((*PRECISIONS, "fp16"), _compiled),
}
"""What makes a backend's copy."""
