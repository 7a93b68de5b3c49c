"""Kernels that are compiled and measured without a GPU: those of the tests, and those of published models' sizes."""

from __future__ import annotations

from blip2edge.runtime.cuda.kernel import Kernel
from blip2edge.runtime.cuda.products import Gemv
from tests.runtime.cuda import test_gemv


def kernels() -> list[Kernel]:
    """One of each name."""
    wide = [Gemv(bits, rows, 2560, (2560,), 0 if bits == 16 else 64) for bits in (16, 8, 4) for rows in (1, 2, 3, 4)]
    found = [product.kernel for product in (*wide, *test_gemv.CASES)]
    return list({kernel.name: kernel for kernel in found}.values())
