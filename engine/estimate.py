"""Estimates the memory that the build of an engine needs.

The builder holds the graph's weights twice (parsed, and in the engine), TensorRT's libraries and kernels, and scratch
memory for the kernels that it times. The sum is an estimate, not an upper bound.
"""

from __future__ import annotations

from pathlib import Path

LIBRARIES = 1536  # MiB: TensorRT, CUDA and the kernels that a process loads; a round estimate
DEFAULT_SCRATCH = 1024  # MiB: without --workspace
MIB = 1 << 20
MEMINFO = Path("/proc/meminfo")


def build_memory_mib(weights: int, workspace_mib: int | None) -> int:
    """Estimates the memory in MiB that the build of one engine may need.

    Args:
        weights: Size of the graph's weights in bytes.
        workspace_mib: Limit of the builder's scratch memory in MiB; None for no limit.
    """
    scratch = DEFAULT_SCRATCH if workspace_mib is None else workspace_mib
    return LIBRARIES + scratch + -(-2 * weights // MIB)


def available_memory_mib(meminfo: Path = MEMINFO) -> int | None:
    """Returns free memory and swap together in MiB; None if the system does not report them."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    figures = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    free = [int(figures[name][0]) for name in ("MemAvailable", "SwapFree") if figures.get(name)]
    return sum(free) // 1024 if free else None
