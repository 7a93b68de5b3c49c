"""Huge pages: what memory a load has added, and that nothing but the size of its pages changes."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest

from blip2edge.runtime import huge_pages
from blip2edge.runtime.huge_pages import PAGE, added, anonymous_regions, huge_pages_allowed, on_huge_pages

linux = pytest.mark.skipif(not huge_pages_allowed(), reason="this kernel gives no huge pages on request")


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ([], [(0, 4)], [(0, 4)]),
        ([(0, 4)], [(0, 4)], []),
        ([(2, 4)], [(0, 9)], [(0, 2), (4, 9)]),
        ([(0, 2), (3, 5)], [(0, 9)], [(2, 3), (5, 9)]),
        ([(0, 5)], [(3, 9), (11, 12)], [(5, 9), (11, 12)]),
        ([(4, 8)], [(0, 4), (8, 9)], [(0, 4), (8, 9)]),
        ([(0, 3), (6, 9)], [(2, 7)], [(3, 6)]),
    ],
)
def test_what_was_added(
    before: list[tuple[int, int]], after: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    assert added(before, after) == wanted


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


@linux
def test_memory_of_the_block_is_gathered_and_keeps_its_bytes() -> None:
    with on_huge_pages():
        made = mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for at in range(0, len(made), mmap.PAGESIZE):
            made[at : at + 4] = at.to_bytes(4, "little")
        address = ctypes.addressof(ctypes.c_char.from_buffer(made))
        assert huge_kib(address) == 0
    if huge_kib(address) == 0:
        pytest.skip("the kernel had no free huge page, or cannot gather at once (before Linux 6.1)")
    assert all(int.from_bytes(made[at : at + 4], "little") == at for at in range(0, len(made), mmap.PAGESIZE))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_heap_and_mappings_are_seen() -> None:
    regions = anonymous_regions()
    assert regions == sorted(regions)
    held = ctypes.create_string_buffer(1 << 20)
    address = ctypes.addressof(held)
    assert any(first <= address < last for first, last in anonymous_regions())


def test_a_kernel_that_never_gives_them_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = tmp_path / "enabled"
    setting.write_text("always madvise [never]\n")
    monkeypatch.setattr(huge_pages, "SETTING", setting)
    monkeypatch.setattr(huge_pages, "MAPS", tmp_path / "not read")
    assert not huge_pages_allowed()
    with on_huge_pages():
        pass
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "absent")
    assert not huge_pages_allowed()
