"""Detection of the processor, its numbers, and the cores that this process may use."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import Any

import pytest

from blip2edge.runtime.backends import probe as machine
from blip2edge.runtime.bench import doctor

EPYC = """processor : 0
vendor_id : AuthenticAMD
cpu family : 25
model : {model}
model name : AMD EPYC
stepping : 1
flags : fpu avx2 fma

processor : 1
cpu family : 25
model : 99
model name : AMD EPYC
"""
PI = """processor : 0
Features : fp asimd asimddp
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x4
CPU part : 0xd0b
CPU revision : 1

Hardware : BCM2835
Model : Raspberry Pi 5 Model B Rev 1.0
"""


def told(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", path)


def test_two_generations_of_one_name_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = []
    for model in (1, 17):
        told(EPYC.format(model=model), tmp_path, monkeypatch)
        assert machine.processor() == "AMD EPYC"
        exact.append(machine.exact_processor())
    assert exact == [f"AMD EPYC (family 25, model {model}, stepping 1)" for model in (1, 17)]


@pytest.mark.parametrize("board", [True, False])
def test_arm(board: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board has a name; a server has numbers alone."""
    told(PI if board else PI.partition("Hardware")[0], tmp_path, monkeypatch)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    name = "Raspberry Pi 5 Model B Rev 1.0" if board else "aarch64"
    assert machine.processor() == name
    assert machine.exact_processor() == f"{name} (implementer 0x41, variant 0x4, part 0xd0b, revision 1)"
    assert doctor._processor().detail.startswith(f"{name}, ")
    assert doctor._processor().detail.endswith("; asimd asimddp")


def test_where_nothing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told(None, tmp_path, monkeypatch)
    assert machine.processor() == machine.exact_processor() == (platform.processor() or platform.machine())
    assert doctor._processor().detail.endswith("; features not known")


def test_cores_are_those_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 5}, raising=False)
    assert machine.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.cores() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cores() == 1


class Libcuda:
    """The functions of ``libcuda`` that are called, on a machine with one GPU; arguments are those of ``cuda.h``."""

    attributes = {75: 8, 76: 7, 16: 8}  # noqa: RUF012 - compute capability 8.7, and 8 multiprocessors
    memory = 7_613_000_000

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return 0

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12060
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: ctypes.c_int) -> int:  # noqa: N802
        name.value = b"Orin"
        return 0 if length == 128 and device.value == 40 else 1

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:  # noqa: N802
        value._obj.value = self.attributes[attribute]
        return 0 if device.value == 40 else 1

    def cuDeviceTotalMem_v2(self, size: Any, device: ctypes.c_int) -> int:  # noqa: N802
        size._obj.value = self.memory
        return 0 if device.value == 40 else 1


def test_gpu_is_described_by_its_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Boards of one name and compute capability differ in the number of multiprocessors, and in the memory."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Libcuda())
    nano = machine.Gpu("Orin", 87, 8, 7)
    assert machine.nvidia_driver() == machine.Driver("12.6", (nano,), "")
    monkeypatch.setattr(Libcuda, "attributes", {**Libcuda.attributes, 16: 16})
    monkeypatch.setattr(Libcuda, "memory", 65_900_000_000)
    assert machine.nvidia_driver().gpus == (machine.Gpu("Orin", 87, 16, 61),)
    monkeypatch.setattr(Libcuda, "cuDeviceTotalMem_v2", lambda self, size, device: 101)
    assert machine.nvidia_driver() == machine.Driver("12.6", (), "GPU 0 does not answer (error 101)")
