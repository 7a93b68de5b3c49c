"""``blip2edge build``: an engine a graph, each built in a process of its own, under one fingerprint."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.engine.builder import TARGETS, Built, build_engine, load_tensorrt
from blip2edge.engine.fingerprint import Fingerprint, fingerprint
from blip2edge.errors import EngineError, UsageError
from blip2edge.manifest import Bundle, FileRecord, GraphRecord

ENGINES = "engines"
ENGINE_MANIFEST = "engine.json"
TIMING_CACHE = "timing.cache"


@dataclass(frozen=True)
class BuildReport:
    """What a build made: the folder, its fingerprint, and an entry a graph."""

    directory: Path
    fingerprint: Fingerprint
    engines: dict[str, Built]


def build_bundle(
    bundle: str | Path,
    *,
    target: str = "tensorrt",
    sm: Sequence[int] = (),
    workspace: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> BuildReport:
    """Builds the engines of a bundle.

    Args:
        bundle: Its directory. Engines go into its ``engines`` folder, or to the user's cache where it is read-only.
        target: ``tensorrt``, on the board itself, or ``rtx``, anywhere.
        sm: Compute capabilities as 86 for 8.6; ``rtx`` only.
        workspace: Bound on the builder's scratch memory, in MiB.
        progress: Called with a graph's name, engines done and engines in all.

    Raises:
        EngineError: TensorRT is absent, too old, refuses a graph or fails.
        UsageError: ``sm`` with ``tensorrt``, which builds for the GPU it runs on.
    """
    if target not in TARGETS:
        raise UsageError(f"--target is one of {', '.join(TARGETS)}, not {target}")
    if sm and not TARGETS[target].builds_anywhere:
        raise UsageError(
            "--sm is for --target rtx: TensorRT builds for the GPU it runs on",
            "leave --sm out, or add --target rtx",
        )
    opened = Bundle.open(bundle)
    mark = fingerprint(target, str(load_tensorrt(target).__version__), opened.path, sm)
    root = opened.derive(ENGINES)
    staging = Path(tempfile.mkdtemp(prefix=".engines.", dir=root))
    try:
        built: dict[str, Built] = {}
        for done, (name, graph) in enumerate(opened.manifest.graphs.items()):
            if progress is not None:
                progress(f"build {name}", done, len(opened.manifest.graphs))
            timings = root / TIMING_CACHE if target == "tensorrt" else None
            built[name] = _in_process(target, opened, graph, staging, tuple(sm), workspace, timings)
        if progress is not None:
            progress("build", len(built), len(built))
        _write_manifest(staging, mark, opened, built)
        directory = root / mark.name
        shutil.rmtree(directory, ignore_errors=True)
        staging.chmod(0o755)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return BuildReport(directory, mark, built)


def _in_process(
    target: str,
    bundle: Bundle,
    graph: GraphRecord,
    staging: Path,
    sm: tuple[int, ...],
    workspace: int | None,
    timings: Path | None,
) -> Built:
    """Builds one engine in a fresh process: when it ends, all of the builder's memory is free again."""
    context = multiprocessing.get_context("spawn")
    output = staging / f"{graph.spec.name}.engine"
    arguments: dict[str, Any] = {
        "compute_capabilities": sm,
        "workspace_mib": workspace,
        "timing_cache": timings,
    }
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(_build_one, target, bundle.file(graph.spec.file), graph.spec, output, arguments)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the builder's process ended while it built {graph.spec.name}, as it does when memory runs out",
                "lower --workspace, add swap, or stop what else runs on the board",
            ) from error


def _build_one(target: str, graph: Path, spec: Any, output: Path, arguments: dict[str, Any]) -> Built:
    return build_engine(load_tensorrt(target), graph, spec, output, **arguments)


def _write_manifest(directory: Path, mark: Fingerprint, bundle: Bundle, built: dict[str, Built]) -> None:
    engines = {}
    for name, engine in built.items():
        record = FileRecord.of(directory / engine.file.name)
        engines[name] = {
            "file": engine.file.name,
            "sha256": record.sha256,
            "size": record.size,
            "precision": bundle.manifest.graphs[name].precision,
            "profiles": list(engine.profiles),
            "seconds": round(engine.seconds, 1),
            "warnings": list(engine.warnings),
        }
    document = {"schema_version": 1, "fingerprint": mark.to_json(), "engines": engines}
    (directory / ENGINE_MANIFEST).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
