"""Weights on huge pages: a Linux core that walks 2 MiB pages streams a decoder's weights faster.

Decoding reads every weight once a token, and with pages of 4 KiB a core waits for their addresses as much as for the
bytes, the more so in a virtual machine, where each address is looked up twice. NumPy asks for huge pages by itself;
ONNX Runtime and the C library it allocates from do not. So what a session has filled is gathered into huge pages
once it is loaded: ``madvise(2)``, MADV_HUGEPAGE and (Linux 6.1) MADV_COLLAPSE.

(Giving back with malloc_trim(3) what loading has freed saves a tenth of the memory, but takes small pages out from
between the weights, so that fewer huge ones are whole. It is not done.)
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
PRESENT = np.uint64(63)  # bit of an entry; linux: Documentation/admin-guide/mm/pagemap.rst
ENTRY = 8  # bytes a page
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux: include/uapi/asm-generic/mman-common.h
FILLED = 0.75
"""The share of a huge page that has to be in use before it is made one: it takes all of its memory then."""


def huge_page_bytes() -> int:
    """Bytes of the huge pages that the kernel gives to a process that asks for them; 0 where it gives none."""
    if sys.platform != "linux":
        return 0
    try:
        allowed = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii")) if allowed else 0
    except OSError:  # a kernel without them
        return 0


@contextmanager
def on_huge_pages() -> Iterator[None]:
    """Gathers what is filled within, and is still there at the end, into huge pages; elsewhere it does nothing.

    The memory stays the process's own and goes back as it would have: only the size of its pages changes.
    """
    size = huge_page_bytes()
    if not size:
        yield
        return
    before = filled_pages(size)
    yield
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in sorted(filled_pages(size) - before):
        # Advice, a page at a time: one that the kernel cannot gather stays as it is, and the next is tried.
        madvise(page, size, MADV_HUGEPAGE)
        madvise(page, size, MADV_COLLAPSE)


def filled_pages(size: int) -> set[int]:
    """The addresses of huge pages' places, in this process's memory behind which there is no file, that are in use."""
    found: set[int] = set()
    small = size // mmap.PAGESIZE
    try:
        with PAGEMAP.open("rb", buffering=0) as pagemap:
            for start, end in anonymous_regions():
                first, last = -(-start // size) * size, end // size * size
                if first >= last:
                    continue
                pagemap.seek(first // mmap.PAGESIZE * ENTRY)
                entries = np.frombuffer(pagemap.read((last - first) // mmap.PAGESIZE * ENTRY), np.uint64)
                whole = entries[: len(entries) // small * small].reshape(-1, small)
                share = (whole >> PRESENT).mean(axis=1)
                found.update((first + np.flatnonzero(share >= FILLED) * size).tolist())
    except OSError:  # the system does not tell
        return set()
    return found


def anonymous_regions() -> list[tuple[int, int]]:
    """This process's private writable memory behind which there is no file: the first address, and that behind it."""
    regions = []
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, _, end = span.partition("-")
            regions.append((int(first, 16), int(end, 16)))
    return regions
