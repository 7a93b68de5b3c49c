"""Compiles kernels to cubins with NVRTC; neither a GPU nor a driver is needed.

NVRTC comes in the wheel ``nvidia-cuda-nvrtc``, CUDA's headers in ``nvidia-cuda-runtime``.
``cuda-bindings`` calls NVRTC.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip2edge.errors import BackendError
from blip2edge.packages import install_command
from blip2edge.runtime.cuda.kernel import KERNELS, Kernel, module_source

TARGETS = (75, 80, 86, 87, 89, 90, 100, 110, 120)
"""Compute capabilities that cubins are made for, times ten. A cubin also runs on later minor versions."""

HEADERS = ("nvidia/cu13/include", "nvidia/cuda_runtime/include")
"""Folders of ``cuda_fp16.h`` in the wheels of CUDA 13 and 12, below site-packages."""


def load_nvrtc() -> Any:
    """Imports the module of cuda-bindings with NVRTC.

    Raises:
        BackendError: cuda-bindings or NVRTC is not installed.
    """
    try:
        nvrtc = importlib.import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"NVRTC does not load: {_once(str(error))}", INSTALL) from error
    return nvrtc


def _once(text: str) -> str:
    """Returns a message of cuda-bindings in one line without repeats: it names a missing library once for each try."""
    first, *more = (part.strip() for part in text.split(", "))
    return ", ".join([first, *dict.fromkeys(part for part in more if part not in first)])


def supported_targets() -> tuple[int, ...]:
    """Returns the targets (of :data:`TARGETS`) that the installed NVRTC supports; CUDA 12's NVRTC lacks sm_110.

    Raises:
        BackendError: NVRTC is not installed.
    """
    nvrtc = load_nvrtc()
    status, known = nvrtc.nvrtcGetSupportedArchs()
    _check(nvrtc, status)
    return tuple(target for target in TARGETS if target in known)


INSTALL = install_command("cuda-decoder")


def headers() -> Path:
    """Finds the directory of CUDA's headers among the installed packages.

    Raises:
        BackendError: nvidia-cuda-runtime is not installed.
    """
    try:
        places = list(importlib.import_module("nvidia").__path__)
    except ImportError:
        places = []
    for place in places:
        for folder in HEADERS:
            if (Path(place).parent / folder / "cuda_fp16.h").exists():
                return Path(place).parent / folder
    raise BackendError("cuda_fp16.h is not installed", INSTALL)


def compile_kernels(kernels: Iterable[Kernel], capability: int) -> bytes:
    """Compiles kernels to one cubin.

    Args:
        kernels: The kernels.
        capability: Compute capability times ten, one of :data:`TARGETS`.

    Returns:
        The cubin, an ELF file.

    Raises:
        BackendError: NVRTC is not installed, or does not compile the kernels.
    """
    nvrtc = load_nvrtc()
    options = [f"-arch=sm_{capability}", "-std=c++17", "-default-device", f"-I{KERNELS}", f"-I{headers()}"]
    status, program = nvrtc.nvrtcCreateProgram(module_source(kernels).encode(), b"kernels.cu", 0, [], [])
    _check(nvrtc, status)
    try:
        given = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(given), given)
        if int(status):
            reason = _log(nvrtc, program)
            raise BackendError(f"NVRTC does not compile the kernels for sm_{capability}: {reason}", INSTALL)
        status, size = nvrtc.nvrtcGetCUBINSize(program)
        _check(nvrtc, status)
        cubin = bytearray(size)
        (status,) = nvrtc.nvrtcGetCUBIN(program, cubin)
        _check(nvrtc, status)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _log(nvrtc: Any, program: Any) -> str:
    """Returns the first error of the compiler's log, in one line."""
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytearray(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    lines = log.decode(errors="replace").strip("\0 \n").splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def _check(nvrtc: Any, status: Any) -> None:
    if int(status):
        text = nvrtc.nvrtcGetErrorString(status)[1]
        raise BackendError(f"NVRTC failed: {text.decode() if isinstance(text, bytes) else text}", INSTALL)
