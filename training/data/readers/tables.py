"""Reads the rows of tables: JSON lists (LAVIS, LLaVA), JSONL, CSV, TSV, `metadata` of an imagefolder, and Parquet.

Each reader yields (number, row), in the order of the file. If a row cannot be read, the reader yields the error instead
of the row, and continues with the next row.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from blip2edge.errors import Blip2EdgeError, DataError, MissingPackageError
from blip2edge.packages import require
from blip2edge.reading import DATA_BYTES, other_separator, parse_json, read_bytes, reading
from blip2edge.special_files import open_file
from blip2edge.training.data.coco import load_json_object
from blip2edge.training.data.readers.rows import CAPTIONS, DIALOGUES, PICTURES, Row, Rows

Numbered = Iterator[tuple[int, Row | Blip2EdgeError]]

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.parquet")
"""Names of the table in an imagefolder, in the order in which they are tried."""

MAX_LINE = 64 << 20  # bytes of one row of a JSONL file, and of one cell of a CSV file
_BATCH = 64  # rows of a Parquet file that are read at a time


def _row(value: Any) -> Row | Blip2EdgeError:
    return value if isinstance(value, dict) else DataError(f"expected the row to be an object, got {value!r:.60}")


def json_list(path: Path) -> Numbered:
    """Reads a JSON file that holds a list of objects: the annotations of LAVIS, or the conversations of LLaVA."""
    fix = "give a JSON file with a list of objects"
    with reading(path, "JSON", DataError, fix):
        rows = parse_json(read_bytes(path, DATA_BYTES))
    if not isinstance(rows, list):
        raise DataError(f"expected a JSON list in {path}, got a value of type {type(rows).__name__}", fix)
    for number, row in enumerate(rows):
        yield number, _row(row)


def karpathy(path: Path, splits: Sequence[str]) -> Numbered:
    """Reads a file of Karpathy's splits (`dataset_coco.json`, `dataset_flickr30k.json`), one row for each picture.

    Args:
        path: A JSON file with the list `images`: filename, split, sentences, and for COCO also filepath and cocoid.
        splits: The splits that are read.

    Yields:
        For each picture of these splits: a row with the picture's path and all its captions.

    Raises:
        DataError: The file cannot be read, or has no picture of these splits.
    """
    images = load_json_object(path).get("images")
    if not isinstance(images, list):
        raise DataError(f"{path}: expected a list 'images', as in Karpathy's dataset_coco.json")
    found = {image.get("split") for image in images if isinstance(image, dict)}
    if not found & set(splits):
        raise DataError(
            f"{path}: expected pictures of the splits {', '.join(splits)}, got {', '.join(map(str, found)) or 'none'}",
            "set splits ([data] in a recipe) to splits of the file",
        )
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            yield number, _row(image)
        elif image.get("split") in splits:
            yield number, _karpathy_row(image, number)


def _karpathy_row(image: Row, number: int) -> Row | Blip2EdgeError:
    name, folder, sentences = image.get("filename"), image.get("filepath", ""), image.get("sentences")
    if not isinstance(name, str) or not isinstance(folder, str):
        return DataError(f"expected the filename to be a text, got {name!r:.60}")
    if not isinstance(sentences, list) or not all(isinstance(one, dict) for one in sentences):
        return DataError(f"expected the sentences to be a list of objects, got {sentences!r:.60}")
    image_id = image.get("cocoid", image.get("imgid", number))
    captions = [one.get("raw") for one in sentences]
    return {"id": image_id, "image_id": image_id, "file_name": str(Path(folder) / name), "captions": captions}


def json_lines(path: Path) -> Numbered:
    """Reads a file with a JSON object on each line; blank lines are skipped."""
    with reading(path, "a file of JSON lines", DataError), open_file(path) as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            if not line.strip(b"\r\n\t \xef\xbb\xbf"):
                continue
            try:
                with reading(f"line {number + 1}", "JSON", DataError):
                    if len(line) > MAX_LINE:
                        while line and not line.endswith(b"\n"):
                            line = file.readline(MAX_LINE)
                        raise ValueError(f"expected at most {MAX_LINE} bytes, got more")
                    row = _row(parse_json(line))
            except DataError as error:
                yield number, error
            else:
                yield number, row
            number += 1


def delimited(path: Path) -> Numbered:
    """Reads a CSV file, or a TSV file (suffix ``.tsv``), whose first line names the columns.

    Raises:
        DataError: The file cannot be read, or the first line names no column of pictures.
    """
    csv.field_size_limit(MAX_LINE)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    with (
        reading(path, "a table", DataError),
        open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file,
    ):
        table = csv.reader(file, delimiter=separator)
        columns = next(table, [])
        known = {*PICTURES, *CAPTIONS, *DIALOGUES, "question"}
        if len(columns) < 2 or not known & {column.strip().lower() for column in columns}:
            other = other_separator(columns, separator)
            seems = "" if other is None else f": the separator seems to be {other!r}"
            comma = "a tab" if separator == "\t" else "a comma"
            raise DataError(
                f"{path}: expected the first line to name the columns, such as image{separator}caption, got "
                f"{repr(separator.join(columns))[:80] if columns else 'no column'}{seems}",
                "add a first line with the names of the columns"
                if other is None
                else f"write the table with {comma} between the columns",
            )
        columns = [column.strip() for column in columns]
        number = 0
        while True:
            try:
                cells = next(table, None)
            except csv.Error as error:
                yield number, DataError(f"the line cannot be read ({error})")
                number += 1
                continue
            if cells is None:
                return
            if cells:
                yield number, _cells(columns, cells)
                number += 1


def _cells(columns: list[str], cells: list[str]) -> Row | Blip2EdgeError:
    if len(cells) != len(columns):
        return DataError(f"expected {len(columns)} cells, got {len(cells)}")
    if any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
        return DataError("the text is not UTF-8")
    return dict(zip(columns, cells, strict=True))


def parquet(path: Path) -> Numbered:
    """Reads a Parquet file, some rows at a time. A damaged row group is yielded as one error; reading continues.

    Raises:
        MissingPackageError: pyarrow is not installed.
        DataError: The file is no Parquet file.
    """
    require("pyarrow", f"reading {path.name}", MissingPackageError)
    module = import_module("pyarrow.parquet")
    with reading(path, "a Parquet file", DataError), open_file(path) as opened:
        file = module.ParquetFile(opened)
        first = 0
        for group in range(file.num_row_groups):
            number = first
            try:
                with reading(f"row group {group}", "Parquet", DataError):
                    for batch in file.iter_batches(_BATCH, row_groups=[group]):
                        for row in batch.to_pylist():
                            yield number, row
                            number += 1
            except DataError as error:
                yield number, error
            first += file.metadata.row_group(group).num_rows


def parquet_rows(path: Path) -> int:
    """Returns the number of rows of a Parquet file, from its footer; raises the errors of :func:`parquet`."""
    require("pyarrow", f"reading {path.name}", MissingPackageError)
    with reading(path, "a Parquet file", DataError):
        return int(import_module("pyarrow.parquet").read_metadata(path).num_rows)


ROWS_BY_SUFFIX: dict[str, Rows] = {
    ".json": json_list,
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".csv": delimited,
    ".tsv": delimited,
    ".parquet": parquet,
}
"""The function that reads the rows of a table, by the suffix of the file name."""


def table_file(path: Path) -> Path:
    """Returns the path of a table: `path` itself if it is a file, or the metadata file of an imagefolder.

    Raises:
        DataError: There is no such file, the folder has no metadata file, or the suffix is not known.
    """
    if path.is_dir():
        found = next((path / name for name in METADATA if (path / name).is_file()), None)
        if found is None:
            raise DataError(
                f"{path}: expected one of {', '.join(METADATA)} in the folder, got none",
                "add metadata.jsonl with file_name and text of each picture, or set kind = 'folder' in [data]",
            )
        return found
    if path.suffix.lower() not in ROWS_BY_SUFFIX:
        raise DataError(
            f"expected a table ({', '.join(ROWS_BY_SUFFIX)}), got {path.name}", "check path ([data] in a recipe)"
        )
    return path
