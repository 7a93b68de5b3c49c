"""Lists the pictures of a source (folder, tar shards, Parquet or CSV tables), always in the same order.

    folder        every picture in the folder and in its subfolders, sorted by name
    shards        a tar file, a folder of tar files, or a range such as part-{000..127}.tar
    parquet       a Parquet file or a folder of such files; one column has bytes, paths or addresses of the pictures
    csv           a .csv or .tsv file; one column has paths or addresses of the pictures

Each source may be on the local disk or in an object store. A table may name pictures in other places.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any

from blip2edge.bulk.listed import BROKEN, CELL, FILE, MEMBER, WEB, ListedPicture, parquet_package
from blip2edge.bulk.read_errors import with_attempts
from blip2edge.bulk.stores import Store, StoredFile, UnknownStoreError, folder_of, is_web, joined, store_of
from blip2edge.choices import BULK_SOURCES
from blip2edge.errors import DataError, UsageError, option
from blip2edge.picture_files import PICTURE_SUFFIXES, BrokenShardError, is_address, open_shard, printable, range_of
from blip2edge.reading import other_separator, reading

COLUMNS = ("image", "image_path", "img", "path", "file_path", "file", "filename", "file_name", "url", "image_url")
"""Names that the column with the pictures may have, in the order in which they are tried."""

_FOLDER, _SHARDS, _PARQUET, _CSV = BULK_SOURCES
_SUFFIXES = {".tar": _SHARDS, ".parquet": _PARQUET, ".csv": _CSV, ".tsv": _CSV}
_TEXTS = ("string", "large_string", "string_view")
_BYTES = ("binary", "large_binary", "binary_view", "fixed_size_binary", "struct")
"""Types of pyarrow for a column of paths (``_TEXTS``) and for a column of bytes (``_BYTES``).

Hugging Face's datasets store the bytes in structs.
"""


@dataclass(frozen=True)
class PictureSource:
    """A source of pictures: a path or an address, and how the files there are read.

    Attributes:
        path: A path or an address.
        kind: Kind of the source, one of ``BULK_SOURCES``; ``auto`` chooses by the suffix of a file and by the files
            in a folder.
        column: Name of the column that has the pictures, if the source is a table; None for the first of
            :data:`COLUMNS` that the table has.
        leave_out: Path of the output. Its files are not listed, even if the output is inside the source's folder.
    """

    path: str
    kind: str = "auto"
    column: str | None = None
    leave_out: Path | None = None

    def __post_init__(self) -> None:
        if not is_address(self.path):  # for workers that run in another directory
            object.__setattr__(self, "path", os.path.abspath(self.path))
        if self.leave_out is not None:
            object.__setattr__(self, "leave_out", Path(os.path.abspath(self.leave_out)))

    def items(self) -> Iterator[ListedPicture]:
        """Yields the pictures of the source, in a fixed order.

        Raises:
            DataError: The source does not exist, cannot be read, or has no picture.
            MissingPackageError: A package for this kind of source is not installed.
            UsageError: A column is given for a source without columns.
        """
        kind = self._kind()
        if self.column is not None and kind not in (_PARQUET, _CSV):
            raise UsageError(
                f"expected {option('column')} with a table, got {self.path} ({kind})", f"leave {option('column')} out"
            )
        items = _LISTS[kind](self)
        first = next(items, None)
        if first is None:
            raise DataError(
                f"{self.path}: expected at least one picture, got none ({kind})",
                f"check the path, or name the kind with {option('source_format')}",
            )
        return chain((first,), items)

    def files(self, suffix: str) -> list[StoredFile]:
        """Returns the shards or tables: the files of a folder, the files of a range in braces, or the single file.

        Raises:
            DataError: There is no such file, a file of the range is missing, or the range is backwards.
        """
        store = store_of(self.path)
        if store.is_folder(self.path):
            return [one for one in self._files_of(store) if one.name.lower().endswith(suffix)]
        found = [(path, store.file(path)) for path in range_of(self.path) or [self.path]]
        missing = [path for path, file in found if file is None]
        if missing:
            raise DataError(
                f"{missing[0]}: no such file ({len(missing)} of {len(found)} are missing)", "check the path"
            )
        return [file for _, file in found if file is not None]

    def _files_of(self, store: Store) -> Iterator[StoredFile]:
        """Yields the files of the source's folder, except the output of this run."""
        return (one for one in store.files(self.path, deep=False) if Path(one.path) != self.leave_out)

    def _kind(self) -> str:
        if self.kind != "auto":
            return self.kind
        by_name = _SUFFIXES.get(PurePosixPath(self.path).suffix.lower())
        store = store_of(self.path)
        if not store.is_folder(self.path):
            if by_name is None:
                suffix = PurePosixPath(self.path).suffix.lower()
                if suffix in PICTURE_SUFFIXES or any(sign in self.path for sign in "*?"):
                    folder = str(PurePosixPath(self.path).parent)
                    what = "a pattern" if any(sign in self.path for sign in "*?") else "one picture"
                    raise DataError(
                        f"expected a folder, a .tar, .parquet, .csv or .tsv file, got {self.path}, which is {what}",
                        f"give the folder ({folder}), or caption single pictures with `blip2edge caption`",
                    )
                what = "is no folder" if store.file(self.path) is not None else "does not exist"
                raise DataError(
                    f"expected a folder, a .tar, .parquet, .csv or .tsv file, got {self.path}, which {what}",
                    f"check the path, or name the kind with {option('source_format')}",
                )
            return by_name
        return self._kind_of_folder(store)

    def _kind_of_folder(self, store: Store) -> str:
        """Returns the kind of a folder (pictures, shards, tables), by the suffixes of its files.

        Raises:
            DataError: The folder has files of more than one kind; only one kind would be captioned.
        """
        found = {_suffix(one) for one in self._files_of(store)}
        kinds = [_SUFFIXES[suffix] for suffix in (".tar", ".parquet") if suffix in found]
        if kinds and any(_suffix(one) in PICTURE_SUFFIXES for one in store.files(self.path)):
            kinds.append(_FOLDER)
        if len(kinds) > 1:
            raise DataError(
                f"expected one kind of source in {self.path}, got {' and '.join(kinds)}",
                f"name the one to caption with {option('source_format')}, or move the others away",
            )
        return kinds[0] if kinds else _FOLDER


def _suffix(file: StoredFile) -> str:
    return PurePosixPath(file.name).suffix.lower()


def _of_folder(source: PictureSource) -> Iterator[ListedPicture]:
    store = store_of(source.path)
    if not store.is_folder(source.path):
        raise DataError(f"{source.path}: no such folder", "check the path")
    for file in store.files(source.path):
        if _suffix(file) in PICTURE_SUFFIXES:
            yield ListedPicture(file.name, FILE, (file.path,), file.version)


def _of_shards(source: PictureSource) -> Iterator[ListedPicture]:
    """Yields the pictures of tar shards. For a shard that is cut off, also yields a broken item with the reason."""
    for shard in source.files(".tar"):
        name, store = printable(shard.name), store_of(shard.path)
        with ExitStack() as stack:
            with reading(shard.path, "a shard", DataError):
                file = stack.enter_context(store.open(shard.path))
            try:
                files = stack.enter_context(open_shard(Path(shard.path), file))
                for member, _ in files:
                    base = PurePosixPath(member.name).name
                    if base.startswith(".") or not member.is_picture:
                        continue
                    image = f"{name}:{member.name}"
                    if member.sparse:
                        yield ListedPicture(
                            image, BROKEN, (f"{image} is a sparse file, which is not read",), shard.version
                        )
                    else:
                        yield ListedPicture(image, MEMBER, (shard.path, member.offset, member.size), shard.version)
            except BrokenShardError as error:
                yield ListedPicture(
                    name, BROKEN, (f"the shard cannot be read further: {error.problem}",), shard.version
                )


def _of_parquet(source: PictureSource) -> Iterator[ListedPicture]:
    parquet = parquet_package(f"reading {source.path}")
    types = import_module("pyarrow.types")
    for table in source.files(".parquet"):
        with reading(table.path, "a Parquet file", DataError), store_of(table.path).open(table.path) as file:
            opened = parquet.ParquetFile(file)
            column = _column(source.column, list(opened.schema_arrow.names), table.path)
            kind = opened.schema_arrow.field(column).type
            kind = kind.value_type if types.is_dictionary(kind) else kind
            if any(getattr(types, f"is_{name}")(kind) for name in _TEXTS):
                batches = opened.iter_batches(columns=[column])
                values = (value for batch in batches for value in batch.column(0).to_pylist())
                yield from _named(values, table)
                continue
            if not any(getattr(types, f"is_{name}")(kind) for name in _BYTES):
                raise DataError(
                    f"{table.path}: expected the column {column} to hold paths, addresses or bytes, got {kind}",
                    f"name another one with {option('column')}",
                )
            number = 0
            for group in range(opened.metadata.num_row_groups):
                for row in range(opened.metadata.row_group(group).num_rows):
                    place = table.path, group, row, column
                    yield ListedPicture(f"{table.name}#{number}", CELL, place, table.version)
                    number += 1


def _of_csv(source: PictureSource) -> Iterator[ListedPicture]:
    for table in source.files(""):
        with reading(table.path, "a table", DataError), store_of(table.path).open(table.path) as file:
            text = io.TextIOWrapper(file, "utf-8-sig", newline="")
            separator = "\t" if table.path.lower().endswith(".tsv") else ","
            rows = csv.reader(text, delimiter=separator)
            head = next(rows, None)
            if not head:
                raise DataError(
                    f"{table.path}: expected a first line with the names of the columns, got "
                    f"{'an empty file' if head is None else 'an empty line'}",
                    "write the names of the columns into the first line, such as path",
                )
            place = head.index(_column(source.column, head, table.path, other_separator(head, separator)))
            yield from _named((row[place] if place < len(row) else None for row in rows if row), table)


def _named(values: Iterator[Any], table: StoredFile) -> Iterator[ListedPicture]:
    """Yields an item for each path or address in a table; paths are relative to the folder of the table."""
    folder = folder_of(table.path)
    for number, value in enumerate(values):
        name = (value or "").strip()
        path = joined(folder, name)
        if not name:
            yield ListedPicture(
                f"{table.name}#{number}", BROKEN, ("the table names no picture in this row",), table.version
            )
        elif is_web(path):
            yield ListedPicture(name, WEB, (path,))
        elif is_address(path):
            yield _listed_address(name, path)
        else:
            file = store_of(path).file(path)
            yield ListedPicture(name, FILE, (path,), "" if file is None else file.version)


def _listed_address(name: str, path: str) -> ListedPicture:
    """Returns the item for an address in a table; a broken item if no picture can have this address.

    Raises:
        MissingPackageError: The package for this kind of address is not installed.
        StorageError: The object store cannot be opened, not even in the last attempt.
    """
    if not path.partition("://")[2].strip("/"):
        return ListedPicture(name, BROKEN, (f"{path}: the address names no file",))
    try:
        with_attempts(lambda: store_of(path))
    except UnknownStoreError as error:
        return ListedPicture(name, BROKEN, (f"{path}: {error.problem}",))
    return ListedPicture(name, FILE, (path,))


def _column(given: str | None, names: list[str], path: str, separator: str | None = None) -> str:
    """Returns the name of the column with the pictures.

    Args:
        given: Name of the column; None for the first of :data:`COLUMNS` that the table has.
        names: Names of the table's columns.
        path: The table.
        separator: The separator that the table seems to have in place of the expected one, else None.

    Raises:
        DataError: The table has no such column.
    """
    found = [name for name in ((given,) if given is not None else COLUMNS) if name in names]
    if not found:
        shown = ", ".join(printable(name) for name in islice(names, 20))
        if given is not None:
            problem = f"{path}: expected a column {given}, got {shown or 'no column'}"
        else:
            problem = f"{path}: expected one of the columns {', '.join(COLUMNS)}, got {shown or 'no column'}"
        fix = f"name it with {option('column')}"
        if separator is not None:
            comma = "a tab" if path.lower().endswith(".tsv") else "a comma"
            problem = f"{problem}: the separator seems to be {separator!r}"
            fix = f"write the table with {comma} between the columns"
        raise DataError(problem, fix)
    return found[0]


_LISTS: dict[str, Callable[[PictureSource], Iterator[ListedPicture]]] = {
    _FOLDER: _of_folder,
    _SHARDS: _of_shards,
    _PARQUET: _of_parquet,
    _CSV: _of_csv,
}
