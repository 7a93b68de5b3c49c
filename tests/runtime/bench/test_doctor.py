"""The doctor: its findings; a missing package is a finding, not an error."""

from __future__ import annotations

import ctypes
import re
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blip2edge.cli import main
from blip2edge.errors import BackendError
from blip2edge.runtime.backends.probe import Check, check_provider
from blip2edge.runtime.bench import doctor
from blip2edge.runtime.bench.doctor import diagnose
from blip2edge.runtime.bench.memory import MachineMemory
from tests.runtime.bench.blocked import without


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_findings_on_this_machine() -> None:
    checks = by_name(diagnose())
    assert checks["Python"].ok
    assert "numpy" in checks["packages"].detail
    assert {
        "platform",
        "CPU",
        "memory",
        "NVIDIA driver",
        "TensorRT",
        "TensorRT-RTX",
        "torch",
    } <= checks.keys()
    for check in checks.values():
        assert "\n" not in check.detail
        assert check.ok or check.fix or check.required


@pytest.mark.parametrize(
    ("memory", "detail"),
    [
        (None, "not known on this platform"),
        (MachineMemory(3 * 10**9, 8 * 10**9, 10**9, 2 * 10**9), "8.0 GB, 3.0 GB available"),  # swap does not count
        (MachineMemory(3 * 10**9, 8 * 10**9, limit=4 * 10**9), "8.0 GB, 3.0 GB available, limited to 4.0 GB"),
        (MachineMemory(3 * 10**9, 8 * 10**9, limit=9 * 10**9), "8.0 GB, 3.0 GB available"),
    ],
)
def test_memory(memory: MachineMemory | None, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "machine_memory", lambda: memory)
    assert doctor._memory().detail == detail


def test_cpu_provider_is_proven_by_a_kernel() -> None:
    pytest.importorskip("onnxruntime", reason="the CPU backend is not installed")
    check = by_name(diagnose())["CPUExecutionProvider"]
    assert check.ok
    assert "matrices" in check.detail


def test_doctor_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime", reason="the CPU backend is not installed")
    assert main(["doctor"]) == 0
    output = capsys.readouterr()
    assert "ok    Python" in output.out
    assert output.err == ""


def test_torch_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(sys.modules)
    diagnose()
    assert not {name for name in set(sys.modules) - before if name.split(".")[0] in ("torch", "tensorrt")}


class FakeSession:
    """A session that claims a provider, and answers as told."""

    def __init__(self, providers: list[str], answer: Any) -> None:
        self._providers, self._answer = providers, answer

    def get_providers(self) -> list[str]:
        return self._providers

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        if isinstance(self._answer, Exception):
            raise self._answer
        return [self._answer * (feeds["a"] @ feeds["b"])]


def fake_runtime(session_providers: list[str], answer: Any) -> Any:
    options = SimpleNamespace(add_session_config_entry=lambda key, value: None)
    return SimpleNamespace(
        SessionOptions=lambda: options,
        InferenceSession=lambda model, options, providers: FakeSession(session_providers, answer),
    )


@pytest.mark.parametrize(
    ("providers", "answer", "told"),
    [
        (["CPUExecutionProvider"], 1.0, "fell back"),
        (["CUDAExecutionProvider"], RuntimeError("no kernel\nimage"), "listed, but fails: no kernel image"),
        (["CUDAExecutionProvider"], 1.5, "is wrong by"),
        (["CUDAExecutionProvider"], np.nan, "is wrong by"),
    ],
)
def test_provider_that_lies_is_found_out(providers: list[str], answer: Any, told: str) -> None:
    check = check_provider(fake_runtime(providers, answer), "CUDAExecutionProvider")
    assert not check.ok
    assert told in check.detail


def test_provider_that_works() -> None:
    assert check_provider(fake_runtime(["CUDAExecutionProvider"], 1.0), "CUDAExecutionProvider").ok


def test_with_no_backend_the_status_is_1() -> None:
    done = without(("onnxruntime", "openvino"), "doctor")
    assert done.returncode == 1, done.stderr
    assert "FAIL  ONNX Runtime" in done.stdout
    assert re.search(r"pip install .*\[cpu\]'", done.stdout)


def test_openvino_alone_is_enough() -> None:
    pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    done = without(("onnxruntime",), "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no    ONNX Runtime" in done.stdout
    assert re.search(r"ok    openvino +\S+, multiplied two 64 x 64 matrices", done.stdout)
    assert "FAIL" not in done.stdout


def test_an_openvino_that_fails_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise BackendError("no plugin for this CPU")

    monkeypatch.setattr(doctor, "_spec", lambda module: object())
    monkeypatch.setattr(doctor, "open_session", fails)
    check = doctor._openvino()
    assert not check.ok
    assert "fails: no plugin for this CPU" in check.detail


def test_tensorrt_without_a_driver_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_spec", lambda module: object())
    monkeypatch.setattr(doctor, "installed", lambda package: "10.3.0")
    absent = Check("NVIDIA driver", False, "none", "install it")
    check = doctor._tensorrt("TensorRT", "tensorrt", ("tensorrt",), "tensorrt", absent)
    assert not check.ok
    assert check.detail == "10.3.0 is installed, but cannot run: no working driver"
    present = Check("NVIDIA driver", True, "CUDA 12.6")
    assert doctor._tensorrt("TensorRT", "tensorrt", ("tensorrt",), "tensorrt", present).ok


class FakeCuda:
    """libcuda with one Orin."""

    def __init__(self, status: int = 0, count: int = 1, broken: int | None = None) -> None:
        self.status, self.count, self.broken = status, count, broken

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 12060
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:  # noqa: N802
        return 101 if index == self.broken else 0

    def cuDeviceGetName(self, name: Any, length: int, handle: Any) -> int:  # noqa: N802
        name.value = b"Orin"
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, handle: Any) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 7, 16: 16}[attribute]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, handle: Any) -> int:  # noqa: N802
        memory._obj.value = 62 * 2**30
        return 0


@pytest.mark.parametrize(
    ("cuda", "ok", "told"),
    [
        (FakeCuda(), True, "for CUDA 12.6; Orin (sm_87)"),
        (FakeCuda(count=0), False, "for CUDA 12.6, no GPU"),
        (FakeCuda(status=100), False, "libcuda.so.1 is there, but cuInit fails with 100"),
        (FakeCuda(broken=0), False, "for CUDA 12.6, GPU 0 does not answer (error 101)"),
        (FakeCuda(count=2, broken=1), True, "for CUDA 12.6; Orin (sm_87), GPU 1 does not answer (error 101)"),
    ],
)
def test_driver(cuda: FakeCuda, ok: bool, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: cuda)
    check = doctor._driver()
    assert (check.ok, check.detail) == (ok, told)
