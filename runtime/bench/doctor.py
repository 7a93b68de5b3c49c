"""What this machine can really run.

A list of execution providers is a promise: a wheel names CUDA and fails at the first kernel, or falls back to
the CPU in silence. So every provider multiplies two matrices here, with the fallback switched off, and the
product is compared with NumPy's. Nothing is imported that could be missing, and torch never is.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import platform
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.runtime.backends.probe import Check, check_provider, cores, facts, one_line, processor

if TYPE_CHECKING:
    pass

MEASURED_PACKAGES = ("numpy", "pillow", "tokenizers", "safetensors", "huggingface-hub", "onnx", "onnxscript")
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-lean", "tensorrt-dispatch")
RTX_PACKAGES = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
# What decides the speed of small matrices, under the kernel's names: x86 first, then Arm.
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
    """Look at the machine and at what is installed; takes about a second.

    Returns:
        The findings, from the interpreter to the accelerators. Nothing is raised for what is missing: that
        is a finding too.
    """
    driver = _driver()
    return [
        _python(),
        _platform(),
        _processor(),
        _memory(),
        _packages(),
        *_onnxruntime(),
        _optional("openvino", ("openvino",), "pip install 'blip2edge[openvino]'"),
        driver,
        _tensorrt("TensorRT", "tensorrt", TENSORRT_PACKAGES, "tensorrt", driver),
        _tensorrt("TensorRT-RTX", "tensorrt_rtx", RTX_PACKAGES, "rtx", driver),
        _optional(
            "torch", ("torch",), "only export and training need it: pip install 'blip2edge[cpu,export]'"
        ),
    ]


def _python() -> Check:
    version = platform.python_version()
    ok = sys.version_info[:2] >= LEAST_PYTHON
    detail = f"{platform.python_implementation()} {version}, {sys.executable}"
    export = "" if sys.version_info >= (3, 11) else "; export and training need 3.11 or newer"
    return Check("Python", ok, detail + export, None if ok else "install Python 3.10 or newer", required=True)


def _platform() -> Check:
    board = _read("/proc/device-tree/model").strip("\0 \n")
    jetpack = _read("/etc/nv_tegra_release").split("\n")[0].lstrip("# ")
    parts = [platform.platform(), platform.machine(), board, jetpack]
    return Check("platform", True, ", ".join(part for part in parts if part))


def _processor() -> Check:
    told = facts()
    features = (told.get("flags") or told.get("Features", "")).split()
    found = [feature for feature in CPU_FEATURES if feature in features]
    count = cores()
    detail = f"{processor()}, {count} core{'s' if count != 1 else ''}"
    return Check("CPU", True, f"{detail}; {' '.join(found) if found else 'features not known'}")


def _memory() -> Check:
    figures = {}  # name -> KiB
    for line in _read("/proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if value.split()[:1] and value.split()[0].isdigit():
            figures[name] = int(value.split()[0])
    if "MemTotal" not in figures:
        return Check("memory", True, "not known on this platform")
    total = figures["MemTotal"] * 1024 / 1e9
    free = figures.get("MemAvailable", 0) * 1024 / 1e9
    detail = f"{total:.1f} GB, {free:.1f} GB available"
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit() and int(limit) / 1e9 < total:
        detail += f", limited to {int(limit) / 1e9:.1f} GB"
    return Check("memory", True, detail)


def _packages() -> Check:
    found = [f"{name} {version}" for name in MEASURED_PACKAGES if (version := _version(name)) is not None]
    missing = [name for name in ("numpy", "pillow", "tokenizers") if _version(name) is None]
    if missing:
        return Check(
            "packages", False, f"{', '.join(missing)} missing", "pip install blip2edge", required=True
        )
    return Check("packages", True, ", ".join(found))


def _onnxruntime() -> list[Check]:
    """The package itself, then each provider that it names, proven by a product of two matrices."""
    fix = "pip install 'blip2edge[cpu]'; on a Jetson, NVIDIA's own wheel of onnxruntime-gpu"
    if importlib.util.find_spec("onnxruntime") is None:
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


def _optional(module: str, packages: tuple[str, ...], fix: str) -> Check:
    """Presence and version of a package, without importing it."""
    if _spec(module) is None:
        return Check(module, False, "not installed", fix)
    versions = [version for package in packages if (version := _version(package)) is not None]
    return Check(module, True, versions[0] if versions else "installed, version not recorded")


def _driver() -> Check:
    """The NVIDIA driver and its devices, asked through libcuda itself."""
    fix = "install NVIDIA's driver; without an NVIDIA GPU use the CPU or OpenVINO"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Check("NVIDIA driver", False, "none: libcuda.so.1 is not there", fix)
    status = cuda.cuInit(0)
    if status != 0:
        return Check("NVIDIA driver", False, f"libcuda.so.1 is there, but cuInit fails with {status}", fix)
    version, count = ctypes.c_int(0), ctypes.c_int(0)
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Check("NVIDIA driver", False, "libcuda.so.1 does not answer", fix)
    devices = [_device(cuda, index) for index in range(count.value)]
    supports = f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"
    if not devices:
        return Check("NVIDIA driver", False, f"for {supports}, no GPU", fix)
    return Check("NVIDIA driver", True, f"for {supports}; {', '.join(devices)}")


def _device(cuda: ctypes.CDLL, index: int) -> str:
    """Name and compute capability of one GPU, as `NVIDIA L4 (sm_89)`."""
    capability_major, capability_minor = (
        75,
        76,
    )  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}, cuda.h
    handle, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
    name = ctypes.create_string_buffer(128)
    failed = (
        cuda.cuDeviceGet(ctypes.byref(handle), index)
        or cuda.cuDeviceGetName(name, len(name), handle)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), capability_major, handle)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), capability_minor, handle)
    )
    if failed:
        return f"GPU {index} does not answer ({failed})"
    return f"{name.value.decode(errors='replace')} (sm_{major.value}{minor.value})"


def _tensorrt(name: str, module: str, packages: tuple[str, ...], extra: str, driver: Check) -> Check:
    """Presence and version of a TensorRT, without importing it: without a driver that can end the process."""
    fix = f"with an NVIDIA GPU: pip install 'blip2edge[{extra}]'"
    if extra == "tensorrt":
        fix += "; on a Jetson it comes with JetPack, make the environment with --system-site-packages"
    versions = [version for package in packages if (version := _version(package)) is not None]
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


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    """A small system file, or nothing where it does not exist or may not be read."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
