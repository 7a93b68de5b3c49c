"""NVRTC compiles every kernel for every target, within the target's registers and shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from blip2edge.errors import BackendError
from blip2edge.runtime.cuda.compilation import compiler
from blip2edge.runtime.cuda.compilation.cubin import kernel_usage
from blip2edge.runtime.cuda.kernel import THREADS, Kernel
from tests.runtime.cuda import every_kernel

REGISTERS = 65536  # of a multiprocessor and of a block, on every target
SHARED = 48 << 10  # of a block, on every target, without asking for more
RESERVED = 1024  # shared memory that the system takes of a block from 9.0 on
SPILLED = 64  # bytes of a thread's registers in local memory that are no concern


def check(kernels: Sequence[Kernel], capability: int) -> None:
    used = kernel_usage(compiler.compile_kernels(kernels, capability))
    assert set(used) == {kernel.name for kernel in kernels}
    for kernel in kernels:
        one = used[kernel.name]
        assert 0 < one.registers * THREADS <= REGISTERS, (kernel.name, one)
        assert kernel.shared + max(one.shared, RESERVED) <= SHARED, (kernel.name, one)
        assert one.stack <= SPILLED, (kernel.name, one)


@pytest.fixture(scope="module", autouse=True)
def _nvrtc() -> None:
    try:
        compiler.load_nvrtc()
        compiler.headers()
    except BackendError as error:
        pytest.skip(str(error))


def test_old_versions_compile_for_the_targets_that_they_know(monkeypatch: pytest.MonkeyPatch) -> None:
    known = compiler.supported_targets()
    assert set(known) >= {75, 87, 90, 120}
    monkeypatch.setattr(compiler, "TARGETS", (35, *known))
    assert compiler.supported_targets() == known


def test_one_kernel_of_each_source_compiles() -> None:
    kernels = {kernel.file: kernel for kernel in every_kernel.kernels()}
    check(list(kernels.values()), 87)


@pytest.mark.slow
@pytest.mark.parametrize("capability", compiler.TARGETS)
def test_every_kernel_fits_every_target(capability: int) -> None:
    check(every_kernel.kernels(), capability)


def test_an_error_of_the_compiler_is_one_line() -> None:
    kernel = every_kernel.kernels()[0]
    wrong = Kernel(kernel.file, "no_such_kernel", ("1",), kernel.arguments, 0)
    with pytest.raises(BackendError, match="no_such_kernel") as caught:
        compiler.compile_kernels([wrong], 87)
    assert "\n" not in str(caught.value)
