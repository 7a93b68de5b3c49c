"""Reads the files inside a Qt resource file (`.rcc`), in which GCompris keeps its pictures.

The format is that of Qt's `rcc` (qtbase, src/tools/rcc/rcc.cpp): a header with the offsets of a tree, of names and of
data; a node of the tree is a directory with its children or a file with its data, which may be compressed.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

from blip2edge.errors import DataError

MAGIC = b"qres"
COMPRESSED, DIRECTORY, ZSTD = 1, 2, 4  # flags of a node


def read_resources(path: Path) -> dict[str, bytes]:
    """Reads all files of a resource file; returns their content by path.

    Raises:
        DataError: The file is no resource file, is damaged, or contains a file that is compressed with zstd.
    """
    content = path.read_bytes()
    if content[:4] != MAGIC:
        raise DataError(f"{path}: expected a Qt resource file, which begins with {MAGIC!r}")
    try:
        version, tree, data, names = struct.unpack(">4I", content[4:20])
        return dict(_files(content, tree, data, names, 22 if version >= 2 else 14, path))
    except (struct.error, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: damaged Qt resource file ({error})") from error


def _files(content: bytes, tree: int, data: int, names: int, node_bytes: int, path: Path) -> list[tuple[str, bytes]]:
    """Returns (path, content) of all files in the tree."""
    found: list[tuple[str, bytes]] = []
    waiting = [(0, "")]
    while waiting:
        number, folder = waiting.pop()
        place = tree + number * node_bytes
        name_at, flags = struct.unpack(">IH", content[place : place + 6])
        name = folder + _name(content, names + name_at) if number else ""
        if flags & DIRECTORY:
            count, first = struct.unpack(">II", content[place + 6 : place + 14])
            below = f"{name}/" if name else ""
            waiting += [(first + child, below) for child in range(count)]
            continue
        (start,) = struct.unpack(">I", content[place + 10 : place + 14])
        (size,) = struct.unpack(">I", content[data + start : data + start + 4])
        value = content[data + start + 4 : data + start + 4 + size]
        if flags & ZSTD:
            raise DataError(f"{path}: {name} is compressed with zstd", "use the Debian package, which uses zlib")
        found.append((name, zlib.decompress(value[4:]) if flags & COMPRESSED else value))
    return found


def _name(content: bytes, place: int) -> str:
    """Returns the name of a node, stored as its length, a hash, and UTF-16 text."""
    (length,) = struct.unpack(">H", content[place : place + 2])
    return content[place + 6 : place + 6 + 2 * length].decode("utf-16-be")
