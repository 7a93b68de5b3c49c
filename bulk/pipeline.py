"""Captions all pictures of a source, and writes the result as Parquet or as WebDataset shards.

The output is made in parts, each with a fixed number of pictures. If a run is killed, its finished parts stay in
``OUT.run``. The same command then makes the missing parts. The output is byte for byte equal to the output of a run
that was not killed.
"""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blip2edge import __version__
from blip2edge.bulk.captioning import ChunkCaptioner, ChunkResult, Find
from blip2edge.bulk.duplicates import DuplicateIndex
from blip2edge.bulk.options import BulkOptions
from blip2edge.bulk.ray_backend import Cluster, captions_on_ray
from blip2edge.bulk.rows import Original, Row
from blip2edge.bulk.run_files import Plan, RunDirectory, write_list
from blip2edge.bulk.sinks import RowFormat, copy_part, sink_of
from blip2edge.bulk.sources import PictureSource
from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import NEW, locked
from blip2edge.bundle.outputs.names import check_name
from blip2edge.bundle.outputs.publishing import check_target, publish, publish_file
from blip2edge.choices import BULK_FORMATS
from blip2edge.cluster.connection import check_ray
from blip2edge.errors import OutputError, UsageError, option
from blip2edge.packages import installed
from blip2edge.progress import ProgressCallback
from blip2edge.reading import parse_json, read_json, reading

REPORT_FILE = "_bulk.json"
"""File with the plan and the counts, in an output that is a directory. Readers of Parquet skip names with ``_``."""

VERSIONED = ("numpy", "pillow", "onnxruntime", "openvino", "pyarrow")
"""Packages whose version is in the plan of a run, because another version may write other bytes."""

COUNTS = ("pictures", "broken", "duplicates", "parts")

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # a Path has one slash of ://, and C:/ is a drive
_SUFFIXES = {".parquet": "parquet", ".tar": "webdataset"}
_OTHER_FILES = (".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".txt", ".gz", ".tgz", ".zip", ".zst", ".arrow",
                ".feather", ".html", ".xlsx", ".db", ".sqlite", ".npz", ".jpg", ".jpeg", ".png")  # fmt: skip
"""Suffixes that the name of an output must not have. Such an output would be a directory with the name of a file."""


@dataclass(frozen=True)
class Output:
    """Path and format of the output: one file, or a directory with a file for each part.

    Attributes:
        target: Path of the output.
        form: Format, one of ``BULK_FORMATS``.
        single: True if the output is one file, False if the output is a directory.
        force: Whether to replace an earlier output of bulk at ``target``, and to remove the parts of a killed run with
            another plan. A killed run with the same plan is resumed.
    """

    target: Path
    form: str
    single: bool
    force: bool = False

    @classmethod
    def named(cls, target: Path, form: str | None, force: bool) -> Output:
        """Returns the output for a path: one file for ``NAME.parquet`` or ``NAME.tar``, a directory for other names.

        Args:
            target: Path of the output.
            form: The value of ``--format``; None if it is not given.
            force: Whether to replace an earlier output.

        Raises:
            UsageError: The output is an address or a file of another type, the format does not fit the name, or the
                format is unknown.
        """
        check_name(target)
        if _ADDRESS.match(str(target)):
            raise UsageError(
                f"expected an output on the local disk, got {str(target).replace(':/', '://', 1)}",
                "give a local path, and copy the output to the object store afterwards",
            )
        if target.suffix.lower() in _OTHER_FILES:
            raise UsageError(
                f"expected {option('output')} to be NAME.parquet, NAME.tar or the name of a directory, got "
                f"{target.name}",
                f"give {target.stem}.parquet or {target.stem}",
            )
        by_name = _SUFFIXES.get(target.suffix.lower())
        if form is not None and form not in BULK_FORMATS:
            raise UsageError(f"expected {option('format')} to be one of {', '.join(BULK_FORMATS)}, got {form}")
        if form is not None and by_name is not None and form != by_name:
            raise UsageError(
                f"expected {option('format')} {by_name} for {target.name}, got {form}",
                f"leave {option('format')} out, or give an output without {target.suffix}",
            )
        return cls(target, form or by_name or BULK_FORMATS[0], by_name is not None, force)


def run_bulk(
    source: PictureSource,
    output: Output,
    options: BulkOptions,
    *,
    cluster: Cluster | None = None,
    progress: ProgressCallback = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Captions all pictures of a source and writes the output.

    The output appears when it is complete. Until then, the finished parts are in ``OUT.run``. If a run was killed, the
    same call computes only the missing parts. If the output is complete already, nothing is computed.

    Args:
        source: The pictures.
        output: Path and format of the output.
        options: How to caption.
        cluster: A Ray cluster; None to compute in this process.
        progress: Called with (stage, pictures done, number of all pictures).

    Returns:
        The counts ``pictures``, ``broken``, ``duplicates`` and ``parts`` of the output; ``computed`` (number of
        pictures that this run captioned), ``seconds``, ``pictures_per_s``.

    Raises:
        DataError: The source cannot be read, has no picture, or was changed since the killed run began; or a disk or
            an object store fails.
        OutputError: The output exists, another run writes the same output, the killed run had another plan, or the disk
            is full.
        BundleError, BackendError, PromptError, UsageError: For the same reasons as in ``Captioner.load`` and
            ``Captioner.caption``.
        MissingPackageError: A package for this source or output is not installed.
        ClusterError: The Ray cluster cannot be reached.
    """
    if cluster is not None:
        check_ray(cluster.address)
    sink, start = sink_of(output.form), time.monotonic()
    _check_exists(output, sink)
    computed = 0
    with ExitStack() as stack:
        part = stack.enter_context(locked(output.target))
        captioner = stack.enter_context(ChunkCaptioner(options, sink.pictures))
        writer = _OutputWriter(output, options, sink, part)
        counts = writer.begin(source, captioner, progress)
        if counts is None:
            computed = writer.compute(captioner, cluster, progress)
            counts = writer.publish()
        writer.files.clear()
    seconds = time.monotonic() - start
    return {
        **counts,
        "computed": computed,
        "seconds": round(seconds, 1),
        "pictures_per_s": round(computed / seconds, 2) if seconds > 0 else 0.0,
    }


def _check_exists(output: Output, sink: RowFormat) -> None:
    """Checks, before the bundle is loaded, that the output's path is free or has an earlier output of ``bulk``.

    Raises:
        OutputError: A file or directory exists there that ``bulk`` did not make.
    """
    target = output.target
    if not os.path.lexists(target) or _record_of(output, sink) is not None:
        return
    if output.single:
        raise OutputError(f"{target} exists, and was not made by bulk", "give another output")
    check_target(target, output.force, REPORT_FILE)


def _record_of(output: Output, sink: RowFormat) -> dict[str, Any] | None:
    """Returns the record (plan and counts) that a complete output holds; None if there is no complete output."""
    path = output.target if output.single else output.target / REPORT_FILE
    if not path.is_file():
        return None
    try:
        if not output.single:
            return read_json(path, OutputError)
        text = sink.record(path)
        with reading(path, "the record of a run", OutputError):
            values = None if text is None else parse_json(text)
    except OutputError:
        return None
    return values if isinstance(values, dict) else None


class _OutputWriter:
    """Computes the parts of an output, writes each part to a file, and makes the output from these files.

    Attributes:
        files: The directory of the run, with the finished parts.
    """

    def __init__(self, output: Output, options: BulkOptions, sink: RowFormat, part: Path) -> None:
        self._output, self._options, self._sink, self._part = output, options, sink, part
        self._size = options.chunk_size
        self.files = RunDirectory(output.target, sink.suffix)
        self._plan = Plan({})
        self._taken: tuple[int, list[Row]] = (-1, [])  # the last part from which captions were taken

    def begin(
        self, source: PictureSource, captioner: ChunkCaptioner, progress: ProgressCallback
    ) -> dict[str, Any] | None:
        """Lists the pictures of the source, and finds the parts that an earlier run finished.

        Returns:
            The counts of the output if the output is complete already, else None.
        """
        listed = self._part / "pictures"
        digest, count = write_list(source.items(), listed, lambda done: progress("listing", done, 0))
        self._plan = Plan(
            {
                "source": source.path,
                "list": digest,
                "pictures": count,
                "format": self._output.form,
                **captioner.loaded(),
                **self._options.plan(captioner.generation),
                "versions": {"blip2edge": __version__, **{name: installed(name) for name in VERSIONED}},
            }
        )
        target = self._output.target
        if self._output.force:
            if not self.files.holds(self._plan):
                self.files.clear()
        elif os.path.lexists(target):
            record = _record_of(self._output, self._sink) or {}
            difference = self._plan.difference(record.get("plan", {}))
            if difference:
                raise OutputError(
                    f"{target} exists, and is the output of another run: {difference}",
                    f"give another output, or replace it with {option('force', on=True)}",
                )
            return {name: record.get(name) for name in COUNTS}
        self.files.begin(self._plan, listed)
        return None

    def compute(self, captioner: ChunkCaptioner, cluster: Cluster | None, progress: ProgressCallback) -> int:
        """Computes and writes the missing parts of the output; returns the number of pictures in these parts."""
        finished, pictures = self.files.finished(), int(self._plan.values["pictures"])
        before = done = min(finished * self._size, pictures)
        find = self._finder(finished)
        chunks = self.files.chunks(self._size, finished)
        if cluster is None:
            results = captioner.captions(chunks, find)
        else:
            loaded = captioner.loaded()
            captioner.close()  # the workers load it
            results = captions_on_ray(chunks, self._options, self._sink.pictures, loaded, find, cluster)
        progress("captions", done, pictures)
        for number, result in enumerate(results, finished):
            self._write(number, result)
            done += len(result.rows)
            progress("captions", done, pictures)
        return done - before

    def _finder(self, finished: int) -> Find | None:
        """Returns the function that finds duplicates; None if the options ask for no duplicate search.

        The function also compares with the pictures of the first ``finished`` parts, which an earlier run wrote.
        """
        if self._options.duplicates is None:
            return None
        index = DuplicateIndex(self._options.duplicates)
        for number in range(finished):
            index.restore(*self.files.read_embeddings(number))
        return index.find

    def _write(self, number: int, result: ChunkResult) -> None:
        """Writes the embeddings of a part of the output (if duplicates are searched), then the part."""
        first, rows = number * self._size, list(result.rows)
        for place, row in enumerate(rows):
            original = result.originals.get(first + place)
            if original is not None and row.error is None:
                rows[place] = self._duplicate(row, original, number, rows)
        if self._options.duplicates is not None:
            self.files.write_embeddings(number, result.numbers, result.embeddings)
        self.files.publish(
            self.files.part(number).name, lambda path: self._sink.write(path, first, rows, result.pictures)
        )

    def _duplicate(self, row: Row, original: Original, number: int, rows: list[Row]) -> Row:
        """Returns the row of a duplicate with the captions of the original, a picture of this part or an earlier part.

        The original may have an error: on Ray, a picture is read twice, and the second reading may fail.
        """
        part, place = divmod(original.number, self._size)
        if part != number:
            if self._taken[0] != part:
                self._taken = part, self._sink.rows(self.files.part(part))
            rows = self._taken[1]
        known = rows[place]
        return replace(
            row,
            captions=known.captions,
            logprobs=known.logprobs,
            confidences=known.confidences,
            duplicate_of=known.image,
            similarity=original.similarity,
            error=None if known.error is None else f"the original {known.image} is broken: {known.error}",
        )

    def publish(self) -> dict[str, Any]:
        """Makes the output from the finished parts; returns the counts of pictures, broken pictures and so on."""
        parts = self.files.parts(self.files.finished())
        counts = self._counts(parts)
        record = json.dumps(
            {"plan": self._plan.values, **counts}, sort_keys=True, indent=None if self._output.single else 2
        )
        fresh, target, replaces = self._part / NEW, self._output.target, self._output.force
        try:
            if self._output.single:
                self._sink.join(parts, fresh, record)
                publish_file(fresh, target, replace=replaces)
            else:
                fresh.mkdir()
                for part in parts:
                    copy_part(part, fresh / part.name)
                (fresh / REPORT_FILE).write_text(f"{record}\n", encoding="utf-8")
                publish(fresh, target, replace=replaces, marker=REPORT_FILE)
        except OSError as error:
            raise output_error(target, error) from error
        return counts

    def _counts(self, parts: list[Path]) -> dict[str, Any]:
        counts = dict.fromkeys(COUNTS, 0)
        for part in parts:
            for row in self._sink.rows(part):
                counts["pictures"] += 1
                counts["broken"] += row.error is not None
                counts["duplicates"] += row.duplicate_of is not None
        return {**counts, "parts": len(parts)}
