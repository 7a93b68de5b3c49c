"""The devices that ``plan`` knows: memory, bandwidth, operations per second, and the share of these that is reached.

Memory, bandwidth and operations per second are from the makers' data sheets, for dense matrix multiplications. If a
data sheet only has the number for sparse matrices, half of it is used. None of these devices was measured for this
project; the plan says so. The device ``this`` is the machine that runs the command; :mod:`.roofline` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

from blip2edge.errors import UsageError, option

GIB, GB, TERA = 1 << 30, 10**9, 10**12
THIS = "this"


@dataclass(frozen=True)
class Efficiency:
    """Assumptions for predicting times: which share of its peak rates a device reaches, and what an operator costs.

    Attributes:
        products: Share of the peak operations per second that matrix multiplications reach, by format of the weights
            (``fp32``, ``int4``, ...).
        bytes: Share of the memory bandwidth that is reached while weights are read, by format of the weights.
        overlaps: Whether weights are read while the device computes. If true, the longer of both times counts. If
            false, their sum counts; then, for a multiplication of one row, only the time to read the weights counts.
        extra_rows: Number of rows that is added to every matrix multiplication of several rows, because small
            multiplications are slower.
        cache_passes: Number of times that a decode step reads or copies all keys and values.
        element_s: Seconds for each number in the outputs of the operators between matrix multiplications.
        call_s: Seconds for each call of an operator, independent of the number of tokens.
        cached_bytes: Share of the memory bandwidth for floating-point weights that fit the processor's cache; may
            exceed 1.
        fuses: Whether the device's compiler fuses the operators around each matrix multiplication, so that only
            :data:`FUSED_OPERATORS` calls remain.
        source: Where these values come from.
    """

    products: Mapping[str, float]
    bytes: Mapping[str, float]
    overlaps: bool
    extra_rows: int
    cache_passes: int
    element_s: float
    call_s: float
    cached_bytes: float
    fuses: bool
    source: str


CPU_EFFICIENCY = Efficiency(
    products={"fp32": 0.95, "fp16": 0.95, "int8": 0.8, "int8-weights": 0.35, "int4": 0.35},
    bytes={"fp32": 0.8, "fp16": 0.8, "int8": 0.7, "int8-weights": 0.7, "int4": 0.6},
    overlaps=False,
    extra_rows=2,
    cache_passes=4,
    element_s=0.4e-9,
    call_s=0.8e-6,
    cached_bytes=1.0,
    fuses=False,
    source="assumed for ONNX Runtime on one core: fp32 chosen on the models of benchmarks/results/plan.json, integers "
    "near the shares of the roofline in benchmarks/results/bench-int8-cpu.json (products: int8 0.66 and 0.77, "
    "int8-weights 0.31; bytes: 0.57)",
)
GPU_EFFICIENCY = Efficiency(
    products={"fp32": 0.6, "fp16": 0.45, "int8": 0.35, "int8-weights": 0.4, "int4": 0.4},
    bytes=dict.fromkeys(("fp32", "fp16", "int8", "int8-weights", "int4"), 0.75),
    overlaps=True,
    extra_rows=0,
    cache_passes=1,
    element_s=0.0,
    call_s=1e-6,
    cached_bytes=0.75,
    fuses=True,
    source="assumed, not measured",
)


@dataclass(frozen=True)
class Board:
    """A device that runs a bundle.

    Attributes:
        name: Name for ``--device``.
        title: The board and its configuration.
        memory: Bytes of memory that graphs can use: of the board if CPU and GPU share it, else of the GPU.
        reserved: Bytes that the system and other programs use.
        base: Bytes that a process of the runtime needs without any model: interpreter, libraries, driver context.
        bytes_per_s: Memory bandwidth in bytes per second.
        rates: Peak additions and multiplications per second, by ``fp32``, ``fp16``, ``int8``; a CPU has no ``fp16``.
        host: Factor for the time of Python code and preprocessing: 1 on the reference CPU (an AMD EPYC), 2 on a CPU
            that needs twice the time.
        efficiency: Assumptions about the share of the peak rates that is reached.
        source: Where the values come from.
        refuses: Precisions that do not run on the board, each with the reason.
        measured: Whether bandwidth and rates were measured on this machine.
    """

    name: str
    title: str
    memory: int
    reserved: int
    base: int
    bytes_per_s: float
    rates: Mapping[str, float]
    host: float
    efficiency: Efficiency
    source: str
    refuses: Mapping[str, str] = field(default_factory=dict)
    measured: bool = False

    @property
    def usable(self) -> int:
        """Returns the bytes of memory that are left for a process of the runtime."""
        return self.memory - self.reserved

    @property
    def is_cpu(self) -> bool:
        """Returns whether the graphs run on the CPU; there, fp16 graphs are computed in fp32."""
        return "fp16" not in self.rates

    def rate(self, kind: str) -> float:
        """Returns the peak operations per second for a format of the weights.

        If a format quantizes only the weights, a GPU computes in fp16.
        """
        if self.is_cpu:
            return self.rates["fp32" if kind in ("fp32", "fp16") else "int8"]
        return self.rates[kind if kind in self.rates else "fp16"]


NO_BLOCKS = {"int8": "TensorRT takes no 8-bit weights in blocks: use int4, or calibrate with --weights none"}
"""Precisions that a Jetson does not run, with the reason; it has TensorRT, not TensorRT for RTX."""


def _jetson(name: str, title: str, gib: int, gigabytes: float, fp32: float, int8: float, source: str, *,
            cpu: float = 2.5, reserved: float = 1.2) -> Board:  # fmt: skip
    """Describes a Jetson: CPU and GPU share memory; the FP16 rate is half of the dense INT8 rate (Ampere)."""
    rates = {"fp32": fp32 * TERA, "fp16": int8 / 2 * TERA, "int8": int8 * TERA}
    return Board(name, title, gib * GIB, int(reserved * GB), int(1.0 * GB), gigabytes * GB, rates, cpu,
                  GPU_EFFICIENCY, source, NO_BLOCKS)  # fmt: skip


def _card(name: str, title: str, gib: int, gigabytes: float, fp32: float, fp16: float, int8: float,
          source: str) -> Board:  # fmt: skip
    """Describes a graphics card in a PC: only the memory of the card counts."""
    rates = {"fp32": fp32 * TERA, "fp16": fp16 * TERA, "int8": int8 * TERA}
    return Board(name, title, gib * GIB, int(0.4 * GB), int(0.7 * GB), gigabytes * GB, rates, 1.0, GPU_EFFICIENCY,
                  source)  # fmt: skip


def _arm(name: str, title: str, gib: int, gigabytes: float, cores: int, ghz: float, source: str) -> Board:
    """Describes a board of Arm Cortex-A76 cores.

    A core does 16 FP32 or 64 INT8 operations in a cycle (two 128-bit units).
    """
    rates = {"fp32": cores * ghz * 16e9, "int8": cores * ghz * 64e9}
    return Board(name, title, gib * GIB, int(0.6 * GB), int(0.15 * GB), gigabytes * GB, rates, 2.5, CPU_EFFICIENCY,
                  source)  # fmt: skip


_ORIN = "NVIDIA, Jetson Orin Nano, Orin NX and AGX Orin data sheets: {}"
_ADA = "NVIDIA Ada architecture white paper: {}"

DEVICES: Mapping[str, Board] = {
    device.name: device
    for device in (
        _jetson("orin-nano-4gb", "Jetson Orin Nano 4 GB (10 W)", 4, 34, 0.64, 10,
                _ORIN.format("512 cores at 625 MHz, 20 sparse INT8 TOPS, 34 GB/s")),
        _jetson("orin-nano-8gb", "Jetson Orin Nano 8 GB (15 W)", 8, 68, 1.28, 20,
                _ORIN.format("1,024 cores at 625 MHz, 40 sparse INT8 TOPS, 68 GB/s")),
        _jetson("orin-nano-8gb-super", "Jetson Orin Nano 8 GB Super (25 W)", 8, 102, 2.09, 33.5,
                _ORIN.format("1,024 cores at 1,020 MHz, 67 sparse INT8 TOPS, 102 GB/s")),
        _jetson("orin-nx-8gb", "Jetson Orin NX 8 GB (20 W)", 8, 102, 1.57, 25,
                _ORIN.format("1,024 cores at 765 MHz, 50 sparse INT8 TOPS of the GPU, 102 GB/s")),
        _jetson("orin-nx-16gb", "Jetson Orin NX 16 GB (25 W)", 16, 102, 1.88, 30,
                _ORIN.format("1,024 cores at 918 MHz, 60 sparse INT8 TOPS of the GPU, 102 GB/s")),
        _jetson("agx-orin-32gb", "Jetson AGX Orin 32 GB (40 W)", 32, 205, 3.33, 54,
                _ORIN.format("1,792 cores at 930 MHz, 108 sparse INT8 TOPS of the GPU, 205 GB/s"), reserved=1.5),
        _jetson("agx-orin-64gb", "Jetson AGX Orin 64 GB (60 W)", 64, 205, 5.32, 85,
                _ORIN.format("2,048 cores at 1,300 MHz, 170 sparse INT8 TOPS of the GPU, 205 GB/s"), reserved=1.5),
        _jetson("thor", "Jetson Thor T5000 128 GB (130 W)", 128, 273, 8.0, 517,
                "NVIDIA, Jetson Thor data sheet: 2,560 cores, 2,070 sparse FP4 TFLOPS (a quarter of it is taken for "
                "dense 8-bit products), 273 GB/s", cpu=1.5, reserved=2.0),
        _card("rtx-4060", "GeForce RTX 4060 8 GB", 8, 272, 15.1, 60.5, 121,
              _ADA.format("15.1 FP32 and 60.5 dense FP16 TFLOPS, 121 dense INT8 TOPS, 272 GB/s")),
        _card("rtx-4090", "GeForce RTX 4090 24 GB", 24, 1008, 82.6, 330, 661,
              _ADA.format("82.6 FP32 and 330 dense FP16 TFLOPS, 661 dense INT8 TOPS, 1,008 GB/s")),
        _card("l4", "NVIDIA L4 24 GB", 24, 300, 30.3, 121, 242,
              "NVIDIA L4 data sheet: 30.3 FP32 TFLOPS, 242 sparse FP16 TFLOPS, 485 sparse INT8 TOPS, 300 GB/s"),
        _arm("raspberry-pi-5-8gb", "Raspberry Pi 5 8 GB, CPU", 8, 17, 4, 2.4,
             "Raspberry Pi 5 product brief: four Cortex-A76 at 2.4 GHz; LPDDR4X-4267 on 32 bits: 17 GB/s"),
        _arm("raspberry-pi-5-16gb", "Raspberry Pi 5 16 GB, CPU", 16, 17, 4, 2.4,
             "Raspberry Pi 5 product brief: four Cortex-A76 at 2.4 GHz; LPDDR4X-4267 on 32 bits: 17 GB/s"),
    )
}  # fmt: skip


def find_device(name: str) -> Board:
    """Returns the board of this name.

    Raises:
        UsageError: There is no such board.
    """
    if name in DEVICES:
        return DEVICES[name]
    similar = get_close_matches(name.lower(), [*DEVICES, THIS], n=1, cutoff=0.4)
    raise UsageError(
        f"{option('device')} {name!r} is not one of {', '.join(map(repr, (THIS, *DEVICES)))}",
        f"did you mean {similar[0]!r}?" if similar else f"give {THIS!r} to measure the machine that runs the command",
        field="device",
    )
