"""Measures time, memory and energy for ``bench``; energy by NVML (NVIDIA card), power rails (Jetson) or RAPL (PC)."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from blip2edge.runtime.captioning.encoder import STAGES, StageClock

HWMON = Path("/sys/class/hwmon")
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
TOTAL_RAILS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN")
"""Names that the power rail of the whole board has on the different kinds of Jetson."""

SAMPLE = 0.05  # seconds between two samples of a rail


class EnergyMeter:
    """Measures the energy of a ``with`` block.

    Attributes:
        source: Name of the meter; empty if the machine has none.
        reason: Why there is no meter; empty if there is a meter.
        joules: Energy used during the last ``with`` block; None without a meter.
    """

    def __init__(self) -> None:
        counters = ((name, make()) for name, make in SOURCES.items())
        self.source, self._counter = next((one for one in counters if one[1] is not None), ("", None))
        self.reason = "" if self.source else "no NVML, no power rail and no readable RAPL counter on this machine"
        self.joules: float | None = None
        self._start = 0.0

    def __enter__(self) -> EnergyMeter:  # noqa: PYI034  (typing.Self is not in Python 3.10)
        self._start = self._counter() if self._counter is not None else 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.joules = self._counter() - self._start if self._counter is not None else None
        if isinstance(self._counter, RailCounter):
            self._counter.close()


Counter = Callable[[], float]
"""Type of a function that returns the energy in joules that was used since a fixed time."""


def _nvml() -> Counter | None:
    """Opens the energy counter of the first GPU (nvmlDeviceGetTotalEnergyConsumption, in millijoules)."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)):
        return None
    if library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy)):
        return None

    def read() -> float:
        library.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy))
        return energy.value / 1e3

    return read


def _rapl() -> Counter | None:
    """Opens the energy counter of the first CPU package (microjoules, wraps around); often only root may read it."""
    try:
        last = int(RAPL.read_text(encoding="ascii"))
        range_uj = int(RAPL.with_name("max_energy_range_uj").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
    total = 0

    def read() -> float:
        nonlocal last, total
        now = int(RAPL.read_text(encoding="ascii"))
        total += (now - last) % (range_uj + 1)
        last = now
        return total / 1e6

    return read


class RailCounter:
    """Computes the energy that a power rail of a Jetson supplied: a thread reads the power again and again.

    Args:
        volts: File with the rail's voltage in millivolts.
        amperes: File with the rail's current in milliamperes.
        clock: Returns the time in seconds.
    """

    def __init__(self, volts: Path, amperes: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self._volts, self._amperes, self._clock = volts, amperes, clock
        self._joules, self._last = 0.0, clock()
        self._sampling, self._closed = threading.Lock(), threading.Event()
        threading.Thread(target=self._watch, name="blip2edge-rail", daemon=True).start()

    def __call__(self) -> float:
        """Returns the joules used since the counter was made."""
        with self._sampling:
            now = self._clock()
            self._joules += self.watts() * (now - self._last)
            self._last = now
            return self._joules

    def watts(self) -> float:
        """Reads the present power in watts."""
        values = [int(path.read_text(encoding="ascii")) for path in (self._volts, self._amperes)]
        return values[0] * values[1] / 1e6

    def close(self) -> None:
        """Stops the sampling thread."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(SAMPLE):
            self()


def _rail() -> Counter | None:
    """Opens the power monitor of a Jetson, an INA3221."""
    for label in sorted(HWMON.glob("hwmon*/in*_label")):
        try:
            name = label.read_text(encoding="ascii").strip()
        except OSError:
            continue
        number = label.name[len("in") : -len("_label")]
        volts, amperes = label.with_name(f"in{number}_input"), label.with_name(f"curr{number}_input")
        if name in TOTAL_RAILS and volts.is_file() and amperes.is_file():
            return RailCounter(volts, amperes)
    return None


SOURCES: dict[str, Callable[[], Counter | None]] = {"NVML": _nvml, "power rail": _rail, "RAPL": _rapl}


STATUS = Path("/proc/self/status")
INTERVAL = 0.02  # seconds between two samples


def resident_bytes() -> int:
    """Returns this process's anonymous and shared memory in bytes; 0 if the system does not report it."""
    try:
        lines = STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    fields = dict(line.split(":", 1) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(value.split()[0]) * 1024 for value in fields.values())


class MemoryMeter:
    """Samples :func:`resident_bytes` during a ``with`` block; ``peak`` is the largest sample."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> MemoryMeter:  # noqa: PYI034  (typing.Self is not in Python 3.10)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident_bytes())

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.peak = max(self.peak, resident_bytes())


class CpuClock(StageClock):
    """Measures wall time and CPU time of each stage, in milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu_ms = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time of the ``with`` block to the times of a stage."""
        start = time.process_time()
        with super().__call__(stage):
            yield
        self.cpu_ms[stage] += (time.process_time() - start) * 1e3
