"""Builds an engine with TensorRT 10.3 to 11.x or TensorRT for RTX, as a strongly typed network.

The graph fixes every precision (by casts and Q/DQ nodes), so the builder chooses none. Names that some versions of
the Python binding lack are checked before they are used; ``tests/engine/test_api_names.py`` checks all names against
the lists of each version.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.engine.layers import count_precisions
from blip2edge.engine.operators import ParserVersion
from blip2edge.engine.prepare import EnginePlan
from blip2edge.engine.profiles import profiles_of
from blip2edge.errors import EngineError, option
from blip2edge.runtime.tensorrt.session import make_logger, version_of

MIB = 1 << 20  # bytes


@dataclass(frozen=True)
class Settings:
    """The builder's settings.

    Attributes:
        compute_capabilities: GPUs to build for, 86 for 8.6; TensorRT for RTX only, which builds without the GPU.
        workspace_mib: Limit of the scratch memory, in MiB; None for the builder's default.
        timing_cache: File that keeps the timings of kernels from build to build; TensorRT only.
        version_compatible: The engine also runs on newer versions with the same major number; it is larger.
        hardware_compatible: The engine also runs on other GPUs from Ampere on; it may be slower.
    """

    compute_capabilities: tuple[int, ...] = ()
    workspace_mib: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False


NO_SETTINGS = Settings()


@dataclass(frozen=True)
class BuiltEngine:
    """A finished engine.

    Attributes:
        file: Its path.
        size: Bytes.
        seconds: Time to parse the graph and build the engine.
        profiles: Names of its optimization profiles, by index.
        warnings: Messages of the builder.
        asked: Number of the graph's products by their precision.
        landed: Number of the engine's layers by the precision that TensorRT chose; None without a GPU to inspect it.
    """

    file: Path
    size: int
    seconds: float
    profiles: tuple[str, ...]
    warnings: tuple[str, ...]
    asked: Mapping[str, int] = field(default_factory=dict)
    landed: Mapping[str, int] | None = None


def build_engine(
    trt: Any, plan: EnginePlan, version: ParserVersion, output: Path, settings: Settings = NO_SETTINGS
) -> BuiltEngine:
    """Parses a graph, its weights found by its path, and writes its engine.

    Args:
        trt: The module from :func:`load_tensorrt`.
        plan: The graph and its tensors.
        version: The version whose operators the graph may use.
        output: The engine file.
        settings: The builder's settings.

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
            _refusal(parser, plan.path), f"export it with another {option('precision')}, or report the node"
        )
    config = builder.create_builder_config()
    names = []
    for profile in profiles_of(plan.spec, plan.prompt):
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.shapes(plan.spec).items():
            shapes.set_shape(name, low, best, high)
        config.add_optimization_profile(shapes)
        names.append(profile.name)
    _configure(trt, config, settings)
    cache = _read_timings(config, settings.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _build_error(plan.path, messages)
    output.write_bytes(memoryview(engine))
    if cache is not None and settings.timing_cache is not None:
        settings.timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    seconds = time.perf_counter() - start
    warnings = tuple(dict.fromkeys(messages))
    return BuiltEngine(output, output.stat().st_size, seconds, tuple(names), warnings, asked)


def layers_of(trt: Any, path: Path) -> dict[str, int]:
    """Counts the layers of an engine by precision; needs the GPU that the engine is for.

    Raises:
        EngineError: The engine cannot be opened here.
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
    """Makes the network strongly typed: by a flag up to TensorRT 10.x, by default from 11."""
    if version_of(trt)[0] >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _refusal(parser: Any, graph: Path) -> str:
    """The parser's error, with the node that it refuses."""
    if parser.num_errors == 0:
        return f"TensorRT cannot read {graph}"
    error = parser.get_error(0)
    text = " ".join(str(error.desc()).split())
    return f"TensorRT does not support the node {error.node_name()!r} ({error.node_operator()}) of {graph}: {text}"


def _configure(trt: Any, config: Any, settings: Settings) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # without it the inspector reports no precisions
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib * MIB)
    if settings.compute_capabilities:
        _name_gpus(trt, config, settings.compute_capabilities)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible:
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
    """Loads the timings of earlier builds into a config; a file that does not exist counts as an empty one."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _build_error(graph: Path, messages: Sequence[str]) -> EngineError:
    reason = next((text for text in reversed(messages)), "no reason given")
    if "memory" in reason.lower() or "alloc" in reason.lower():
        return EngineError(
            f"TensorRT ran out of memory while it built {graph.name} ({reason})",
            f"lower {option('workspace')}, {option('capacity')} or {option('max_batch')}, "
            "add swap, or stop other programs on the board",
        )
    return EngineError(
        f"TensorRT could not build {graph.name} ({reason})", f"export with another {option('precision')}"
    )
