"""The script for a GPU, in its dry run: every step, its time limit, and the JSON file."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="a peer of the script")
pytest.importorskip("onnx_ir", reason="the simulated engines are made with onnx_ir")

ROOT = Path(__file__).parents[2]
QUICK = ("machine", "bandwidth", "cuda_layer", "captured_torch")


def dry_run(path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """Runs the script without pytest, which a machine with a GPU does not need to have."""
    hidden = path.parent / "hidden"
    hidden.mkdir()
    (hidden / "pytest.py").write_text("raise ModuleNotFoundError('pytest is not installed', name='pytest')")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--dry-run", "--json", str(path), *words]
    environment = {**os.environ, "PYTHONPATH": f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    return done.returncode, json.loads(path.read_text())


def test_quick_steps(tmp_path: Path) -> None:
    status, document = dry_run(tmp_path / "gpu.json", "--part", "1", "--steps", *QUICK)
    assert document["dry_run"] is True
    assert {name: step["status"] for name, step in document["steps"].items()} == dict.fromkeys(QUICK, "ok")
    assert document["steps"]["cuda_layer"]["result"]["ok"] is True
    assert document["steps"]["bandwidth"]["result"]["gigabytes_per_s"] > 0
    assert status == 0


@pytest.mark.slow
def test_every_step(tmp_path: Path) -> None:
    status, document = dry_run(tmp_path / "gpu.json")
    failed = {name: step for name, step in document["steps"].items() if step["status"] != "ok"}
    assert failed == {}
    assert len(document["steps"]) == 14
    results = {name: step["result"] for name, step in document["steps"].items()}
    for name in (
        "cuda_layer",
        "captured_torch",
        "runtime",
        "provider",
        "cuda_graphs",
        "kernel_ids",
        "kernel_draws",
        "kernel_speed",
    ):
        assert results[name]["ok"] is True, results[name]
    assert results["true_size"]["times_eager"] > 0
    assert status == 0


def test_step_that_takes_too_long_loses_only_its_own_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu, steps = importlib.import_module("gpu"), importlib.import_module("gpu_steps").STEPS

    step = next(step for step in steps if step.name == "runtime")
    found = gpu.run_step(step, True, 0.5)
    assert found["status"] == "timeout"
    assert found["seconds"] < 30


def test_step_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    gpu, make = importlib.import_module("gpu"), importlib.import_module("gpu_steps").Step

    found = gpu.run_step(make("nowhere", 1, 60, lambda dry: {}), True, 60)
    assert (found["status"], found["exit_status"]) == ("failed", 2)
    assert "invalid choice" in found["output"]
