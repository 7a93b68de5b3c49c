"""The script for a GPU, in its dry run: every step, its time limit, and the JSON file."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="a peer of the script")
pytest.importorskip("onnx_ir", reason="the simulated engines are made with onnx_ir")

from blip2edge.bundle.bundle import Bundle
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends.optimized_copy import read_copy

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
    assert len(document["steps"]) == 15
    results = {name: step["result"] for name, step in document["steps"].items()}
    for name in (
        "cuda_layer",
        "captured_torch",
        "runtime",
        "provider",
        "cuda_graphs",
        "kernel_ids",
        "kernel_draws",
        "kernel_beams",
        "kernel_speed",
        "true_size",
    ):
        assert results[name]["ok"] is True, results[name]
    size = results["true_size"]
    assert set(size["seconds"]) == {"cuda", "cuda with graphs", "eager", "compiled"}
    assert min(size["times_eager"], size["times_compiled"], *size["share_of_bandwidth"].values()) > 0
    assert size["overlap"]["ratio"] > 0
    assert size["left"] == {}
    assert size["equal_tokens"] is True
    forms = {f"{precision} {form}" for precision in ("fp32", "fp16", "int4") for form in ("portable", "copy")}
    assert set(results["provider"]["captions"]) == forms
    for found in results["provider"]["captions"].values():
        assert set(found["nodes"]) == {"vision_encoder", "bridge", "decoder", "draft"}
        assert all(kinds for providers in found["nodes"].values() for kinds in providers.values())
    assert status == 0


STEP = """
import json, os, signal, subprocess, sys, time
print(json.dumps({"first": 1}), flush=True)
print(json.dumps({"first": 1, "second": 2}), flush=True)
print('{"cut": ', flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["STEP_PIDS"], "w").write(f"{os.getpid()} {child.pid}")
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(600)
"""
"""A step that has printed a part of its result, and has started a process, when it is ended."""

MAIN = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from pathlib import Path
import gpu
gpu.STEP_SCRIPT = Path(sys.argv.pop(1))
gpu.run_script(gpu.main)
"""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The module ``gpu`` with :data:`STEP` as its steps."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("gpu")
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setattr(module, "STEP_SCRIPT", tmp_path / "step.py")
    monkeypatch.setenv("STEP_PIDS", str(tmp_path / "pids"))
    return module


def step_of(name: str) -> Any:
    return importlib.import_module("gpu_steps").Step(name, 1, 60, lambda dry: {})


def all_ended(pids: Path) -> bool:
    """Waits until the step and the process that it started have ended."""
    end = time.monotonic() + 20
    while any(alive(int(pid)) for pid in pids.read_text().split()):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(("name", "status", "exit_status"), [("late", "timeout", None), ("killed", "failed", -9)])
def test_step_that_is_ended_keeps_what_it_has_measured(
    script: Any, tmp_path: Path, name: str, status: str, exit_status: int | None
) -> None:
    found = script.run_step(step_of(name), True, 5 if name == "late" else 60)
    assert (found["status"], found.get("exit_status")) == (status, exit_status)
    assert found["result"] == {"first": 1, "second": 2}
    assert found["seconds"] < 15
    assert '"cut"' in found["output"]
    assert all_ended(tmp_path / "pids")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_script_that_is_ended_leaves_its_json(script: Any, tmp_path: Path, number: int) -> None:
    """SIGTERM ends the running step. SIGKILL cannot: the step has an alarm of its own (see the next test)."""
    path, pids = tmp_path / "gpu.json", tmp_path / "pids"
    words = [sys.executable, "-c", MAIN, str(ROOT / "benchmarks"), str(tmp_path / "step.py")]
    process = subprocess.Popen([*words, "--part", "1", "--steps", "machine", "runtime", "--json", str(path)])
    while not pids.is_file() or len(pids.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == (143 if number == signal.SIGTERM else -9)
    steps = json.loads(path.read_text())["steps"]
    ended = "killed with the script" if number == signal.SIGTERM else "running"
    assert steps == {"machine": {"status": ended}, "runtime": {"status": "not started"}}
    if number == signal.SIGKILL:
        for pid in pids.read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    assert all_ended(pids)


def test_step_ends_itself_after_its_limit() -> None:
    step = ROOT / "benchmarks" / "gpu_steps.py"
    done = subprocess.run([sys.executable, str(step), "runtime", "--dry-run", "--limit", "1"], check=False, timeout=60)
    assert done.returncode == -signal.SIGALRM


def test_step_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = importlib.import_module("gpu").run_step(step_of("nowhere"), True, 60)
    assert (found["status"], found["exit_status"]) == ("failed", 2)
    assert "invalid choice" in found["output"]


def test_wrong_result_is_no_success(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--steps", "machine", "runtime"])
    for wrong, status in ((False, 0), (True, 1)):
        results = {"machine": {"driver": ""}, "runtime": {"ok": not wrong}}
        found = {name: {"status": "ok", "seconds": 1.0, "result": result} for name, result in results.items()}
        monkeypatch.setattr(script, "run_step", lambda step, *_, found=found: found[step.name])
        assert script.main() == status


def sizes_of(bundle: Path) -> dict[str, int]:
    files = [path for path in bundle.rglob("*.*") if not path.name.startswith(".")]
    return {path.relative_to(bundle).as_posix(): path.stat().st_size for path in files}


def test_packed_bundle_is_filled_with_other_weights(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Matrices differ, all other bytes and the shapes are equal, and the hashes fit; so does the optimized copy."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    skeleton = importlib.import_module("gpu_skeleton")
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    optimize(bundle, "cuda")
    skeleton.pack(bundle, tmp_path / "packed", least=1024)
    index = json.loads((tmp_path / "packed" / skeleton.INDEX).read_text())
    assert {"decoder.onnx.data", "embed_tokens.safetensors", "optimized/cuda/decoder.own.data"} <= index.keys()
    packed = sum(path.stat().st_size for path in (tmp_path / "packed").rglob("*") if path.is_file())
    filled = tmp_path / "filled"
    assert skeleton.fill(tmp_path / "packed", filled) == sum(record["size"] for record in index.values())
    sizes, others = sizes_of(bundle), sizes_of(filled)
    assert packed < sum(sizes.values())
    assert others.keys() == sizes.keys()
    for name, record in index.items():
        one, two = ((folder / name).read_bytes() for folder in (bundle, filled))
        at = 0
        for offset, length, dtype in record["holes"]:
            assert one[at:offset] == two[at:offset]
            at = offset + length
            values = np.frombuffer(two[offset:at], dtype)
            assert one[offset:at] != two[offset:at]
            assert np.isfinite(values).all()
            assert 0.01 < values.std() < 0.03
        assert one[at:] == two[at:]
    opened = Bundle.open(filled)
    opened.verify()
    copy = read_copy(opened, "cuda", use_stamps=False)
    assert copy is not None
    assert set(copy[1].graphs) == set(opened.manifest.graphs)


def test_parts_of_a_packed_file_are_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that two graphs store with two types is one hole; all other bytes are kept, also after the last hole."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    skeleton = importlib.import_module("gpu_skeleton")
    holes = [(2, 4, "float16"), (2, 4, "float32"), (6, 2, "float16"), (10, 4, "float32")]
    parts = list(skeleton._parts({"size": 15, "holes": holes}))
    assert parts == [
        *((0, 2, ""), (2, 4, "float16"), (6, 2, "float16")),
        *((8, 2, ""), (10, 4, "float32"), (14, 1, "")),
    ]
    assert list(skeleton._parts({"size": 3, "holes": []})) == [(0, 3, "")]
