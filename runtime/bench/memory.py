"""Estimates the memory that captioning and long commands need, and compares it with the memory of the machine.

All estimates of memory are here. ``plan`` shows them; ``export``, ``calibrate`` and ``build`` compare them with this
machine by :func:`check_memory`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blip2edge.bundle.schema import BRIDGE, DECODER, VISION
from blip2edge.errors import Blip2EdgeError, option
from blip2edge.runtime.bench.devices import GB, Board
from blip2edge.shapes.model_shape import WEIGHT_BYTES, ModelShape

MIB = 1 << 20
MEMINFO = Path("/proc/meminfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

TENSORRT_LIBRARIES = 1536 * MIB  # TensorRT, CUDA and the kernels that a process loads; a round estimate
DEFAULT_SCRATCH = 1024 * MIB  # of a build without --workspace
EXPORT_BASE = int(0.45 * GB)  # torch, onnx, ONNX Runtime, and the traces
SAMPLED = 2.2  # times the largest tensor in float32; both within 20 % of benchmarks/results/export-memory-*.json
CPU_ARENA = 4  # assumed: ONNX Runtime keeps the buffers of several operators
CALIBRATION_BASE = int(0.25 * GB)  # assumed

Notify = Callable[[str], None]


@dataclass(frozen=True)
class MachineMemory:
    """The memory of this machine in bytes.

    Attributes:
        available: Memory that no program uses, without swap.
        ram: All memory, without swap.
        swap_free, swap: Swap space that no program uses, and all swap space.
        limit: Largest memory that the container may use; None without a limit.
    """

    available: int
    ram: int
    swap_free: int = 0
    swap: int = 0
    limit: int | None = None

    @property
    def free(self) -> int:
        """Returns the bytes of memory and swap that no program uses; at most the container's limit."""
        return self._limited(self.available + self.swap_free)

    @property
    def total(self) -> int:
        """Returns the bytes of memory and swap of this machine; at most the container's limit."""
        return self._limited(self.ram + self.swap)

    def _limited(self, size: int) -> int:
        return size if self.limit is None else min(size, self.limit)


def machine_memory(meminfo: Path = MEMINFO, limit: Path = CGROUP_LIMIT) -> MachineMemory | None:
    """Reads the memory of this machine; None if the system does not report it."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return None
    figures = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    sizes = {name: int(parts[0]) * 1024 for name, parts in figures.items() if parts and parts[0].isdigit()}
    if "MemAvailable" not in sizes:
        return None
    try:
        most: int | None = int(limit.read_text())
    except (OSError, ValueError):  # no limit: there is no such file, or it says "max"
        most = None
    available = sizes["MemAvailable"]
    swap = sizes.get("SwapFree", 0), sizes.get("SwapTotal", 0)
    return MachineMemory(available, sizes.get("MemTotal", available), *swap, most)


@dataclass(frozen=True)
class MemoryNeed:
    """The memory that a command needs, in bytes.

    Attributes:
        what: The command, for the message, such as ``the export``.
        least: With less memory, the command certainly fails.
        likely: Estimated peak.
        mend: What the user can do so that the command needs less memory.
        ignorable: Whether the command has the option ``--anyway``, which continues with too little memory.
    """

    what: str
    least: int
    likely: int
    mend: str
    ignorable: bool = True


def export_need(largest: int, total: int, *, full: bool) -> MemoryNeed:
    """Estimates the memory of an export.

    Args:
        largest: Elements of the largest tensor.
        total: Elements of all tensors.
        full: True if the whole model is compared with torch, False if only a sample of its layers is.
    """
    one, whole = 4 * largest, 4 * total
    if full:
        mend = "choose the verification `sample`, which needs the memory of one layer"
        return MemoryNeed("the export", whole, EXPORT_BASE + 2 * whole, mend)
    return MemoryNeed("the export", one, EXPORT_BASE + int(SAMPLED * one), "export on a machine with more memory")


def calibration_need(largest: int) -> MemoryNeed:
    """Estimates the memory of a calibration; ``largest``: bytes of the largest graph's weights.

    This is assumed, not measured: ONNX Runtime holds the weights of the largest graph in memory, while a second copy
    is read and rounded.
    """
    mend = "calibrate on a machine with more memory, or export in fp16 first"
    return MemoryNeed("the calibration", largest, CALIBRATION_BASE + 2 * largest, mend)


def build_need(weights: int, workspace_mib: int | None, graph: str) -> MemoryNeed:
    """Estimates the memory that building one engine needs.

    The estimate is the sum of the graph's weights twice (in the parsed network and in the engine), TensorRT's libraries
    and kernels, and scratch memory for the kernels whose time the builder measures.

    Args:
        weights: Size of the graph's weights in bytes.
        workspace_mib: Limit of the builder's scratch memory in MiB; None for no limit.
        graph: Name of the graph.
    """
    scratch = DEFAULT_SCRATCH if workspace_mib is None else workspace_mib * MIB
    mend = "lower the workspace, the capacity or the largest batch, add swap, or stop other programs"
    return MemoryNeed(f"the largest build ({graph})", 2 * weights, TENSORRT_LIBRARIES + scratch + 2 * weights, mend)


def check_memory(
    need: MemoryNeed,
    error: type[Blip2EdgeError],
    *,
    anyway: bool = False,
    notify: Notify | None = None,
    memory: MachineMemory | None = None,
) -> None:
    """Warns if a command probably needs more memory than this machine has; raises an error if it certainly does.

    Args:
        need: What the command needs.
        error: Class of the error.
        anyway: True to raise no error, even if the memory is certainly too small.
        notify: Called with the warning.
        memory: The machine's memory; None to read it.

    Raises:
        Blip2EdgeError: An error of the class ``error``: the machine has less memory than ``need.least``.
    """
    memory = memory or machine_memory()
    if memory is None:
        return
    if need.least > memory.total and not anyway:
        raise error(
            f"{need.what} needs at least {need.least / GB:.1f} GB of memory, and this machine has "
            f"{memory.total / GB:.1f} GB with its swap",
            f"{need.mend}, or try it with {option('anyway', on=True)}" if need.ignorable else need.mend,
        )
    if need.likely > memory.free and notify is not None:
        notify(
            f"warning: {need.what} may need about {need.likely / GB:.1f} GB of memory, and {memory.free / GB:.1f} GB "
            f"are free; {need.mend}"
        )


@dataclass(frozen=True)
class RunMemory:
    """Bytes of memory while pictures are captioned one by one.

    Attributes:
        weights: Weights of all graphs, and the token embedding table.
        cache: KV cache for prompt and caption, cross-attention included.
        activations: Intermediate results of the stage that has most of them.
        workspace: The process, its libraries and the driver context, without a model.
    """

    weights: int
    cache: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Returns the sum of all fields."""
        return self.weights + self.cache + self.activations + self.workspace

    def to_json(self) -> dict[str, int]:
        """Returns a JSON object with the fields and their sum ``run``."""
        return {**vars(self), "run": self.total}


def held_precision(precision: str, device: Board) -> str:
    """Returns the precision that the weights have in memory: a CPU holds fp16 weights as fp32."""
    return "fp32" if device.is_cpu and precision == "fp16" else precision


def element_bytes(precision: str, device: Board) -> float:
    """Returns the size in bytes of one number in the activations and in the KV cache, which have the same dtype."""
    return WEIGHT_BYTES["fp32" if device.is_cpu or precision == "fp32" else "fp16"]


def run_memory(shape: ModelShape, precision: str, device: Board, frames: int, text: int, new: int) -> RunMemory:
    """Estimates the memory of a process that captions one item (a picture, or a video of several frames).

    Args:
        shape: Sizes of the model's layers.
        precision: A key of ``shapes.model_shape.FORMATS``.
        device: The device that runs the model.
        frames: Pictures of the item; all of them pass the vision encoder and the bridge as one batch.
        text: Tokens of the prompt, without visual tokens.
        new: Tokens of the caption.
    """
    tokens = shape.tokens(frames, text)
    element = element_bytes(precision, device)
    each = {
        part.name: part.activation_bytes(tokens, element) * (frames if part.name in (VISION, BRIDGE) else 1)
        for part in shape.parts
    }
    logits = shape.table[0] * 4.0
    activations = max([*each.values(), each[DECODER] + logits]) * (CPU_ARENA if device.is_cpu else 1)
    cache = shape.cache.bytes(tokens["context"] + new, tokens["source"], element)
    weights = shape.weight_bytes(held_precision(precision, device))
    return RunMemory(int(weights), int(cache), int(activations), device.base)


def build_memory(shape: ModelShape, precision: str, device: Board) -> int:
    """Estimates the peak memory, in bytes, of building TensorRT engines or a CPU's optimized copy on the device."""
    largest = max(part.bytes(precision) for part in shape.parts)
    if device.is_cpu:
        return int(device.base + 2 * largest)
    return build_need(int(largest), None, "").likely
