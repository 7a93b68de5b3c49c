"""Describes a kernel: its template's arguments, the size of a thread block, and the structure that is its parameter.

Kernels are templates (``kernels/*.cuh``). :func:`module_source` makes a CUDA C++ module that instantiates the templates
for one decoder; each instance has a plain (not mangled) name.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parent / "kernels"
"""Directory of the kernels' sources."""

WARP = 32
THREADS = 256
"""Number of threads in every block; ``THREADS`` of ``common.cuh``."""


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel's template.

    Attributes:
        file: The source that has the template, a file in :data:`KERNELS`.
        template: The template's name.
        values: The template's arguments, as C++.
        arguments: The structure that is the kernel's parameter; it has the same name in C++.
        shared: Dynamic shared memory of a block, in bytes.
    """

    file: str
    template: str
    values: tuple[str, ...]
    arguments: type[ctypes.Structure]
    shared: int

    @property
    def name(self) -> str:
        """Returns the name of the kernel in a compiled module."""
        return "_".join((self.template, *(re.sub(r"\W", "", value).lower() for value in self.values)))

    def source(self) -> str:
        """Returns the kernel's definition in C++; the file with the template must be included before."""
        values = f"<{', '.join(self.values)}>" if self.values else ""
        return (
            f'extern "C" __global__ void __launch_bounds__({THREADS}) {self.name}('
            f"const __grid_constant__ {self.arguments.__name__} arguments) {{ {self.template}{values}(arguments); }}\n"
        )


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid and its parameter.

    Attributes:
        kernel: The kernel.
        grid: Blocks along x, y and z.
        arguments: The kernel's structure; its addresses are GPU addresses.
        parts: Bytes of scratch memory that the kernel needs at ``arguments.parts``; launches of a stream may share it.
        counters: Number of uint32 counters that the kernel needs at ``arguments.arrived``; they are zero before and
            after the launch.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: Any
    parts: int = 0
    counters: int = 0


def module_source(kernels: Iterable[Kernel]) -> str:
    """Makes the C++ source of a module with these kernels."""
    unique = {kernel.name: kernel for kernel in kernels}
    files = sorted({kernel.file for kernel in unique.values()})
    includes = "".join(f'#include "{file}"\n' for file in files)
    return includes + "".join(kernel.source() for kernel in unique.values())


def pointers(*names: str) -> list[tuple[str, Any]]:
    """Makes a field of a C++ structure for each name; its type is an address."""
    return [(name, ctypes.c_void_p) for name in names]


def integers(*names: str) -> list[tuple[str, Any]]:
    """Makes a field of a C++ structure for each name; its type is ``long long``."""
    return [(name, ctypes.c_longlong) for name in names]
