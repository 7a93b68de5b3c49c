"""Checks what this machine can run: ``blip2edge doctor``.

A package may list an execution provider that does not work: it fails at the first kernel, or falls back to the CPU
without a message. So two matrices are multiplied on every provider of ONNX Runtime and on OpenVINO, and the result is
compared with NumPy's. A missing package is a failed check, not an exception. torch is never imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import one_line
from blip2edge.packages import installed, pip_command
from blip2edge.runtime.backends.base import open_session
from blip2edge.runtime.backends.probe import (
    MATMUL,
    Check,
    check_matmul,
    check_provider,
    cores,
    cpu_facts,
    nvidia_driver,
    processor,
)
from blip2edge.runtime.bench.board import board_checks, read_file
from blip2edge.runtime.bench.devices import GB
from blip2edge.runtime.bench.memory import machine_memory

MEASURED_PACKAGES = ("numpy", "pillow", "tokenizers", "safetensors", "huggingface-hub", "onnx", "onnxscript")
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-lean", "tensorrt-dispatch")
RTX_PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
# What the speed of small matrices depends on, as /proc/cpuinfo names it: x86 first, then Arm.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
SKIPPED_PROVIDERS = ("AzureExecutionProvider",)  # calls a remote service; runs no kernel here
LEAST_PYTHON = (3, 10)


def diagnose() -> list[Check]:
    """Checks the machine and the installed packages; takes about a second.

    Returns:
        The checks, from the interpreter to the accelerators. A missing package is a failed check, never an exception.
        ONNX Runtime is required only if no other backend works.
    """
    driver = _driver()
    openvino = _openvino()
    tensorrt = _tensorrt("TensorRT", "tensorrt", TENSORRT_PACKAGES, "tensorrt", driver)
    rtx = _tensorrt("TensorRT-RTX", "tensorrt_rtx", RTX_PACKAGES, "rtx", driver)
    required = not any(check.ok for check in (openvino, tensorrt, rtx))
    return [
        _python(),
        _platform(),
        _processor(),
        _memory(),
        *board_checks(),
        _packages(),
        *(replace(check, required=check.required and required) for check in _onnxruntime()),
        openvino,
        driver,
        tensorrt,
        rtx,
        _installed("torch", ("torch",), f"only export and training need it: {pip_command('cpu,export')}"),
    ]


def _python() -> Check:
    version = platform.python_version()
    ok = sys.version_info[:2] >= LEAST_PYTHON
    detail = f"{platform.python_implementation()} {version}, {sys.executable}"
    export = "" if sys.version_info >= (3, 11) else "; export and training need 3.11 or newer"
    return Check("Python", ok, detail + export, None if ok else "install Python 3.10 or newer", required=True)


def _platform() -> Check:
    board = read_file(Path("/proc/device-tree/model"))
    jetpack = read_file(Path("/etc/nv_tegra_release")).split("\n")[0].lstrip("# ")
    parts = [platform.platform(), platform.machine(), board, jetpack]
    return Check("platform", True, ", ".join(part for part in parts if part))


def _processor() -> Check:
    found = cpu_facts()
    features = (found.get("flags") or found.get("Features", "")).split()
    known = [feature for feature in CPU_FEATURES if feature in features]
    count = cores()
    detail = f"{processor()}, {count} core{'s' if count != 1 else ''}"
    return Check("CPU", True, f"{detail}; {' '.join(known) if known else 'features not known'}")


def _memory() -> Check:
    memory = machine_memory()
    if memory is None:
        return Check("memory", True, "not known on this platform")
    detail = f"{memory.ram / GB:.1f} GB, {memory.available / GB:.1f} GB available"
    if memory.limit is not None and memory.limit < memory.ram:
        detail += f", limited to {memory.limit / GB:.1f} GB"
    return Check("memory", True, detail)


def _packages() -> Check:
    found = [f"{name} {version}" for name in MEASURED_PACKAGES if (version := installed(name))]
    missing = [name for name in ("numpy", "pillow", "tokenizers") if not installed(name)]
    if missing:
        return Check("packages", False, f"{', '.join(missing)} missing", pip_command(), required=True)
    return Check("packages", True, ", ".join(found))


def _onnxruntime() -> list[Check]:
    """Checks the package onnxruntime, and multiplies two matrices on each provider that it lists."""
    fix = f"{pip_command('cpu')}; on a Jetson, NVIDIA's own wheel of onnxruntime-gpu"
    if _spec("onnxruntime") is None:
        return [Check("ONNX Runtime", False, "not installed", fix, required=True)]
    try:
        ort: Any = importlib.import_module("onnxruntime")
        names = [str(name) for name in ort.get_available_providers()]
    except (
        ImportError,
        AttributeError,
        OSError,
    ) as error:  # a broken install, or an empty folder of that name
        return [Check("ONNX Runtime", False, f"does not import: {one_line(error)}", fix, required=True)]
    checks = [Check("ONNX Runtime", True, f"{ort.__version__}, names {', '.join(names)}", required=True)]
    checks.extend(check_provider(ort, name) for name in names if name not in SKIPPED_PROVIDERS)
    return checks


def _installed(module: str, packages: tuple[str, ...], fix: str) -> Check:
    """Checks whether a package is installed and which version, without importing it."""
    if _spec(module) is None:
        return Check(module, False, "not installed", fix)
    versions = [version for package in packages if (version := installed(package))]
    return Check(module, True, versions[0] if versions else "installed, version not recorded")


def _openvino() -> Check:
    """Checks OpenVINO by multiplying two matrices."""
    check = _installed("openvino", ("openvino",), pip_command("openvino"))
    if not check.ok:
        return check

    def multiply(inputs: Mapping[str, Array]) -> Array:
        with TemporaryDirectory(prefix="blip2edge-doctor-") as folder:
            path = Path(folder) / "matmul.onnx"
            path.write_bytes(MATMUL)
            return open_session(path, "openvino", 1).run(inputs)["c"]

    trial = check_matmul("openvino", multiply, "pip install --force-reinstall openvino")
    return replace(trial, detail=f"{check.detail}, {trial.detail}")


def _driver() -> Check:
    """Checks the NVIDIA driver and its GPUs."""
    driver = nvidia_driver()
    gpus = [f"{gpu.name} (sm_{gpu.compute_capability})" for gpu in driver.gpus]
    found = ", ".join([*gpus, driver.problem] if driver.problem else gpus)
    if driver.version:
        found = f"for CUDA {driver.version}{'; ' if gpus else ', '}{found}"
    fix = None if gpus else "install NVIDIA's driver; without an NVIDIA GPU use the CPU or OpenVINO"
    return Check("NVIDIA driver", bool(gpus), found, fix)


def _tensorrt(name: str, module: str, packages: tuple[str, ...], extra: str, driver: Check) -> Check:
    """Checks a TensorRT package without importing it: without a driver, the import can end the process."""
    fix = f"with an NVIDIA GPU: {pip_command(extra)}"
    if extra == "tensorrt":
        fix += "; on a Jetson it comes with JetPack: create the environment with --system-site-packages"
    versions = [version for package in packages if (version := installed(package))]
    if _spec(module) is None:
        return Check(name, False, "not installed", fix)
    version = versions[0] if versions else "version not recorded"
    if not driver.ok:
        return Check(name, False, f"{version} is installed, but cannot run: no working driver", driver.fix)
    return Check(name, True, f"{version}; no engine was run")


def _spec(module: str) -> object | None:
    try:
        return importlib.util.find_spec(module)
    except (ImportError, ValueError):  # a half-removed package: its __spec__ is None
        return None
