"""Huge pages: the memory of a new session is collapsed, older memory is not, and no byte changes."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from blip2edge.runtime.backends import huge_pages, onnxruntime_cpu
from blip2edge.runtime.backends.huge_pages import (
    anonymous_regions,
    filled_pages,
    huge_page_bytes,
    on_huge_pages,
    wait_for_huge_pages,
)

SIZE = huge_page_bytes()
linux = pytest.mark.skipif(not SIZE, reason="this kernel gives no huge pages on request")


@contextmanager
def memory(pages: int) -> Iterator[tuple[mmap.mmap, int]]:
    """So many huge pages' bytes that nothing is written to yet, and the address of the first whole one."""
    made = mmap.mmap(-1, (pages + 1) * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    held = ctypes.c_char.from_buffer(made)
    address = ctypes.addressof(held)
    yield made, -(-address // SIZE) * SIZE
    del held
    made.close()


def fill(made: mmap.mmap, start: int, count: int) -> None:
    """Writes each small page's number into it."""
    for number in range(count):
        at = start + number * mmap.PAGESIZE
        made[at : at + 4] = number.to_bytes(4, "little")


def huge_kib(address: int) -> int:
    """KiB on huge pages in the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if span:
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no such mapping")


def gathers(address: int) -> bool:
    """Whether this kernel makes a huge page of a filled place when it is told to."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(address, SIZE, 25) == 0)  # MADV_COLLAPSE


@linux
def test_what_is_filled_within_is_gathered_and_keeps_its_bytes() -> None:
    small = SIZE // mmap.PAGESIZE
    with memory(4) as (made, first):
        offset = first - ctypes.addressof(ctypes.c_char.from_buffer(made))
        fill(made, offset, small)  # the first page before
        if not gathers(first):
            pytest.skip("the kernel cannot gather pages at once (before Linux 6.1), or has no free huge one")
        with on_huge_pages():
            fill(made, offset + SIZE, 2 * small)  # the second and third within
            fill(made, offset + 3 * SIZE, small // 2)  # half of the fourth
        wait_for_huge_pages()
        assert huge_kib(first + SIZE) == 2 * SIZE // 1024
        assert huge_kib(first + 3 * SIZE) == 0
        for start, count in ((0, small), (SIZE, 2 * small), (3 * SIZE, small // 2)):
            for number in range(count):
                at = offset + start + number * mmap.PAGESIZE
                assert int.from_bytes(made[at : at + 4], "little") == number


@linux
def test_the_pages_are_moved_by_a_thread_that_can_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_huge_pages()  # threads of earlier tests
    begun, released = threading.Event(), threading.Event()

    def collapse(pages: Sequence[int], size: int) -> None:
        begun.set()
        released.wait(10)

    monkeypatch.setattr(huge_pages, "_collapse", collapse)
    with memory(2) as (made, first), on_huge_pages():
        fill(made, first - ctypes.addressof(ctypes.c_char.from_buffer(made)), SIZE // mmap.PAGESIZE)
    assert begun.wait(10)  # the block ended, and the pages are not moved yet
    thread = huge_pages._threads[-1]
    assert thread.daemon  # a process does not wait for it at its end
    released.set()
    wait_for_huge_pages()
    assert not thread.is_alive()


@linux
def test_nothing_is_gathered_if_the_block_does_not_want_it() -> None:
    small = SIZE // mmap.PAGESIZE
    with memory(3) as (made, first):
        offset = first - ctypes.addressof(ctypes.c_char.from_buffer(made))
        with on_huge_pages() as pages:
            fill(made, offset, small)
            pages.wanted = False
        wait_for_huge_pages()
        assert huge_kib(first) == 0


@pytest.mark.parametrize(("graph", "wanted"), [("decoder", True), ("vision_encoder", False)])
def test_only_decoders_are_moved(graph: str, wanted: bool, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[huge_pages.HugePages] = []

    @contextmanager
    def recorded() -> Iterator[huge_pages.HugePages]:
        seen.append(huge_pages.HugePages())
        yield seen[-1]

    monkeypatch.setattr(onnxruntime_cpu, "on_huge_pages", recorded)
    onnxruntime_cpu.OnnxRuntimeSession(tiny_bundle / f"{graph}.onnx", 1).close()
    assert [pages.wanted for pages in seen] == [wanted]


@linux
def test_a_page_counts_where_three_quarters_of_it_are_in_use() -> None:
    small = SIZE // mmap.PAGESIZE
    with memory(2) as (made, first):
        offset = first - ctypes.addressof(ctypes.c_char.from_buffer(made))
        fill(made, offset, small * 3 // 4 - 1)
        assert first not in filled_pages(SIZE)
        fill(made, offset, small * 3 // 4)
        assert first in filled_pages(SIZE)
        assert first + SIZE not in filled_pages(SIZE)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_of_ones_own_is_seen() -> None:
    assert anonymous_regions() == sorted(anonymous_regions())
    held = ctypes.create_string_buffer(1 << 20)
    address = ctypes.addressof(held)
    assert any(first <= address < last for first, last in anonymous_regions())


def test_a_kernel_that_never_gives_them_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "not read")
    assert huge_page_bytes() == 0  # none at all
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert huge_page_bytes() == 0
    with on_huge_pages():
        pass


@linux
def test_a_system_that_does_not_tell_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "PAGEMAP", tmp_path / "absent")
    assert filled_pages(SIZE) == set()


@linux
def test_no_page_is_moved_while_a_graph_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[str] = []
    library = SimpleNamespace(madvise=lambda *_: moved.append("page"))
    monkeypatch.setattr("ctypes.CDLL", lambda _: library)
    with memory(2) as (made, first):
        offset = first - ctypes.addressof(ctypes.c_char.from_buffer(made))
        with on_huge_pages() as other:  # another graph, which is loaded until later
            other.wanted = False
            with on_huge_pages():
                fill(made, offset, SIZE // mmap.PAGESIZE)
            thread = huge_pages._threads[-1]
            thread.join(0.1)
            assert thread.is_alive()
            assert not moved
        wait_for_huge_pages()
    assert moved
