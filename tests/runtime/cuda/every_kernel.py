"""Kernels that are compiled and measured without a GPU: those of the tests, and those of published models' sizes."""

from __future__ import annotations

from blip2edge.runtime.cuda.kernel import Kernel
from blip2edge.runtime.cuda.products import RowProduct
from blip2edge.runtime.cuda.steps import attention_kernel
from tests.runtime.cuda import test_attention, test_products, test_sampling, test_steps


def kernels() -> list[Kernel]:
    """One of each name."""
    wide = [
        RowProduct(bits, rows, 2560, (2560,), 0 if bits == 16 else 64) for bits in (16, 8, 4) for rows in (1, 2, 3, 4)
    ]
    products = [product.kernel for product in wide]
    heads = [attention_kernel(width, group) for width, group in ((64, 8), (80, 1), (96, 1), (128, 4), (256, 5))]
    found = [
        *products,
        *heads,
        *test_products.KERNELS,
        *test_attention.KERNELS,
        *test_steps.KERNELS,
        *test_sampling.KERNELS,
    ]
    return list({kernel.name: kernel for kernel in found}.values())
