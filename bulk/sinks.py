"""The formats of the output: Parquet tables and WebDataset shards.

For each format, a class writes one part of the output into one file, reads the rows of such a file, and joins several
parts into a single file. Equal rows give equal bytes: the files contain no time and no name of the machine.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from blip2edge.bulk.listed import parquet_package
from blip2edge.bulk.rows import Row
from blip2edge.errors import DataError
from blip2edge.picture_files import add_member, open_shard
from blip2edge.reading import parse_json, reading

RECORD_KEY = "blip2edge.bulk"
"""Key in a file's metadata for the record of the run, which holds the plan and the counts."""


class RowFormat(Protocol):
    """Interface to one format: reads and writes files of the output in this format.

    Attributes:
        suffix: Suffix of the format's files.
        pictures: Whether the files contain the bytes of the pictures.
    """

    suffix: str
    pictures: bool

    def write(self, path: Path, first: int, rows: Sequence[Row], pictures: Sequence[tuple[str, bytes]]) -> None:
        """Writes one part of the output to a file.

        Args:
            path: The file to write.
            first: Number, in the source, of the first row's picture.
            rows: The rows.
            pictures: Suffix and bytes of each picture if ``self.pictures``; a broken picture has no bytes.
        """

    def rows(self, path: Path) -> list[Row]:
        """Reads the rows of one part of the output; raises DataError if the file is damaged."""

    def join(self, parts: Iterable[Path], path: Path, record: str) -> None:
        """Writes the rows of all parts to one file; the record of the run (plan, counts) goes into the metadata."""

    def record(self, path: Path) -> str | None:
        """Reads the run's record from a joined file's metadata; None if the file has no record or another format."""


class ParquetSink:
    """Reads and writes Parquet tables with one row for each picture."""

    suffix, pictures = ".parquet", False

    def __init__(self) -> None:
        self._parquet = parquet_package("writing Parquet")
        self._arrow = arrow = import_module("pyarrow")
        self._schema = arrow.schema(
            [
                arrow.field("image", arrow.string(), nullable=False),
                arrow.field("captions", arrow.list_(arrow.string()), nullable=False),
                arrow.field("logprobs", arrow.list_(arrow.float64()), nullable=False),
                arrow.field("confidences", arrow.list_(arrow.float64()), nullable=False),
                arrow.field("duplicate_of", arrow.string()),
                arrow.field("similarity", arrow.float64()),
                arrow.field("error", arrow.string()),
            ]
        )

    def write(self, path: Path, first: int, rows: Sequence[Row], pictures: Sequence[tuple[str, bytes]]) -> None:  # noqa: ARG002
        """Writes one part of the output as a table with one row group."""
        table = self._arrow.Table.from_pylist([row.to_json() for row in rows], self._schema)
        self._parquet.write_table(table, path, compression="zstd", row_group_size=max(1, len(rows)))

    def rows(self, path: Path) -> list[Row]:
        """Reads the rows of one part of the output."""
        with reading(path, "a Parquet file", DataError):
            return [Row.from_json(values) for values in self._parquet.read_table(path).to_pylist()]

    def join(self, parts: Iterable[Path], path: Path, record: str) -> None:
        """Writes one table with a row group for each part of the output."""
        schema = self._schema.with_metadata({RECORD_KEY: record})
        with self._parquet.ParquetWriter(path, schema, compression="zstd") as writer:
            for part in parts:
                with reading(part, "a Parquet file", DataError):
                    table = self._parquet.read_table(part)
                writer.write_table(table.cast(schema), row_group_size=max(1, len(table)))

    def record(self, path: Path) -> str | None:
        """Reads the record of the run from the metadata of a table."""
        try:
            with reading(path, "a Parquet file", DataError):
                metadata: dict[bytes, bytes] = self._parquet.read_schema(path).metadata or {}
        except DataError:
            return None
        found = metadata.get(RECORD_KEY.encode())
        return None if found is None else found.decode("utf-8", "replace")


class WebDatasetSink:
    """Reads and writes WebDataset shards with, for each picture: its bytes, its captions as text, its row as JSON."""

    suffix, pictures = ".tar", True

    def write(self, path: Path, first: int, rows: Sequence[Row], pictures: Sequence[tuple[str, bytes]]) -> None:
        """Writes one part of the output as a shard."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for number, (row, (suffix, content)) in enumerate(zip(rows, pictures, strict=True), first):
                key = f"{number:09d}"
                if content and row.error is None:
                    add_member(archive, f"{key}{suffix}", content)
                    add_member(archive, f"{key}.txt", "".join(f"{text}\n" for text in row.captions).encode())
                add_member(archive, f"{key}.json", json.dumps(row.to_json()).encode())

    def rows(self, path: Path) -> list[Row]:
        """Reads the rows of a shard."""
        with open_shard(path) as files, reading(path, "a shard", DataError):
            return [Row.from_json(parse_json(read())) for file, read in files if file.suffix == ".json"]

    def join(self, parts: Iterable[Path], path: Path, record: str) -> None:
        """Writes one shard; the record is a PAX header before the first file, which readers of shards skip."""
        with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={RECORD_KEY: record}) as archive:
            for part in parts:
                with open_shard(part) as files:
                    for file, read in files:
                        add_member(archive, file.name, read())

    def record(self, path: Path) -> str | None:
        """Reads the record of the run from the PAX header of a shard."""
        try:
            with reading(path, "a shard", DataError), tarfile.open(path, "r:") as archive:
                found: Any = archive.pax_headers.get(RECORD_KEY)
        except DataError:
            return None
        return found if isinstance(found, str) else None


_SINKS: dict[str, type[ParquetSink | WebDatasetSink]] = {"parquet": ParquetSink, "webdataset": WebDatasetSink}


def sink_of(form: str) -> RowFormat:
    """Returns the object that reads and writes files of a format.

    Args:
        form: Name of the format, one of ``BULK_FORMATS``.

    Raises:
        MissingPackageError: pyarrow is not installed, and the format is Parquet.
    """
    return _SINKS[form]()


def copy_part(part: Path, path: Path) -> None:
    """Makes ``path`` a hard link to the file ``part``; copies the file if the file system has no hard links."""
    try:
        path.hardlink_to(part)
    except OSError:
        shutil.copyfile(part, path)
