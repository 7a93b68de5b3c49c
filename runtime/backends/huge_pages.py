"""Moves the memory of a loaded graph to huge pages, in a thread of its own.

With pages of 4 KiB, a core that reads half a gigabyte for each token spends as much time on address translation (TLB
misses) as on reading. The kernel needs 1 ms to collapse 2 MiB of small pages into a huge page, and up to 7 ms if free
memory is fragmented; half a gigabyte takes up to 2 s. The graph can run at once; it becomes faster as pages are moved.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
MAPS, PAGEMAP = Path("/proc/self/maps"), Path("/proc/self/pagemap")
PRESENT = np.uint64(63)  # bit of an entry; linux: Documentation/admin-guide/mm/pagemap.rst
ENTRY = 8  # bytes a page
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # linux: include/uapi/asm-generic/mman-common.h
LEAST_FILLED = 0.75
"""Memory is moved into a huge page only if at least this share of the huge page is in use; the rest is wasted."""

_changed = threading.Condition()
_threads: list[threading.Thread] = []
"""The threads that move pages; `_changed` guards the list."""

_loading: set[object] = set()
"""One object for each graph that is being loaded; no page is moved meanwhile, because that makes page faults slow."""


def huge_page_bytes() -> int:
    """Returns the size of Linux's huge pages in bytes; 0 if a process cannot request huge pages."""
    if sys.platform != "linux":
        return 0
    try:
        allowed = "[never]" not in (SETTINGS / "enabled").read_text(encoding="ascii")
        return int((SETTINGS / "hpage_pmd_size").read_text(encoding="ascii")) if allowed else 0
    except OSError:  # a kernel without them
        return 0


@dataclass
class HugePages:
    """The result of :func:`on_huge_pages`: the ``with`` block sets ``wanted`` to False if it needs no huge pages."""

    wanted: bool = True


@contextmanager
def on_huge_pages() -> Iterator[HugePages]:
    """Moves memory that the ``with`` block allocates into huge pages, for fewer TLB misses; Linux only.

    A background thread moves the pages after the block; :func:`wait_for_huge_pages` waits for it. Only the page size
    changes: the memory still belongs to the process and is freed as before.
    """
    size, choice, mark = huge_page_bytes(), HugePages(), object()
    if not size:
        yield choice
        return
    before = filled_pages(size)
    with _changed:
        _loading.add(mark)
    try:
        yield choice
    finally:
        with _changed:
            _loading.remove(mark)
            _changed.notify_all()
    pages = sorted(filled_pages(size) - before) if choice.wanted else []
    if pages:
        # A daemon: the process may end before all pages are moved.
        thread = threading.Thread(target=_collapse, args=(pages, size), name="huge-pages", daemon=True)
        thread.start()
        with _changed:
            _threads[:] = [*(one for one in _threads if one.is_alive()), thread]


def wait_for_huge_pages() -> None:
    """Waits until the memory of all loaded graphs is moved. Call it before graphs are timed.

    Otherwise the background thread takes CPU time, and early runs are slower than later ones.
    """
    with _changed:
        running = list(_threads)
    for thread in running:
        thread.join()


def _collapse(pages: Sequence[int], size: int) -> None:
    """Asks the kernel to collapse regions (addresses, ``size`` bytes each) into huge pages, when no graph is loaded."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for page in pages:
        with _changed:
            _changed.wait_for(lambda: not _loading)
        # Advice for one page at a time: a page that the kernel cannot collapse, or that was freed, stays as it is.
        madvise(page, size, MADV_HUGEPAGE)
        madvise(page, size, MADV_COLLAPSE)


def filled_pages(size: int) -> set[int]:
    """Returns the addresses of aligned regions in this process's anonymous memory that are mostly in use.

    Args:
        size: Size of a region in bytes: that of a huge page.
    """
    found: set[int] = set()
    pages = size // mmap.PAGESIZE
    try:
        with PAGEMAP.open("rb", buffering=0) as pagemap:
            for start, end in anonymous_regions():
                first, last = -(-start // size) * size, end // size * size
                if first >= last:
                    continue
                pagemap.seek(first // mmap.PAGESIZE * ENTRY)
                entries = np.frombuffer(pagemap.read((last - first) // mmap.PAGESIZE * ENTRY), np.uint64)
                whole = entries[: len(entries) // pages * pages].reshape(-1, pages)
                share = (whole >> PRESENT).mean(axis=1)
                found.update((first + np.flatnonzero(share >= LEAST_FILLED) * size).tolist())
    except OSError:  # this system has no pagemap
        return set()
    return found


def anonymous_regions() -> list[tuple[int, int]]:
    """Lists this process's anonymous memory (private, writable, of no file): (first address, end) of each region."""
    regions = []
    for line in MAPS.read_text(encoding="utf-8", errors="replace").splitlines():
        span, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and (not name or name[0] == "[heap]"):
            first, _, end = span.partition("-")
            regions.append((int(first, 16), int(end, 16)))
    return regions
