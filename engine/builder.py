"""One strongly typed builder for TensorRT 10.3 to 11.x and TensorRT for RTX.

The precision stands in the graph (casts and Q/DQ nodes), so nothing here chooses one. Names of the binding that differ
between versions are asked for before they are used; ``tests/engine/test_api_names.py`` checks every name against the
lists of each version.
"""

from __future__ import annotations

import importlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.contract import GraphSpec
from blip2edge.engine.profiles import profiles_of
from blip2edge.errors import EngineError

OLDEST = (10, 3)  # JetPack 6.1; before it strongly typed networks were no option
MIB = 1 << 20  # bytes


@dataclass(frozen=True)
class Target:
    """A TensorRT.

    Attributes:
        module: Its Python module.
        extra: What of blip2edge installs it.
        builds_anywhere: Whether it builds without a GPU, for the compute capabilities that are named.
    """

    module: str
    extra: str
    builds_anywhere: bool = False


TARGETS = {
    "tensorrt": Target("tensorrt", "tensorrt"),
    "rtx": Target("tensorrt_rtx", "rtx", builds_anywhere=True),
}


@dataclass(frozen=True)
class Built:
    """An engine that was written.

    Attributes:
        file: Where.
        size: Bytes.
        seconds: Parsing and building.
        profiles: Names, in the order of their numbers.
        warnings: What the builder said of it.
    """

    file: Path
    size: int
    seconds: float
    profiles: tuple[str, ...]
    warnings: tuple[str, ...]


def load_tensorrt(target: str) -> Any:
    """The binding's module.

    Raises:
        EngineError: It is not installed, cannot be loaded, or is too old.
    """
    wanted = TARGETS[target]
    try:
        trt = importlib.import_module(wanted.module)
    except ImportError as error:
        hint = f"install it: pip install 'blip2edge[{wanted.extra}]'"
        if target == "tensorrt":
            hint += "; on a Jetson it comes with JetPack: make the environment with --system-site-packages"
        raise EngineError(f"{wanted.module} is not installed or does not load ({error})", hint) from error
    if target == "tensorrt" and version_of(trt) < OLDEST:
        raise EngineError(
            f"TensorRT {trt.__version__} is older than 10.3",
            "upgrade to JetPack 6.1 or newer, which brings 10.3, or install tensorrt>=10.3",
        )
    return trt


def version_of(trt: Any) -> tuple[int, int]:
    """Major and minor."""
    major, minor = str(trt.__version__).split(".")[:2]
    return int(major), int(minor)


def build_engine(
    trt: Any,
    graph: Path,
    spec: GraphSpec,
    output: Path,
    *,
    compute_capabilities: Sequence[int] = (),
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
) -> Built:
    """Parses a graph by its path and writes its engine.

    Args:
        trt: The module from :func:`load_tensorrt`.
        graph: The ``.onnx`` file; its weights are found beside it, so that models beyond 2 GB parse too.
        spec: Its tensors.
        output: The engine file.
        compute_capabilities: As 86 for 8.6; TensorRT for RTX only, where they stand for the GPU that is not here.
        workspace_mib: Bound on scratch memory, in MiB; None for the builder's own.
        timing_cache: A file that keeps the timings of kernels from build to build; TensorRT only.

    Raises:
        EngineError: The parser refuses a node, or the builder fails.
    """
    start = time.perf_counter()
    logger, messages = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise EngineError(_refusal(parser, graph), "export it with another --precision, or report the node")
    config = builder.create_builder_config()
    names = []
    for profile in profiles_of(spec):
        shapes = builder.create_optimization_profile()
        for name, (low, best, high) in profile.shapes(spec).items():
            shapes.set_shape(name, low, best, high)
        config.add_optimization_profile(shapes)
        names.append(profile.name)
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib * MIB)
    if compute_capabilities:
        _name_gpus(trt, config, compute_capabilities)
    cache = _read_timings(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise _build_error(graph, messages)
    output.write_bytes(memoryview(engine))
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(memoryview(config.get_timing_cache().serialize()))
    seconds = time.perf_counter() - start
    return Built(output, output.stat().st_size, seconds, tuple(names), tuple(dict.fromkeys(messages)))


def _logger(trt: Any) -> tuple[Any, list[str]]:
    """A logger that keeps warnings and errors instead of printing them."""
    messages: list[str] = []

    class Keeper(trt.ILogger):  # type: ignore[misc]  # the module is known at run time only
        """Keeps what matters."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            """Called by TensorRT; 0 is an internal error, 1 an error, 2 a warning."""
            if int(severity) <= int(trt.ILogger.WARNING):
                messages.append(" ".join(message.split()))

    return Keeper(), messages


def _network_flags(trt: Any) -> int:
    """Strongly typed: a flag up to 10.x, the only kind from 11."""
    if version_of(trt)[0] >= 11:
        return 0
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def _refusal(parser: Any, graph: Path) -> str:
    """What the parser said, with the node it fell over."""
    if parser.num_errors == 0:
        return f"TensorRT cannot read {graph}"
    error = parser.get_error(0)
    text = " ".join(str(error.desc()).split())
    return f"TensorRT's parser refuses the node {error.node_name()!r} ({error.node_operator()}) of {graph}: {text}"


def _name_gpus(trt: Any, config: Any, compute_capabilities: Sequence[int]) -> None:
    known = {
        name: value for name, value in vars(trt.ComputeCapability).items() if re.fullmatch(r"SM\d+", name)
    }
    unknown = [number for number in compute_capabilities if f"SM{number}" not in known]
    if unknown:
        numbers = ", ".join(sorted((name[2:] for name in known), key=int))
        raise EngineError(
            f"TensorRT for RTX {trt.__version__} does not know the compute capability {unknown[0]}",
            f"--sm takes {numbers}; for other GPUs build with --target tensorrt on the machine itself",
        )
    config.num_compute_capabilities = len(compute_capabilities)
    for index, number in enumerate(compute_capabilities):
        config.set_compute_capability(known[f"SM{number}"], index)


def _read_timings(config: Any, path: Path | None) -> Any:
    """Gives a config the timings of earlier builds; an unreadable file counts as none."""
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, False)
    return cache


def _build_error(graph: Path, messages: Sequence[str]) -> EngineError:
    said = next((text for text in reversed(messages)), "no reason given")
    if "memory" in said.lower() or "alloc" in said.lower():
        return EngineError(
            f"TensorRT ran out of memory while it built {graph.name} ({said})",
            "lower --workspace, add swap, or stop what else runs on the board",
        )
    return EngineError(f"TensorRT could not build {graph.name} ({said})", "try another --precision at export")
