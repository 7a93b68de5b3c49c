"""Finds the files that an ONNX graph names as external data, without the package onnx.

The protobuf message is walked field by field; weights inside the file are skipped and not read. Field numbers are those
of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto), the encoding is that of
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

VARINT, FIXED64, BYTES, START_GROUP, END_GROUP, FIXED32 = range(6)  # wire types
MOST_DEPTH = 100  # nested messages, as in the protobuf library
LOCATION = b"location"

TENSOR, ENTRY = "tensor", "entry"
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: TENSOR, 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: TENSOR, 6: "graph", 10: TENSOR, 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: TENSOR, 2: TENSOR},
    TENSOR: {13: ENTRY},
}
"""For each kind of protobuf message that can contain a tensor: the fields in which a tensor may be found.

Each field is given as its number, with the kind of message that it holds.
"""


def external_locations(path: Path) -> set[str]:
    """Returns the paths that a graph names as external data, as they are written in the file.

    Args:
        path: The ``.onnx`` file.

    Raises:
        ValueError: The file is not a protobuf message.
        OSError: The file cannot be read.
    """
    found: set[str] = set()
    with path.open("rb") as file:
        if not path.stat().st_size:
            return found
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(LOCATION) >= 0:
                _walk(content, 0, len(content), "model", found, 0)
            else:  # no external data; the fields are counted only
                for _ in _fields(content, 0, len(content)):
                    pass
    return found


def _walk(content: mmap.mmap, start: int, end: int, message: str, found: set[str], depth: int) -> None:
    """Adds the paths of external data in one message, ``content[start:end]``, to ``found``."""
    if depth > MOST_DEPTH:
        raise ValueError(f"messages are nested more than {MOST_DEPTH} deep")
    if message == ENTRY:
        found.update(_location(content, start, end))
        return
    inner = MESSAGES[message]
    for number, first, last in _fields(content, start, end):
        if number in inner:
            _walk(content, first, last, inner[number], found, depth + 1)


def _location(content: mmap.mmap, start: int, end: int) -> Iterator[str]:
    """Yields all values of an entry of ``external_data`` if one of its keys is ``location``.

    If an entry is not valid and has several values, other parsers may use any of them, so all are checked.
    """
    pairs = [(number, content[first:last]) for number, first, last in _fields(content, start, end)]
    if any(number == 1 and text == LOCATION for number, text in pairs):
        yield from (text.decode("utf-8") for number, text in pairs if number == 2)


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields the number, begin and end of each length-delimited field (bytes, text or message) in ``[start, end)``.

    Raises ValueError for a broken message.
    """
    at, groups = start, 0
    while at < end:
        tag, at = _varint(content, at, end)
        if tag >= 1 << 32:  # a parser that keeps 32 bits would read another field number
            raise ValueError("a field number is too large")
        kind = tag & 7
        if kind == BYTES:
            length, at = _varint(content, at, end)
            if length > end - at:
                raise ValueError("a field is longer than its message")
            if not groups:
                yield tag >> 3, at, at + length
            at += length
        elif kind == VARINT:
            _, at = _varint(content, at, end)
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
        elif kind in (START_GROUP, END_GROUP):
            groups += 1 if kind == START_GROUP else -1
        else:
            raise ValueError(f"a field has the unknown type {kind}")
        if groups < 0:
            raise ValueError("a group ends that did not begin")
    if at != end or groups:
        raise ValueError("the last field is incomplete")


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """Reads an integer of variable length at position ``at``; returns it and the position after it."""
    value = shift = 0
    while at < end:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer is longer than 10 bytes")
    raise ValueError("the last field is incomplete")
