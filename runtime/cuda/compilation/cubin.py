"""Reads from a cubin how many registers, and how much stack and static shared memory, its kernels use.

A cubin is a 64-bit ELF file. The section ``.nv.info`` has records of a format, an attribute and a value; the attributes
used here give a number for each kernel's symbol. ``.nv.shared.NAME`` is as large as a kernel's static shared memory.
NVIDIA does not document these sections; the attribute numbers are EIATTR_REGCOUNT and EIATTR_MIN_STACK_SIZE in
``cuobjdump -elf``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from blip2edge.errors import BackendError

REGISTERS, STACK = 0x2F, 0x12
SIZED = 4
"""Format of a record that has a 16-bit length and a value of this length; other records have a 2-byte value only."""

SYMBOL_BYTES = 24


@dataclass(frozen=True)
class Usage:
    """The registers and memory that a thread or a block of a kernel uses.

    Attributes:
        registers: Registers of a thread.
        stack: Bytes of local memory of a thread; more than 0 if registers were spilled.
        shared: Bytes of static shared memory of a block.
    """

    registers: int
    stack: int
    shared: int


def kernel_usage(cubin: bytes) -> dict[str, Usage]:
    """Returns the registers and memory that each kernel of a cubin uses, by the kernel's name.

    Raises:
        BackendError: The file is no 64-bit ELF file with the sections of a cubin.
    """
    try:
        return _usage(cubin)
    except (struct.error, LookupError, ValueError) as error:
        raise BackendError(f"expected a cubin, found another file ({error})", "compile the kernels again") from error


def _usage(cubin: bytes) -> dict[str, Usage]:
    if cubin[:5] != b"\x7fELF\x02":
        raise ValueError("no 64-bit ELF header")
    sections = dict(_sections(cubin))
    names = sections[".strtab"]
    symbols = [
        _text(names, struct.unpack_from("<I", sections[".symtab"], at)[0])
        for at in range(0, len(sections[".symtab"]), SYMBOL_BYTES)
    ]
    found: dict[int, dict[str, int]] = {REGISTERS: {}, STACK: {}}
    for attribute, payload in _records(sections[".nv.info"]):
        if attribute in found:
            symbol, number = struct.unpack_from("<II", payload)
            found[attribute][symbols[symbol]] = number
    return {
        name: Usage(number, found[STACK].get(name, 0), len(sections.get(f".nv.shared.{name}", b"")))
        for name, number in found[REGISTERS].items()
    }


def _sections(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Returns names and contents of the sections. For a section without bytes in the file, the content is zeros."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + index * size) for index in range(count)]
    names = cubin[headers[names_at][4] :]
    for name, kind, _, _, offset, length in headers:
        content = bytes(length) if kind == 8 else cubin[offset : offset + length]  # 8: SHT_NOBITS
        yield _text(names, name), content


def _records(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        size = length if form == SIZED else 0
        yield attribute, info[at + 4 : at + 4 + size]
        at += 4 + size


def _text(strings: bytes, at: int) -> str:
    return strings[at : strings.index(0, at)].decode()
