"""``blip2edge build``: an engine a graph, each built in a process of its own, under one fingerprint."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.manifest import Bundle, FileRecord
from blip2edge.bundle.publishing import staged
from blip2edge.bundle.schema import DECODER
from blip2edge.engine.builder import Built, Settings, build_engine, layers_of
from blip2edge.engine.estimate import available_memory_mib, build_memory_mib
from blip2edge.engine.prepare import EnginePlan, capacity_of, plans_of, weight_bytes
from blip2edge.engine.step_graph import dense_table
from blip2edge.engine.support import version_for
from blip2edge.errors import EngineError, UsageError, option
from blip2edge.progress import ProgressCallback
from blip2edge.runtime.backends.engine_files import KIND, STEP, EngineRecord, EngineSet
from blip2edge.runtime.backends.fingerprint import Fingerprint, find_gpu, fingerprint
from blip2edge.runtime.tensorrt.session import JETSON, TARGETS, load_tensorrt, version_of

TIMING_CACHE = "timing.cache"
LEAST_CAPACITY = 2

Tell = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """What is built; the flags of ``blip2edge build``.

    Attributes:
        target: ``tensorrt``, on the board itself, or ``rtx``, anywhere.
        sm: Compute capabilities as 86 for 8.6; ``rtx`` only.
        workspace: Bound on the builder's scratch memory, in MiB.
        capacity: Slots of the decoder's cache; None for 256 beyond the visual tokens.
        max_batch: Rows (pictures times beams) that the decoder takes at once; None for what the export says.
        decoder: ``constant``, as the TensorRT runtime wants it, or ``concatenated``.
        timing_cache: Where the timings of kernels are kept; None for beside the engines.
        version_compatible, hardware_compatible: See :class:`~blip2edge.engine.builder.Settings`.

    Raises:
        UsageError: An option outside its range, or two that exclude each other.
    """

    target: str = "tensorrt"
    sm: tuple[int, ...] = ()
    workspace: int | None = None
    capacity: int | None = None
    max_batch: int | None = None
    decoder: str = "constant"
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"{option('target')} is one of {', '.join(TARGETS)}, not {self.target}")
        if self.decoder not in ("constant", "concatenated"):
            raise UsageError(f"{option('decoder')} is constant or concatenated, not {self.decoder}")
        anywhere = TARGETS[self.target].builds_anywhere
        if self.sm and not anywhere:
            raise UsageError(
                f"{option('sm')} is for {option('target')} rtx: TensorRT builds for the GPU it runs on",
                f"leave {option('sm')} out, or add {option('target')} rtx",
            )
        for name, given in (
            (option("timing_cache"), self.timing_cache is not None),
            (option("version_compatible", on=True), self.version_compatible),
            (option("hardware_compatible", on=True), self.hardware_compatible),
        ):
            if given and anywhere:
                raise UsageError(
                    f"{name} is for {option('target')} tensorrt: TensorRT for RTX has its own way",
                    f"leave {name} out",
                )
        if self.hardware_compatible and JETSON.exists():
            raise UsageError(
                f"{option('hardware_compatible', on=True)} is not offered by JetPack", "build on each board"
            )
        if self.capacity is not None and self.capacity < LEAST_CAPACITY:
            raise UsageError(f"{option('capacity')} must be at least {LEAST_CAPACITY}, not {self.capacity}")

    def words(self) -> tuple[str, ...]:
        """The flags that make the same engines again, beside ``--target``."""
        words: list[str] = [part for number in self.sm for part in ("--sm", str(number))]
        for flag, value in (
            ("--workspace", self.workspace),
            ("--capacity", self.capacity),
            ("--max-batch", self.max_batch),
        ):
            words += [] if value is None else [flag, str(value)]
        words += [] if self.decoder == "constant" else ["--decoder", self.decoder]
        words += ["--version-compatible"] if self.version_compatible else []
        return (*words, *(["--hardware-compatible"] if self.hardware_compatible else []))


@dataclass(frozen=True)
class BuildReport:
    """What a build made: the folder, its fingerprint, and an entry a graph.

    Attributes:
        directory: Where the engines lie.
        fingerprint: What they are tied to.
        engines: What was built, by the graph's name.
        memory_mib: The largest estimate of what one build takes, in MiB.
        bundle: Where a bundle of engines alone was asked for, its directory.
    """

    directory: Path
    fingerprint: Fingerprint
    engines: dict[str, Built]
    memory_mib: int = 0
    bundle: Path | None = None


@dataclass
class _Job:
    """One build."""

    bundle: Bundle
    options: BuildOptions
    mark: Fingerprint
    plans: list[EnginePlan]
    version: tuple[int, int]
    settings: Settings
    built: dict[str, Built] = field(default_factory=dict)


def build_bundle(
    bundle: str | Path,
    *,
    target: str = "tensorrt",
    sm: Sequence[int] = (),
    output: str | Path | None = None,
    force: bool = False,
    progress: ProgressCallback | None = None,
    tell: Tell | None = None,
    **options: Any,
) -> BuildReport:
    """Builds the engines of a bundle.

    Args:
        bundle: Its directory. Engines go into its ``engines`` folder, or to the user's cache where it is read-only.
        target: ``tensorrt`` or ``rtx``.
        sm: Compute capabilities; ``rtx`` only.
        output: A directory for a bundle of the engines alone, which a board loads without any ONNX file.
        force: Whether ``output`` is replaced if it exists.
        progress: Called with a graph's name, engines done and engines in all.
        tell: Called with a sentence on the memory that the build takes, before it begins.
        **options: Further fields of :class:`BuildOptions`.

    Raises:
        EngineError: TensorRT is absent, too old, does not take a graph, or fails.
        UsageError: An option outside its range.
        OutputError: ``output`` exists or cannot be written.
    """
    chosen = BuildOptions(target=target, sm=tuple(sm), **options)
    job = _job(Bundle.open(bundle), chosen)
    memory = _estimate(job, tell)
    if output is None:
        directory = _build_into(job, job.bundle.derive(KIND), progress)
        return BuildReport(directory, job.mark, job.built, memory)
    with staged(Path(output), force) as staging:
        (staging / KIND).mkdir()
        directory = _build_into(job, staging / KIND, progress)
        _write_board(job, staging)
        place = Path(output) / directory.relative_to(staging)
    return BuildReport(place, job.mark, job.built, memory, Path(output))


def _job(bundle: Bundle, options: BuildOptions) -> _Job:
    if bundle.manifest.engines_of:
        raise EngineError(
            f"{bundle.path} holds engines alone, and no graphs to build from",
            "build from the bundle that `blip2edge export` wrote",
        )
    trt = load_tensorrt(options.target)
    mark = fingerprint(
        options.target,
        str(trt.__version__),
        bundle.sha256,
        options.sm,
        version_compatible=options.version_compatible,
        hardware_compatible=options.hardware_compatible,
    )
    constant = options.decoder == "constant"
    plans = plans_of(bundle, capacity=options.capacity, most_rows=options.max_batch, constant=constant)
    settings = Settings(
        options.sm,
        options.workspace,
        options.timing_cache,
        options.version_compatible,
        options.hardware_compatible,
    )
    return _Job(bundle, options, mark, plans, version_of(trt), settings)


def _estimate(job: _Job, tell: Tell | None) -> int:
    """The largest memory that one engine's build may take, told beforehand; MiB."""
    files = {name: record.size for name, record in job.bundle.manifest.files.items()}
    needs = {
        plan.name: build_memory_mib(weight_bytes(plan, files), job.options.workspace) for plan in job.plans
    }
    name, most = max(needs.items(), key=lambda item: item[1])
    free = available_memory_mib()
    if tell is not None:
        tell(
            f"the largest build ({name}) may take about {most} MiB"
            + (f", {free} MiB are free" if free else "")
        )
        if free is not None and free < most:
            tell(
                "warning: that is more than is free; lower the workspace, the capacity or the largest batch, add swap, "
                "or stop what else runs"
            )
    return most


def _build_into(job: _Job, root: Path, progress: ProgressCallback | None) -> Path:
    """Builds every engine in a folder beside its place, which it takes when all are there."""
    if job.options.target == "tensorrt" and job.settings.timing_cache is None:
        job.settings = replace(job.settings, timing_cache=job.bundle.derive(KIND) / TIMING_CACHE)
    directory = root / job.mark.name
    with _replacing(directory) as staging:
        for done, plan in enumerate(job.plans):
            if progress is not None:
                progress(f"build {plan.name}", done, len(job.plans))
            job.built[plan.name] = _in_process(job, plan, staging)
        if progress is not None:
            progress("build", len(job.plans), len(job.plans))
        _record(job, staging).write()
    return directory


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    staging = Path(tempfile.mkdtemp(prefix=".engines.", dir=directory.parent))
    try:
        yield staging
        shutil.rmtree(directory, ignore_errors=True)
        staging.chmod(0o755)
        staging.rename(directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _in_process(job: _Job, plan: EnginePlan, staging: Path) -> Built:
    """Builds one engine in a fresh process: when it ends, all of the builder's memory is free again."""
    context = multiprocessing.get_context("spawn")
    output = staging / f"{plan.name}.engine"
    look = not job.options.sm and find_gpu() is not None
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(_build_one, job.options.target, plan, job.version, output, job.settings, look)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise EngineError(
                f"the builder's process ended while it built {plan.name}, as it does when memory runs out",
                f"lower {option('workspace')}, {option('capacity')} or {option('max_batch')}, "
                "add swap, or stop what else runs on the board",
            ) from error


def _build_one(
    target: str, plan: EnginePlan, version: tuple[int, int], output: Path, settings: Settings, look: bool
) -> Built:
    """One engine; ``look`` says whether its layers are to be read, which takes a GPU."""
    trt, written = load_tensorrt(target), output.with_suffix(".safetensors")
    if plan.step is not None:
        dtype = plan.step.spec.outputs[1].dtype
        table = dense_table(plan.step.table, dtype, written)
        plan = replace(plan, path=table.parent / f"{STEP}.onnx", step=replace(plan.step, table=table))
    built = build_engine(trt, plan, version_for(target, version), output, settings)
    written.unlink(missing_ok=True)
    return replace(built, landed=layers_of(trt, output)) if look else built


def _record(job: _Job, directory: Path) -> EngineSet:
    constant = next((plan for plan in job.plans if plan.cache is not None), None)
    return EngineSet(
        fingerprint=job.mark.to_json(),
        rebuild=job.options.words(),
        capacity=0 if constant is None else capacity_of(job.bundle.manifest, job.options.capacity),
        engines={
            plan.name: EngineRecord(
                spec=plan.spec,
                file=FileRecord.of(directory / job.built[plan.name].file.name),
                precision=_precision(job.bundle, plan.name),
                profiles=job.built[plan.name].profiles,
                seconds=round(job.built[plan.name].seconds, 1),
                warnings=job.built[plan.name].warnings,
                asked=job.built[plan.name].asked,
                landed=job.built[plan.name].landed,
            )
            for plan in job.plans
        },
        directory=directory,
    )


def _precision(bundle: Bundle, name: str) -> str:
    graphs = bundle.manifest.graphs
    return graphs[DECODER if name == STEP else name].precision


def _write_board(job: _Job, staging: Path) -> None:
    """The rest of a bundle without graphs: its manifest, tokenizers and token table."""
    graphs = {record.spec.file for record in job.bundle.manifest.graphs.values()}
    graphs |= {name for record in job.bundle.manifest.graphs.values() for name in record.data_files}
    kept = {name: record for name, record in job.bundle.manifest.files.items() if name not in graphs}
    for name in kept:
        shutil.copyfile(job.bundle.file(name), staging / name)
    replace(job.bundle.manifest, files=kept, engines_of=job.bundle.sha256).write(staging)
