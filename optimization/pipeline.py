"""Implements ``blip2edge optimize``: makes an optimized copy of a bundle's graphs for one backend, inside the bundle.

1. Try: each graph is rewritten by several recipes, and ONNX Runtime optimizes the result offline.
2. Check: the rewritten graph must give the outputs of the exported (not optimized) graph. The inputs are images and
   outputs of earlier graphs of the bundle.
3. Choose: the versions of the graph are timed in turn (``race.py``); a version that is slower than the exported graph
   is never kept.
4. Publish: ``optimized.json`` lists the files with their hashes and names the bundle.

For OpenVINO, the copy of a graph is the compiled model, which runs as fast as the exported graph and opens sooner. For
CUDA, the copy is made by fixed rules, without a GPU: nothing is measured (``by_rule.py``). For ``cuda-decoder``, the
copy is a description of the decoder's layers, with compiled CUDA kernels (``cuda_kernels``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.outputs.disk_errors import disk_is_full
from blip2edge.bundle.outputs.publishing import scratch, staged
from blip2edge.bundle.schema import DECODER, TEXT_ENCODER
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.errors import BackendError, BundleError, UsageError, option
from blip2edge.graph_files import load_graph
from blip2edge.optimization import race
from blip2edge.optimization.by_rule import RULED_PRECISIONS, ruled
from blip2edge.optimization.checks import PROBED_GRAPHS, CopyTask, Form, agreement, fault_of, references, run_session
from blip2edge.optimization.compiled import compile_to
from blip2edge.optimization.cuda_kernels.compiled import compiled_decoder
from blip2edge.optimization.recipes import PassContext, Recipe, apply_recipe, recipes_for
from blip2edge.optimization.storage import optimize_offline, write_copy
from blip2edge.packages import installed, require
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.openvino import OpenVinoSession
from blip2edge.runtime.backends.optimized_copy import GPU, KIND, OptimizedGraph, OptimizedRecord
from blip2edge.runtime.backends.probe import exact_processor, nvidia_driver
from blip2edge.runtime.bench.certificate.graph_inputs import Arrays
from blip2edge.version import __version__

SOONER = 0.95
"""A compiled graph is kept if it opens in less than this share of the time that the exported graph needs to open."""

LARGE = 1 << 30
"""For a graph of at least this many bytes, only one recipe is tried: the first that shares the bundle's weights.

The reason is that each try reads and writes the weights several times.
"""

GPU_HINT = "; on a machine with an NVIDIA GPU, take the extra gpu in place of cpu, because the two exclude each other"

PRECISIONS = ("fp32", "int8", "int4", "int8-weights")
"""Precisions with CPU kernels in ONNX Runtime. FP16 has no such kernels: its values are cast to FP32 and back."""


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


def optimize(
    bundle: str | Path,
    backend: str = "cpu",
    *,
    graphs: Sequence[str] | None = None,
    progress: ProgressCallback | None = None,
) -> OptimizedReport:
    """Makes the optimized copy of a bundle for a backend; an existing copy is replaced.

    Args:
        bundle: The directory of the bundle.
        backend: The backend that will run the copy, one of :data:`BACKENDS`.
        graphs: Names of the graphs that are optimized; None for all.
        progress: Called with a stage's name, steps done and steps in all.

    Raises:
        UsageError: Copies are not made for this backend.
        BundleError: The directory is not a bundle or contains engines only, or ``cuda-decoder`` has no kernels for this
            decoder.
        BackendError: onnxruntime, onnx or the backend's package is not installed.
        OutputError: The copy cannot be written.
    """
    if backend not in BACKENDS:
        raise UsageError(
            f"expected {option('backend')} to be one of {', '.join(BACKENDS)}, got {backend}",
            "other backends run the bundle's own graphs and need no optimized copy",
        )
    require("onnxruntime", "the check of an optimized copy", BackendError, hint=GPU_HINT if "cuda" in backend else "")
    start = time.perf_counter()
    opened = Bundle.open(bundle)
    opened.require_graphs("an optimized copy")
    needed = BACKENDS[backend].needs
    if needed and (needed not in opened.manifest.graphs or needed not in (graphs or [needed])):
        raise BundleError(
            f"the copy for {backend} is made from the graph {needed}, which is not in the bundle or not selected",
            "use another backend",
        )
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
            report=progress or (lambda stage, done, total: None),
        )
        record = _record(task, backend, graphs)
        record.write(staging)
        opened.check_unchanged()
    return OptimizedReport(directory, record, time.perf_counter() - start)


def _record(task: CopyTask, backend: str, wanted: Sequence[str] | None) -> OptimizedRecord:
    """Makes the copies of the graphs in the target directory; returns the contents of ``optimized.json``."""
    manifest, maker = task.bundle.manifest, BACKENDS[backend]
    graphs: dict[str, OptimizedGraph] = {}
    skipped: dict[str, str] = {}
    files: dict[str, FileRecord] = {}
    names = list(manifest.graphs)
    last = max((names.index(name) for name in wanted), default=-1) if wanted is not None else len(names)
    for done, (name, graph) in enumerate(manifest.graphs.items()):
        task.report(f"optimize {name}", 0, 1)
        if wanted is not None and name not in wanted:
            if done < last and name in PROBED_GRAPHS:  # its outputs are inputs of a later graph
                task.upstream.update(run_session(task, name, Form(task.parent(name)[0]).open()))
        elif graph.precision not in maker.precisions:
            skipped[name] = f"it is in {graph.precision}, for which the CPU has no kernels of its own"
        elif name not in PROBED_GRAPHS:
            skipped[name] = "there is no recipe for it"
        else:
            found = maker.make(task, name)
            if isinstance(found, str):
                skipped[name] = found
            else:
                graphs[name], written = found
                files |= written
    task.report("optimize", len(manifest.graphs), len(manifest.graphs))
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
    """Writes the fastest rewritten version of a graph that passes the check.

    Returns:
        The copy's record and files; or the reason why there is no copy, as text.
    """
    parent, tolerance = task.parent(name)
    outputs = references(task, name)
    large = sum(task.bundle.manifest.files[data].size for data in task.bundle.graph(name).data_files) >= LARGE
    checked, fault = _checked_forms(task, name, outputs, large)
    portable = outputs[0]
    task.upstream.update(portable)
    if not checked:
        return fault or "no recipe applies to this graph"
    forms = [form for form, _ in checked]
    best, milliseconds = race.fastest(task, name, Form(parent), forms, together=not large)
    if best.recipe is None:
        return f"the portable graph is faster here ({milliseconds[0]:.1f} ms)"
    files = write_copy(best.file, parent, task.target, name, task.within)
    parity, cosine = agreement(checked[forms.index(best)][1], portable, tolerance)
    recipe = best.recipe
    graph = OptimizedGraph(
        f"{name}.onnx", recipe.passes, recipe.one_by_one, recipe.layout, parity, cosine, milliseconds
    )
    return graph, files


def _checked_forms(
    task: CopyTask, name: str, outputs: tuple[Arrays, Arrays], large: bool
) -> tuple[list[tuple[Form, Arrays]], str]:
    """Rewrites a graph by each recipe and checks the outputs.

    Args:
        task: The bundle, and the directories of the copies.
        name: The graph's name.
        outputs: Outputs of the exported graph, with and without rounded activations, as :func:`references` returns
            them.
        large: Whether only one recipe is tried: the first that shares the bundle's weights.

    Returns:
        The versions of the graph that passed the check, with their outputs; and the reason why a version failed the
        check (the last one that failed; empty if all passed).
    """
    parent, tolerance = task.parent(name)
    found: list[tuple[Form, Arrays]] = []
    fault = ""
    recipes = recipes_for(name, load_graph(parent))
    for number, recipe in enumerate(recipes):
        task.report(f"optimize {name}", number, len(recipes))
        model = load_graph(parent)
        passes = apply_recipe(model, recipe, task.context)
        if passes is None or any(form.recipe == Recipe(passes) for form, _ in found):
            continue
        applied = Recipe(passes)
        if applied.layout and large:  # it writes its own weights, but a large copy shares all of them
            continue
        try:
            form = Form(optimize_offline(model, task.scratch, f"{name}.{number}"), applied)
            result = run_session(task, name, form.open())
        except BackendError as error:  # a kernel that does not support these sizes
            if disk_is_full(error):
                raise
            fault = f"{' + '.join(passes)}: {error}"
            continue
        difference = fault_of(result, *outputs, tolerance)
        if difference:
            fault = f"{' + '.join(passes)}: {difference}"
            continue
        found.append((form, result))
        if large:
            break
    return found, fault


def _compiled(task: CopyTask, name: str) -> tuple[OptimizedGraph, dict[str, FileRecord]] | str:
    """Writes the model that OpenVINO compiles from a graph.

    A graph that OpenVINO cannot load has no copy; the other graphs still have one.

    Returns:
        The copy's record and files; or the reason why there is no copy, as text.
    """
    parent, tolerance = task.parent(name)
    portable, exact = references(task, name)
    task.upstream.update(portable)
    blob = task.target / f"{name}.blob"
    try:
        milliseconds = compile_to(parent, blob)
        result = run_session(task, name, OpenVinoSession(blob, 1, compiled=True))
    except BundleError as error:
        blob.unlink(missing_ok=True)
        return error.problem
    fault = fault_of(result, portable, exact, tolerance)
    if milliseconds[1] > milliseconds[0] * SOONER:
        fault = fault or f"the portable graph opens as fast here ({milliseconds[0]:.0f} ms)"
    if fault:
        blob.unlink()
        return fault
    parity, cosine = agreement(result, portable, tolerance)
    graph = OptimizedGraph(blob.name, ("compiled",), False, False, parity, cosine, milliseconds)
    return graph, {blob.name: FileRecord.of(blob)}


def versions() -> dict[str, str]:
    """Returns the versions of the packages that make or run a copy, by package name."""
    packages = ("onnxruntime", "openvino", "onnx", "onnx_ir", "numpy", "nvidia-cuda-nvrtc")
    gpus = nvidia_driver().gpus
    gpu = {GPU: gpus[0].name} if gpus else {}
    return {"blip2edge": __version__, **{name: installed(name) for name in packages}, **gpu}


@dataclass(frozen=True)
class Maker:
    """The rule of one backend: which graphs get an optimized copy, and which function makes the copy.

    Attributes:
        precisions: Precisions of the graphs that are optimized.
        make: Function that writes a graph's copy; returns the copy's record and files, or why there is no copy.
        needs: Name of the graph without which there is no copy; empty for none.
    """

    precisions: tuple[str, ...]
    make: Callable[[CopyTask, str], tuple[OptimizedGraph, dict[str, FileRecord]] | str]
    needs: str = ""


BACKENDS: Mapping[str, Maker] = {
    "cpu": Maker(PRECISIONS, _rewritten),
    "openvino": Maker((*PRECISIONS, "fp16"), _compiled),
    "cuda": Maker(RULED_PRECISIONS, ruled),
    "cuda-decoder": Maker((*RULED_PRECISIONS, "bf16"), compiled_decoder, needs=DECODER),
}
"""Backends for which optimized copies are made, each with the function that makes a copy."""
