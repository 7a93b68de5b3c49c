"""What the doctor finds on a board: simulated files of a Jetson, and the last sentence of the report."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from blip2edge.cli import main
from blip2edge.runtime.backends.probe import Check
from blip2edge.runtime.bench import board
from blip2edge.runtime.bench.board import board_checks, conclusion, query_nvpmodel

CONF = """< POWER_MODEL ID=0 NAME=15W >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=25W >
< POWER_MODEL ID=2 NAME=MAXN_SUPER >
"""
SWAPS = "Filename\tType\tSize\tUsed\tPriority\n"


def write(root: Path, **files: str) -> None:
    """Writes files; `__` in a name stands for a slash."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def jetson(root: Path, least: str = "306000000") -> Path:
    """The files of an Orin Nano Super in its 15 W mode."""
    write(
        root,
        etc__nv_tegra_release="# R36 (release), REVISION: 4.3",
        proc__swaps=f"{SWAPS}/dev/zram0 partition 650000 0 5\n/dev/zram1 partition 650000 0 5\n",
        sys__devices__system__cpu__cpufreq__policy0__scaling_cur_freq="729600\n",
        sys__devices__system__cpu__cpufreq__policy0__cpuinfo_max_freq="1510400\n",
        sys__devices__system__cpu__cpufreq__policy0__scaling_governor="schedutil\n",
    )
    write(root, **{"etc__nvpmodel.conf": CONF, "var__lib__nvpmodel__status": "pmode:0000"})
    for name, value in (("min_freq", least), ("cur_freq", "306000000"), ("max_freq", "1020000000")):
        write(root, **{f"sys__class__devfreq__17000000.gpu__{name}": value})
    return root


def found(root: Path, answer: str = "") -> dict[str, Check]:
    return {check.name: check for check in board_checks(root, lambda: answer)}


@pytest.mark.parametrize("answer", ["NV Power Mode: 15W\n0\n", ""])
def test_a_board_that_is_not_set_up(tmp_path: Path, answer: str) -> None:
    checks = found(jetson(tmp_path), answer)
    assert list(checks) == ["power mode", "clocks", "swap", "disk"]
    assert [check.ok for check in checks.values()][:3] == [False] * 3
    assert checks["power mode"].detail == "15W (mode 0); MAXN_SUPER (mode 2) has no power limit"
    assert checks["power mode"].fix == "sudo nvpmodel -m 2"
    assert checks["clocks"].detail == "CPU 730 of 1510 MHz, governor schedutil; GPU 306 of 1020 MHz"
    assert checks["clocks"].fix == "before measuring: sudo jetson_clocks"
    assert checks["swap"].detail == "1.3 GB in compressed memory"
    assert "swap file on NVMe" in str(checks["swap"].fix)


def test_a_board_that_is_set_up(tmp_path: Path) -> None:
    root = jetson(tmp_path, least="1020000000")
    write(root, proc__swaps="Filename Type Size Used Priority\n/mnt/16GB.swap file 15625000 0 -2\n")
    checks = found(root, "NVPM WARN: fan mode is not set!\nNV Power Mode: MAXN_SUPER\n2\n")
    assert all(check.ok for name, check in checks.items() if name != "disk")
    assert checks["power mode"].detail == "MAXN_SUPER (mode 2)"
    assert checks["swap"].detail == "16.0 GB on disk"


def test_a_computer_that_is_no_board(tmp_path: Path) -> None:
    assert list(found(tmp_path)) == ["disk"]
    write(tmp_path, proc__swaps="Filename Type Size Used Priority\n")
    assert found(tmp_path)["swap"] == Check("swap", True, "none")
    write(tmp_path, sys__devices__system__cpu__cpufreq__policy0__scaling_governor="powersave")
    clocks = found(tmp_path)["clocks"]
    assert (clocks.ok, clocks.detail) == (True, "CPU ? of ? MHz, governor powersave")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64_000_000_000, free=1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    check = found(tmp_path)["disk"]
    assert not check.ok
    assert check.detail.startswith("1.0 of 64.0 GB free at ")


def test_nvpmodel_that_is_absent_or_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, **__: Any) -> Any:
        raise errors.pop()

    errors: list[Exception] = [FileNotFoundError(), subprocess.TimeoutExpired("nvpmodel", 5)]
    monkeypatch.setattr(subprocess, "run", run)
    assert [query_nvpmodel(), query_nvpmodel()] == ["", ""]
    done = subprocess.CompletedProcess([], 0, "NV Power Mode: 15W\n0\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    assert query_nvpmodel() == "NV Power Mode: 15W\n0\n"


def test_the_closing_sentence(tmp_path: Path) -> None:
    memory = Check("memory", True, "7.6 GB, 5.1 GB available")
    tensorrt, cpu = Check("TensorRT", True, "10.3.0"), Check("CPUExecutionProvider", True, "")
    broken = Check("ONNX Runtime", False, "not installed", "pip install 'blip2edge[cpu]'", required=True)
    assert conclusion([memory, cpu]) == "captions run here with --backend cpu, 5.1 GB available"
    checks = [memory, *board_checks(jetson(tmp_path), lambda: ""), cpu, tensorrt]
    told = conclusion([check for check in checks if check.name != "disk"])
    assert told.startswith(
        "captions run here with --backend cpu, 5.1 GB available; tensorrt is installed, not tried; "
        "sudo nvpmodel -m 2; before"
    )
    assert conclusion([memory, broken]) == "nothing runs here yet: pip install 'blip2edge[cpu]'"
    rtx = Check("TensorRT-RTX", True, "1.2; no engine was run")
    assert conclusion([broken, rtx]) == "no backend was tried here; rtx is installed, not tried"
    assert {check.name for check in checks} >= set(board.BOARD)


def test_the_command_ends_with_it(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="the CPU backend is not installed")
    assert main(["doctor"]) == 0
    *_, empty, sentence, step = capsys.readouterr().out.splitlines()
    assert empty == ""
    assert sentence.startswith("captions run here with --backend ")
    assert step.startswith("next: blip2edge ")
