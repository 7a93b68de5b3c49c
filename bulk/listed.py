"""Items of the list of pictures: each item says where the bytes of a picture are; :meth:`read` reads the bytes.

An item can be written as a line of JSON, so that a list of pictures can be a file, and be sent to other machines.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

from blip2edge.bulk.read_errors import reading_picture, with_attempts
from blip2edge.bulk.stores import UnknownStoreError, store_of
from blip2edge.errors import DataError, ImageError, MissingPackageError
from blip2edge.packages import require
from blip2edge.picture_files import PICTURE_SUFFIXES
from blip2edge.reading import parse_json, reading
from blip2edge.runtime.images.download import download

FILE, WEB, MEMBER, CELL, BROKEN = "file", "web", "member", "cell", "broken"
"""Kinds of items: file of a store, web address, file in a tar shard, cell of a table, item without a picture."""

GROUPS = 2  # row groups of tables that are kept in memory
_MAGIC = (
    (b"\xff\xd8\xff", ".jpg"),
    (b"\x89PNG", ".png"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
)  # the first bytes of a file, and its suffix


@dataclass(frozen=True)
class ListedPicture:
    """A picture of a source, not read yet.

    Attributes:
        image: Name of the picture in the source.
        kind: Where the bytes of the picture are: :data:`FILE`, :data:`WEB`, :data:`MEMBER`, :data:`CELL`;
            :data:`BROKEN` for an item without a picture.
        place: The place of the bytes. FILE: (path). WEB: (address). MEMBER: (path of the shard, offset, size), both in
            bytes. CELL: (path of the table, row group, row, column). BROKEN: (reason why there is no picture).
        version: Text that changes when the picture's file is changed.
    """

    image: str
    kind: str
    place: tuple[Any, ...]
    version: str = ""

    def to_json(self) -> str:
        """Returns the item as one line of JSON."""
        return json.dumps([self.image, self.kind, list(self.place), self.version])

    @classmethod
    def from_json(cls, line: str) -> ListedPicture:
        """Makes an item from a line that :meth:`to_json` returned.

        Raises:
            DataError: The line is damaged.
        """
        with reading("the list of pictures", "JSON", DataError):
            image, kind, place, version = parse_json(line)
            return cls(image, kind, tuple(place), version)

    def read(self) -> bytes:
        """Reads the bytes of the picture file.

        Raises:
            ImageError: The picture file is missing, cut off, too large or damaged, or a web server refuses to send it.
            StorageError: The disk or the object store fails.
        """
        return with_attempts(lambda: _READERS[self.kind](*self.place))

    def suffix(self, content: bytes) -> str:
        """Returns the file suffix: from the picture's name, else from the first bytes; ``.img`` if both are unknown."""
        suffix = PurePosixPath(self.image).suffix.lower()
        if suffix in PICTURE_SUFFIXES:
            return suffix
        if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
            return ".webp"
        return next((known for magic, known in _MAGIC if content.startswith(magic)), ".img")


def parquet_package(purpose: str) -> Any:
    """Imports ``pyarrow.parquet``. If pyarrow is missing, raises MissingPackageError, whose text names ``purpose``."""
    require("pyarrow", purpose, MissingPackageError)
    return import_module("pyarrow.parquet")


def _read_file(path: str) -> bytes:
    with reading_picture(path):
        try:
            store = store_of(path)
        except UnknownStoreError as error:  # a mistake in a table
            raise ImageError(f"{path}: {error.problem}") from error
        return store.read(path)


def _read_member(shard: str, offset: int, size: int) -> bytes:
    with reading_picture(shard):
        return store_of(shard).read(shard, offset, size)


def _refuse(reason: str) -> bytes:
    raise ImageError(reason)


class RowGroups:
    """Reads cells of Parquet files, and keeps the last :data:`GROUPS` row groups in memory for the next pictures."""

    def __init__(self) -> None:
        self._groups: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._lock = Lock()

    def cell(self, path: str, group: int, row: int, column: str) -> bytes:
        """Returns the bytes in a cell of a Parquet file.

        Raises:
            ImageError: The cell is empty, its value is not bytes, or the file is damaged.
            StorageError: The disk or the object store fails.
        """
        arrow = require("pyarrow", f"reading {path}", MissingPackageError)
        with reading_picture(path, "a Parquet file", (IndexError, KeyError, arrow.ArrowException)):
            with self._lock:
                key = path, group, column
                if key not in self._groups:
                    self._groups[key] = self._read(path, group, column)
                    while len(self._groups) > GROUPS:
                        self._groups.popitem(last=False)
                self._groups.move_to_end(key)
                values = self._groups[key]
            value = values[row].as_py()
        if isinstance(value, dict):  # the form of Hugging Face's datasets: {"bytes": …, "path": …}
            value = value.get("bytes")
        if not isinstance(value, bytes) or not value:
            raise ImageError(f"{path}: the column {column} has no bytes in row {row} of row group {group}")
        return value

    @staticmethod
    def _read(path: str, group: int, column: str) -> Any:
        parquet = parquet_package(f"reading {path}")
        with store_of(path).open(path) as file:
            return parquet.ParquetFile(file).read_row_group(group, columns=[column]).column(0)


_ROW_GROUPS = RowGroups()
_READERS: dict[str, Callable[..., bytes]] = {
    FILE: _read_file,
    WEB: download,
    MEMBER: _read_member,
    CELL: _ROW_GROUPS.cell,
    BROKEN: _refuse,
}
