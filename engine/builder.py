"""Builds an engine with TensorRT 10.3 to 11.x or TensorRT for RTX, as a strongly typed network.

Casts and Q/DQ nodes in the graph fix the precision of every operator, so the builder chooses no precision. Some
versions of TensorRT's Python package lack names that other versions have; the code checks that such a name exists
before using it. ``tests/engine/test_api_names.py`` compares all used names with the names of each version.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.bundle.outputs.locks import BusyError, write_file
from blip2edge.choices import DECODER_CACHES
from blip2edge.engine.build_errors import build_error
from blip2edge.engine.decoder.cache_forms import AUTO
from blip2edge.engine.layers import count_precisions
from blip2edge.engine.operators import ParserVersion
from blip2edge.engine.prepare import EnginePlan
from blip2edge.engine.profiles import profiles_of
from blip2edge.errors import EngineError, UsageError, option
from blip2edge.runtime.tensorrt.session import JETSON, TARGETS, make_logger, version_of

MIB = 1 << 20  # bytes
LEAST_CAPACITY = 2


@dataclass(frozen=True)
class BuildOptions:
    """The options of ``blip2edge build``.

    Attributes:
        target: ``tensorrt``, which builds on the board itself, or ``rtx``, which builds anywhere.
        sm: Compute capabilities of the GPUs to build for, 86 for 8.6; ``rtx`` only.
        workspace: Limit of the builder's scratch memory, in MiB; None for the builder's default.
        capacity: Slots of the decoder's KV cache; None for the usual length of the prompt plus 256.
        max_batch: Largest number of rows (pictures times beams) of the decoder; None for the value of the export.
        decoder: Kind of the decoder's KV cache, one of ``DECODER_CACHES``. ``concatenated`` is the growing cache of the
            exported graph; the TensorRT runtime does not run it.
        timing_cache: File with the measured times of kernels, which makes later builds faster; None for a file in the
            directory of the engines. ``tensorrt`` only.
        version_compatible: Whether the engines also run on newer TensorRT versions with the same major number; such
            engines are larger. ``tensorrt`` only.
        hardware_compatible: Whether the engines also run on other GPUs from Ampere on; such engines may be slower.
            ``tensorrt`` only.

    Raises:
        UsageError: An option is outside its range, or two options exclude each other.
    """

    target: str = "tensorrt"
    sm: tuple[int, ...] = ()
    workspace: int | None = None
    capacity: int | None = None
    max_batch: int | None = None
    decoder: str = AUTO
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"expected {option('target')} to be one of {', '.join(TARGETS)}, got {self.target}")
        if self.decoder not in DECODER_CACHES:
            raise UsageError(
                f"expected {option('decoder')} to be one of {', '.join(DECODER_CACHES)}, got {self.decoder}"
            )
        anywhere = TARGETS[self.target].builds_anywhere
        if self.sm and not anywhere:
            raise UsageError(
                f"{option('sm')} requires {option('target')} rtx: TensorRT builds for the GPU of this machine only",
                f"leave {option('sm')} out, or add {option('target')} rtx",
            )
        for name, given in (
            (option("timing_cache"), self.timing_cache is not None),
            (option("version_compatible", on=True), self.version_compatible),
            (option("hardware_compatible", on=True), self.hardware_compatible),
        ):
            if given and anywhere:
                raise UsageError(
                    f"{name} requires {option('target')} tensorrt: TensorRT for RTX does not support it",
                    f"leave {name} out",
                )
        if self.hardware_compatible and JETSON.exists():
            raise UsageError(
                f"{option('hardware_compatible', on=True)} is not available on a Jetson",
                "build the engines on each board",
            )
        if self.capacity is not None and self.capacity < LEAST_CAPACITY:
            raise UsageError(f"{option('capacity')} must be at least {LEAST_CAPACITY}, not {self.capacity}")

    def flags(self) -> tuple[str, ...]:
        """Returns the command-line flags, besides ``--target``, that build the same engines again."""
        flags: list[str] = [part for number in self.sm for part in ("--sm", str(number))]
        for flag, value in (
            ("--workspace", self.workspace),
            ("--capacity", self.capacity),
            ("--max-batch", self.max_batch),
        ):
            flags += [] if value is None else [flag, str(value)]
        flags += [] if self.decoder == AUTO else ["--decoder", self.decoder]
        flags += ["--version-compatible"] if self.version_compatible else []
        return (*flags, *(["--hardware-compatible"] if self.hardware_compatible else []))


DEFAULTS = BuildOptions()


@dataclass(frozen=True)
class BuiltEngine:
    """A finished engine.

    Attributes:
        file: Path of the engine file.
        size: Size of the file in bytes.
        seconds: Time to parse the graph and build the engine.
        profiles: Names of the optimization profiles, in the order of their numbers in TensorRT.
        warnings: Warnings of the TensorRT builder.
        asked: Number of matrix multiplications and convolutions in the ONNX graph, by precision.
        landed: Number of layers in the engine, by precision; None if there was no GPU to inspect the engine.
    """

    file: Path
    size: int
    seconds: float
    profiles: tuple[str, ...]
    warnings: tuple[str, ...]
    asked: Mapping[str, int] = field(default_factory=dict)
    landed: Mapping[str, int] | None = None


def build_engine(
    trt: Any, plan: EnginePlan, version: ParserVersion, output: Path, options: BuildOptions = DEFAULTS
) -> BuiltEngine:
    """Parses a graph with TensorRT, builds the engine and writes it to a file.

    The parser finds the weights in the directory of the graph.

    Args:
        trt: The TensorRT module from :func:`load_tensorrt`.
        plan: The graph, with its inputs and outputs.
        version: The TensorRT version whose operators the graph may use.
        output: The engine file.
        options: The options of the build.

    Raises:
        EngineError: The check or the parser refuses a node, or the builder fails.
    """
    start = time.perf_counter()
    data, asked = plan.serialised(version)
    logger, messages = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(data, str(plan.path)):
        raise EngineError(
            _refusal(parser, plan.path),
            f"export the checkpoint with another {option('precision')}, or report the node as an issue of blip2edge",
        )
    config = builder.create_builder_config()
    names = []
    for profile in profiles_of(plan.spec, plan.prompt):
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.shapes(plan.spec).items():
            shapes.set_shape(name, low, best, high)
        config.add_optimization_profile(shapes)
        names.append(profile.name)
    _configure(trt, config, options)
    cache = _read_timings(config, options.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise build_error(plan, options.target, options.workspace, messages)
    output.write_bytes(memoryview(engine))
    if cache is not None and options.timing_cache is not None:
        with suppress(BusyError):  # another build writes it at this moment
            write_file(options.timing_cache, memoryview(config.get_timing_cache().serialize()))
    seconds = time.perf_counter() - start
    warnings = tuple(dict.fromkeys(messages))
    return BuiltEngine(output, output.stat().st_size, seconds, tuple(names), warnings, asked)


def layers_of(trt: Any, path: Path) -> dict[str, int]:
    """Counts the layers of an engine by precision; needs the GPU for which the engine was built.

    Raises:
        EngineError: This machine cannot open the engine.
    """
    logger, messages = make_logger(trt)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = (
        True  # version-compatible engines contain host code; this one was just built here
    )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        opened = runtime.deserialize_cuda_engine(content)
    if opened is None:
        reason = messages[-1] if messages else "no reason given"
        raise EngineError(
            f"{path} cannot be opened on this machine ({reason})", "build the engines again on this machine"
        )
    inspector = opened.create_engine_inspector()
    return count_precisions(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _network_flags(trt: Any) -> int:
    """Returns the flags for a strongly typed network: ``STRONGLY_TYPED`` up to TensorRT 10.x, 0 from 11 on.

    From TensorRT 11 on, every network is strongly typed.
    """
    if version_of(trt)[0] >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _refusal(parser: Any, graph: Path) -> str:
    """Returns the parser's error as text, with the node that the parser does not support."""
    if parser.num_errors == 0:
        return f"TensorRT cannot read {graph}"
    error = parser.get_error(0)
    text = " ".join(str(error.desc()).split())
    return f"TensorRT does not support the node {error.node_name()!r} ({error.node_operator()}) of {graph}: {text}"


def _configure(trt: Any, config: Any, options: BuildOptions) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the inspector reports no precisions
    config.clear_flag(trt.BuilderFlag.TF32)  # it has 10 bits of mantissa, and fp32 promises the same ids as torch
    if options.target == "rtx":
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)  # no allocation in a run: it can be a CUDA graph
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * MIB)
    if options.sm:
        _name_gpus(trt, config, options.sm)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _name_gpus(trt: Any, config: Any, compute_capabilities: Sequence[int]) -> None:
    known = {name: value for name, value in vars(trt.ComputeCapability).items() if re.fullmatch(r"SM\d+", name)}
    unknown = [number for number in compute_capabilities if f"SM{number}" not in known]
    if unknown:
        numbers = ", ".join(sorted((name[2:] for name in known), key=int))
        raise EngineError(
            f"TensorRT for RTX {trt.__version__} does not support the compute capability {unknown[0]}",
            f"{option('sm')} takes {numbers}; for other GPUs "
            f"build with {option('target')} tensorrt on the machine itself",
        )
    config.num_compute_capabilities = len(compute_capabilities)
    for index, number in enumerate(compute_capabilities):
        config.set_compute_capability(known[f"SM{number}"], index)


def _read_timings(config: Any, path: Path | None) -> Any:
    """Loads the kernel times of earlier builds from the file ``path`` into ``config``.

    Returns:
        The timing cache, which is empty if the file does not exist; None if ``path`` is None.
    """
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache
