"""The reader of cubins, on a small ELF file written here: it has the sections that NVRTC writes."""

from __future__ import annotations

import struct

import pytest

from blip2edge.errors import BackendError
from blip2edge.runtime.cuda.compilation.cubin import Usage, kernel_usage


def elf(sections: dict[str, tuple[int, bytes]]) -> bytes:
    """A 64-bit ELF file with sections of a type and a content."""
    sections = {"": (0, b""), **sections}
    names = b"\0".join(name.encode() for name in (*sections, ".names")) + b"\0"
    sections[".names"] = (3, names)
    body, headers, at = b"", b"", 0
    for name, (kind, content) in sections.items():
        offset = 64 + len(body)
        headers += struct.pack("<IIQQQQIIQQ", at, kind, 0, 0, offset, len(content), 0, 0, 0, 0)
        body += b"" if kind == 8 else content
        at += len(name) + 1
    start = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01", 2, 190, 1, 0, 0, 64 + len(body), 0, 64, 0, 0, 64,
                        len(sections), len(sections) - 1)  # fmt: skip
    return start + body + headers


def test_registers_stack_and_shared_memory_of_each_kernel() -> None:
    strings = b"\0first\0second\0"
    symbols = b"".join(struct.pack("<IBBHQQ", at, 0, 0, 0, 0, 0) for at in (0, 1, 7))
    info = struct.pack("<BBH", 2, 0x37, 5)  # a record of another format, without further bytes
    for attribute, symbol, number in ((0x2F, 1, 40), (0x2F, 2, 255), (0x12, 2, 16), (0x11, 1, 99)):
        info += struct.pack("<BBHII", 4, attribute, 8, symbol, number)
    cubin = elf({
        ".strtab": (3, strings), ".symtab": (2, symbols), ".nv.info": (0x70000000, info),
        ".nv.shared.first": (8, bytes(1024)),
    })  # fmt: skip
    assert kernel_usage(cubin) == {"first": Usage(40, 0, 1024), "second": Usage(255, 16, 0)}


@pytest.mark.parametrize(
    "data",
    [b"", b"\x7fELF\x02" + bytes(60), b"MZ" + bytes(80), elf({})],
    ids=["empty", "header only", "no ELF file", "no sections"],
)
def test_another_file_is_refused(data: bytes) -> None:
    with pytest.raises(BackendError, match="expected a cubin"):
        kernel_usage(data)
