"""Detection of the processor, its numbers, and the cores that this process may use."""

from __future__ import annotations

import os
import platform
from pathlib import Path

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
