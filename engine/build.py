"""Implements ``blip2edge build``: builds a TensorRT engine for each graph of a bundle, each in a new process."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.outputs.publishing import check_not_source, staged
from blip2edge.bundle.schema import DECODER
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.engine.build_errors import LESS_MEMORY
from blip2edge.engine.builder import BuildOptions, BuiltEngine, build_engine, layers_of
from blip2edge.engine.decoder.cache_forms import FORMS
from blip2edge.engine.decoder.step_graph import dense_table
from blip2edge.engine.prepare import PROMPT_TEXT, EnginePlan, capacity_of, plans_of, prompt_of, weight_bytes
from blip2edge.engine.support import version_for
from blip2edge.errors import EngineError, UsageError, one_line, option
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.base import check_precision
from blip2edge.runtime.backends.engine_files import (
    KIND,
    STEP,
    EngineRecord,
    EngineSet,
    Fingerprint,
    fingerprint,
)
from blip2edge.runtime.bench.memory import MIB, build_need, check_memory, machine_memory
from blip2edge.runtime.tensorrt.session import load_tensorrt, version_of

TIMING_CACHE = "timing.cache"
PR_SET_PDEATHSIG = 1  # linux/prctl.h

Notify = Callable[[str], None]


LEAST_TEXT = 4
"""Text tokens (prompt and answer) that must fit into the KV cache in addition to the visual tokens."""


@dataclass(frozen=True)
class BuildReport:
    """The result of :func:`build_bundle`.

    Attributes:
        directory: The folder with the engines.
        fingerprint: The GPU, the TensorRT version and so on for which the engines were built.
        engines: The built engines, by graph name.
        memory_mib: The estimated memory for building an engine, in MiB: that of the engine that needs most.
        bundle: The new bundle that holds only engines; None without the argument ``output``.
        cache: Kind of the decoder's KV cache, one of ``DECODER_CACHES`` except ``auto``; empty without a decoder.
        cache_reason: Why ``--decoder auto`` did not choose the KV cache that is updated in place; empty if it did, or
            if another kind was given.
    """

    directory: Path
    fingerprint: Fingerprint
    engines: dict[str, BuiltEngine]
    memory_mib: int = 0
    bundle: Path | None = None
    cache: str = ""
    cache_reason: str = ""


@dataclass
class _BuildTask:
    """The settings of one build, and the engines that are built so far."""

    bundle: Bundle
    options: BuildOptions
    fingerprint: Fingerprint
    plans: list[EnginePlan]
    version: tuple[int, int]
    built: dict[str, BuiltEngine] = field(default_factory=dict)


def build_bundle(
    bundle: str | Path,
    *,
    target: str = "tensorrt",
    sm: Sequence[int] = (),
    output: str | Path | None = None,
    force: bool = False,
    anyway: bool = False,
    progress: ProgressCallback | None = None,
    notify: Notify | None = None,
    **options: Any,
) -> BuildReport:
    """Builds the engines of a bundle.

    Args:
        bundle: Directory of the bundle. Engines go into its ``engines`` folder, or into the user's cache if the bundle
            is read-only.
        target: ``tensorrt`` or ``rtx``.
        sm: Compute capabilities of the GPUs to build for, without the point: 86 for 8.6; only for ``rtx``.
        output: Directory of a new bundle that holds only engines, no ONNX files; None for no such bundle.
        force: Whether ``output`` is replaced if it exists.
        anyway: Whether to build even if this machine probably has too little memory.
        progress: Called with a text that names the graph, the number of finished engines, and the number of all.
        notify: Called before the build with sentences about the memory that the build needs, and about the KV cache.
        **options: Further fields of :class:`BuildOptions`.

    Raises:
        EngineError: TensorRT is not installed, is too old, does not support a graph, or fails.
        UsageError: An option is outside its range.
        OutputError: ``output`` exists or cannot be written.
    """
    chosen = BuildOptions(target=target, sm=tuple(sm), **options)
    task = _task(Bundle.open(bundle), chosen)
    decoder = next((plan for plan in task.plans if plan.name == DECODER), None)
    form, kept = (decoder.form, decoder.reason) if decoder is not None else ("", "")
    if kept and notify is not None:
        notify(f"the decoder copies its KV cache in each step, because {kept}")
    memory = _check_memory(task, anyway, notify)
    if output is None:
        directory = _build_into(task, task.bundle.derive(KIND), progress)
        return BuildReport(directory, task.fingerprint, task.built, memory, None, form, kept)
    check_not_source(Path(output), task.bundle.path)
    with staged(Path(output), force) as staging:
        (staging / KIND).mkdir()
        directory = _build_into(task, staging / KIND, progress)
        _write_other_files(task, staging)
        place = Path(output) / directory.relative_to(staging)
    return BuildReport(place, task.fingerprint, task.built, memory, Path(output), form, kept)


def _task(bundle: Bundle, options: BuildOptions) -> _BuildTask:
    bundle.require_graphs("building engines", EngineError)
    least = prompt_of(bundle.manifest) - PROMPT_TEXT + LEAST_TEXT
    if options.capacity is not None and options.capacity < least:
        raise UsageError(
            f"expected {option('capacity')} of at least {least} (for the visual tokens and a few tokens of text), got "
            f"{options.capacity}"
        )
    check_precision(options.target, bundle.manifest.precision)
    trt = load_tensorrt(options.target)
    target = replace(
        fingerprint(options.target, str(trt.__version__), bundle.sha256, options.sm),
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
    )
    plans = plans_of(
        bundle,
        version_for(options.target, version_of(trt)),
        capacity=options.capacity,
        most_rows=options.max_batch,
        decoder=options.decoder,
    )
    return _BuildTask(bundle, options, target, plans, version_of(trt))


def _check_memory(task: _BuildTask, anyway: bool, notify: Notify | None) -> int:
    """Estimates the memory of each engine's build, and compares the largest estimate with this machine's memory.

    Returns:
        The largest estimate in MiB.

    Raises:
        EngineError: The memory is too small, and ``anyway`` is False.
    """
    files = {name: record.size for name, record in task.bundle.manifest.files.items()}
    needs = [build_need(weight_bytes(plan, files), task.options.workspace, plan.name) for plan in task.plans]
    need = max(needs, key=lambda one: one.likely)
    memory = machine_memory()
    most = -(-need.likely // MIB)
    if notify is not None:
        free = f", {memory.free // MIB} MiB are free" if memory is not None else ""
        notify(f"{need.what} may need about {most} MiB of memory{free}")
    check_memory(need, EngineError, anyway=anyway, notify=notify, memory=memory)
    return most


def _build_into(task: _BuildTask, root: Path, progress: ProgressCallback | None) -> Path:
    """Builds every engine into a temporary folder in ``root``; renames the folder when all engines are built.

    Returns:
        The folder; its name is the name of the fingerprint.
    """
    if task.options.target == "tensorrt" and task.options.timing_cache is None:
        task.options = replace(task.options, timing_cache=task.bundle.derive(KIND) / TIMING_CACHE)
    directory = root / task.fingerprint.name
    with staged(directory, force=True, marker=None) as staging:
        for done, plan in enumerate(task.plans):
            if progress is not None:
                progress(f"build {plan.name}", done, len(task.plans))
            task.built[plan.name] = _in_process(task, plan, staging)
        if progress is not None:
            progress("build", len(task.plans), len(task.plans))
        _record(task, staging).write()
    return directory


def _in_process(task: _BuildTask, plan: EnginePlan, staging: Path) -> BuiltEngine:
    """Builds one engine in a new process, so that all memory of the builder is free afterwards."""
    context = multiprocessing.get_context("spawn")
    output = staging / f"{plan.name}.engine"
    inspect_layers = not task.options.sm and bool(probe.nvidia_driver().gpus)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_end_with_parent, initargs=(os.getpid(),)) as pool:
        future = pool.submit(_build_one, task.options, plan, task.version, output, inspect_layers)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the builder's process was killed while it built {plan.name}, probably because memory ran out",
                LESS_MEMORY,
            ) from error


def _end_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when its parent process is killed, so that memory and GPU become free.

    Args:
        parent: Process number of the parent.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was killed before
            os.kill(os.getpid(), signal.SIGKILL)


def _build_one(
    options: BuildOptions, plan: EnginePlan, version: tuple[int, int], output: Path, inspect_layers: bool
) -> BuiltEngine:
    """Builds one engine.

    Args:
        options: The options of the build.
        plan: The graph to build, with its inputs and outputs.
        version: Version of the installed TensorRT: major and minor number.
        output: The engine file.
        inspect_layers: Whether to count the engine's layers by precision, which needs a GPU.
    """
    trt, written = load_tensorrt(options.target), output.with_suffix(".safetensors")
    if plan.step is not None:
        dtype = plan.step.spec.outputs[1].dtype
        table = dense_table(plan.step.table, dtype, written)
        plan = replace(plan, path=table.parent / f"{STEP}.onnx", step=replace(plan.step, table=table))
    built = build_engine(trt, plan, version_for(options.target, version), output, options)
    written.unlink(missing_ok=True)
    if not inspect_layers:
        return built
    try:
        return replace(built, landed=layers_of(trt, output))
    except (EngineError, MemoryError) as error:  # the engine is finished; its report must not discard it
        return replace(built, warnings=(*built.warnings, f"the layers were not counted: {one_line(error)}"))


def _record(task: _BuildTask, directory: Path) -> EngineSet:
    fixed = any(plan.form in FORMS for plan in task.plans)
    return EngineSet(
        fingerprint=task.fingerprint.to_json(),
        rebuild=task.options.flags(),
        capacity=capacity_of(task.bundle.manifest, task.options.capacity) if fixed else 0,
        engines={
            plan.name: EngineRecord(
                spec=plan.spec,
                file=FileRecord.of(directory / task.built[plan.name].file.name),
                precision=_precision(task.bundle, plan.name),
                profiles=task.built[plan.name].profiles,
                seconds=round(task.built[plan.name].seconds, 1),
                warnings=task.built[plan.name].warnings,
                asked=task.built[plan.name].asked,
                landed=task.built[plan.name].landed,
                cache=plan.form,
            )
            for plan in task.plans
        },
        directory=directory,
    )


def _precision(bundle: Bundle, name: str) -> str:
    graphs = bundle.manifest.graphs
    return graphs[DECODER if name == STEP else name].precision


def _write_other_files(task: _BuildTask, staging: Path) -> None:
    """Writes the other files of a bundle that holds only engines: manifest, tokenizers and token embedding table."""
    graphs = {record.spec.file for record in task.bundle.manifest.graphs.values()}
    graphs |= {name for record in task.bundle.manifest.graphs.values() for name in record.data_files}
    kept = {name: record for name, record in task.bundle.manifest.files.items() if name not in graphs}
    for name in kept:
        shutil.copyfile(task.bundle.file(name), staging / name)
    replace(task.bundle.manifest, files=kept, engines_of=task.bundle.sha256).write(staging)
