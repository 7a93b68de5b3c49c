"""Joules, where the board tells: NVML on an NVIDIA card, the rails of a Jetson, RAPL on a PC."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from pathlib import Path

HWMON = Path("/sys/class/hwmon")
RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
TOTAL_RAILS = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN")
"""The rail that a Jetson's whole board hangs on, by the name that its kind gives it."""

SAMPLE = 0.05  # seconds between two looks at a rail


class EnergyMeter:
    """Joules of a block of work.

    Attributes:
        source: What tells them; empty for nothing.
        reason: Why nothing does; empty where something does.
        joules: Of the last block; None where nothing tells.
    """

    def __init__(self) -> None:
        found = next((name for name, make in SOURCES.items() if make() is not None), "")
        self.source = found
        self.reason = "" if found else "no NVML, no power rail and no readable RAPL counter on this machine"
        self.joules: float | None = None
        self._counter = SOURCES[found]() if found else None
        self._start = 0.0

    def __enter__(self) -> EnergyMeter:  # noqa: PYI034  (typing.Self is not in Python 3.10)
        self._start = self._counter() if self._counter is not None else 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.joules = self._counter() - self._start if self._counter is not None else None


Counter = Callable[[], float]


def _nvml() -> Counter | None:
    """Millijoules since the driver was loaded, of the first GPU (nvmlDeviceGetTotalEnergyConsumption)."""
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
    """Microjoules of the first package; only root may read them on most systems."""
    try:
        RAPL.read_text(encoding="ascii")
    except OSError:
        return None
    return lambda: int(RAPL.read_text(encoding="ascii")) / 1e6


class RailCounter:
    """The integral of a rail's power, sampled on a thread: what ``tegrastats`` prints, read where it reads it.

    Args:
        volts: A file with millivolts.
        amperes: A file with milliamperes.
    """

    def __init__(self, volts: Path, amperes: Path) -> None:
        self._volts, self._amperes = volts, amperes
        self._joules, self._last = 0.0, time.perf_counter()
        threading.Thread(target=self._watch, daemon=True).start()

    def __call__(self) -> float:
        """Joules so far."""
        return self._joules

    def watts(self) -> float:
        """Power now."""
        values = [int(path.read_text(encoding="ascii")) for path in (self._volts, self._amperes)]
        return values[0] * values[1] / 1e6

    def _watch(self) -> None:
        while True:
            time.sleep(SAMPLE)
            now = time.perf_counter()
            self._joules += self.watts() * (now - self._last)
            self._last = now


def _rail() -> Counter | None:
    """The INA3221 of a Jetson."""
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
