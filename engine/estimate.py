"""What a build will take of the machine's memory, told before it begins.

The builder holds a graph's weights as the parser read them and as the engine gets them, TensorRT's own libraries and
kernels, and scratch memory for the kernels it times. That is an estimate and no bound.
"""

from __future__ import annotations

from pathlib import Path

LIBRARIES = 1536  # MiB: TensorRT, CUDA and the kernels that a process loads; our own round figure
DEFAULT_SCRATCH = 1024  # MiB: where no --workspace bounds it
MIB = 1 << 20
MEMINFO = Path("/proc/meminfo")


def build_memory_mib(weights: int, workspace_mib: int | None) -> int:
    """MiB that the build of one graph may take.

    Args:
        weights: Bytes of its weights.
        workspace_mib: The bound on scratch memory.
    """
    scratch = DEFAULT_SCRATCH if workspace_mib is None else workspace_mib
    return LIBRARIES + scratch + -(-2 * weights // MIB)


def available_memory_mib(meminfo: Path = MEMINFO) -> int | None:
    """MiB of memory and swap that are free; None where the system does not tell."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    figures = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    free = [int(figures[name][0]) for name in ("MemAvailable", "SwapFree") if figures.get(name)]
    return sum(free) // 1024 if free else None
