"""Kernels on the CPU: compiled by g++ with ``shim/cuda_shim.hpp``, and run with NumPy arrays in guarded memory."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.runtime.cuda.kernel import KERNELS, THREADS, Kernel, Launch, module_source

SHIM = Path(__file__).parent / "shim"
CHECKED = ("-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error")
"""A load at an address that is no multiple of its size ends the process, as it ends a kernel on a GPU; so does an index
behind the end of an array of a thread."""

FLAGS = ("-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-w", *CHECKED)
FAULTS = {1: "deadlock: not all threads reach a barrier", 2: "writes behind its shared memory", 3: "bad launch"}
FORWARD, REVERSED, RANDOM = 0, 1, 7
"""Orders of the threads; from 2 on, the seed of a random order."""

ORDERS = (FORWARD, REVERSED, RANDOM)

GUARD = 512  # bytes before and after each array


LOAD = np.dtype(
    [("address", np.uint64), ("size", np.uint32), ("block", np.uint32), ("warp", np.uint32), ("number", np.uint32)],
    align=True,
)
"""A load of weights by one lane; the lanes of a warp with the same number load at once."""


class FaultError(Exception):
    """A kernel did what would hang or corrupt memory on a GPU."""


class Shim:
    """A compiled module of kernels.

    Args:
        kernels: The kernels.
        sources: Directory of the kernels' templates.
        keep: Whether the compiled module is kept for later tests with the same sources.
    """

    def __init__(self, kernels: Iterable[Kernel], sources: Path = KERNELS, *, keep: bool = True) -> None:
        unique = {kernel.name: kernel for kernel in kernels}
        text = module_source(unique.values()) + "".join(map(_entry, unique.values()))
        module = compiled(text, sources)
        self.library = ctypes.CDLL(str(module))
        if not keep:
            module.unlink()
        for kernel in unique.values():
            size = ctypes.c_size_t.in_dll(self.library, f"size_{kernel.name}").value
            assert size == ctypes.sizeof(kernel.arguments), f"{kernel.arguments.__name__} differs in C++ and Python"

    def run(self, launch: Launch, order: int = FORWARD) -> None:
        """Runs a launch; raises FaultError for a deadlock or a write behind shared memory."""
        function = getattr(self.library, f"run_{launch.kernel.name}")
        grid = (ctypes.c_uint * 3)(*launch.grid)
        fault = function(ctypes.byref(launch.arguments), grid, THREADS, ctypes.c_size_t(launch.kernel.shared), order)
        if fault:
            raise FaultError(f"{launch.kernel.name}: {FAULTS[fault]}")

    def loads(self, launch: Launch) -> np.ndarray[Any, Any]:
        """Runs a launch; returns the loads of weights that its threads do, an array of :data:`LOAD`."""
        place = ctypes.c_void_p()
        self.library.shim_record.restype = ctypes.c_size_t
        self.library.shim_record(True, ctypes.byref(place))
        self.run(launch)
        count = self.library.shim_record(False, ctypes.byref(place))
        raw = ctypes.string_at(place.value or 0, count * LOAD.itemsize)
        return np.frombuffer(raw, LOAD)


def _entry(kernel: Kernel) -> str:
    arguments = kernel.arguments.__name__
    return (
        f'extern "C" int run_{kernel.name}(const {arguments}* a, const unsigned* grid, unsigned threads, '
        f"size_t shared, int order) {{\n"
        f"    return shim::launch<{arguments}>({kernel.name}, a, grid, threads, shared, order);\n"
        f"}}\n"
        f'extern "C" {{ extern const size_t size_{kernel.name}; }}\n'
        f"const size_t size_{kernel.name} = sizeof({arguments});\n"
    )


def compiled(text: str, sources: Path) -> Path:
    """Compiles a module; once for the same sources."""
    compiler = shutil.which("g++")
    if compiler is None:
        import pytest  # the dry run of benchmarks/gpu.py has none

        pytest.skip("g++ is not installed; it compiles the kernels for the CPU")
    key = hashlib.sha256(f"{FLAGS}{text}".encode())
    for file in sorted((*sources.glob("*.cuh"), *SHIM.iterdir())):
        key.update(file.read_bytes())
    folder = Path(tempfile.gettempdir()) / "blip2edge-kernels"
    folder.mkdir(exist_ok=True)
    output = folder / f"{key.hexdigest()[:24]}.so"
    if not output.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unit, made = Path(scratch) / "unit.cpp", Path(scratch) / "unit.so"
            unit.write_text(text)
            command = [compiler, *FLAGS, f"-I{SHIM}", f"-I{sources}", str(unit), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[:4000])
            made.replace(output)
    return output


class Memory:
    """Arrays at addresses that a kernel may use, with guards before and after each.

    The guards hold NaN (0xff bytes), so that a kernel that reads them gives a wrong result; :meth:`check` finds writes.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Any, np.ndarray[Any, Any]]] = []

    def put(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Returns a copy of the array with guards around it."""
        values = np.ascontiguousarray(values)
        raw = np.full(values.nbytes + 2 * GUARD + 64, 0xFF, np.uint8)
        start = GUARD + -(raw.ctypes.data + GUARD) % 64
        inner = raw[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
        inner[...] = values
        self._kept.append((raw, np.array([start, values.nbytes])))
        return inner

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """Returns an array of NaN (all bits set) with guards around it."""
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return self.put(np.full(count, 0xFF, np.uint8)).view(dtype).reshape(shape)

    def check(self) -> None:
        """Raises FaultError if something was written outside of the arrays."""
        for raw, (start, size) in self._kept:
            if (raw[:start] != 0xFF).any() or (raw[start + size :] != 0xFF).any():
                raise FaultError("writes outside of an array")


def ulps(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], dtype: Any, floor: float) -> float:
    """The largest difference in units in the last place of ``dtype``; smaller values than ``floor`` have its units."""
    spacing = np.spacing(np.maximum(np.abs(wanted), floor).astype(dtype)).astype(np.float64)
    return float((np.abs(found.astype(np.float64) - wanted) / spacing).max())
