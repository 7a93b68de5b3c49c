"""Weights on huge pages: a Linux core that walks 2 MiB pages streams a decoder's weights up to a third faster.

Decoding reads every weight once a token, and with pages of 4 KiB a core waits for their addresses as much as for the
bytes, the more so in a virtual machine, where each address is looked up twice. NumPy asks for huge pages by itself;
ONNX Runtime and the C library it allocates from do not. So what a session has allocated is gathered into huge pages
once it is loaded: ``madvise(2)``, MADV_HUGEPAGE and (Linux 6.1) MADV_COLLAPSE. What loading has freed goes back before that:
the C library would keep it, a third of a large decoder's memory.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PAGE = 1 << 21  # bytes of a huge page on x86-64, and on ARM with pages of 4 KiB
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MAPS = Path("/proc/self/maps")
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux: include/uapi/asm-generic/mman-common.h

Region = tuple[int, int]
"""First address, and the one behind the last."""


def huge_pages_allowed() -> bool:
    """Whether the kernel gives huge pages to a process that asks for them."""
    try:
        return sys.platform == "linux" and "[never]" not in SETTING.read_text(encoding="ascii")
    except OSError:  # a kernel without them
        return False


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Gathers what is allocated within, and is still there at the end, into huge pages; elsewhere it does nothing.

    The memory stays the process's own and goes back as it would have: only the size of its pages changes.
    """
    if not huge_pages_allowed():
        yield
        return
    before = anonymous_regions()
    yield
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's
        libc.malloc_trim(0)
    _gather(libc.madvise, added(before, anonymous_regions()))


def anonymous_regions() -> list[Region]:
    """This process's private writable memory behind which there is no file, in order."""
    regions = []
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, _, end = span.partition("-")
            regions.append((int(first, 16), int(end, 16)))
    return regions


def added(before: list[Region], after: list[Region]) -> list[Region]:
    """What of ``after`` is not in ``before``; both in order."""
    found = []
    for start, end in after:
        for first, last in before:
            if last <= start or first >= end:
                continue
            if first > start:
                found.append((start, first))
            start = last
        if start < end:
            found.append((start, end))
    return found


def _gather(madvise: Any, regions: list[Region]) -> None:
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for start, end in regions:
        first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
        if first < last:
            # Advice: a kernel that does not take it, or finds no free huge page, leaves everything as it is.
            madvise(first, last - first, MADV_HUGEPAGE)
            madvise(first, last - first, MADV_COLLAPSE)
