"""Files of an unfinished run of ``bulk``: the plan, the list of pictures, and the finished parts of the output.

    OUT.run/plan.json            everything that changes the output: source, bundle, options, versions
    OUT.run/pictures.jsonl       the source's pictures, one item in each line
    OUT.run/part-000012.parquet  the rows of pictures 12 * N to 13 * N - 1; N is the number of pictures in a part
    OUT.run/part-000012.npz      the embeddings of these pictures, if duplicates are searched

A file appears under its name when it is complete and on the disk (fsync). So a killed run leaves whole parts only, and
the next run of the same command makes the missing ones.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bulk.listed import ListedPicture
from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.names import with_own_name
from blip2edge.bundle.outputs.publishing import flush_file, flush_names
from blip2edge.errors import DataError, OutputError, option
from blip2edge.picture_files import printable
from blip2edge.reading import read_json, reading

PLAN, PICTURES = "plan.json", "pictures.jsonl"
RUN_SUFFIX = ".run"  # added to the output's name, as for training
_FRESH = ".fresh"  # begins the name of a file that is being written
_PART = "part-"
_NAMES = re.compile(rf"{_PART}\d{{6,}}\.(parquet|tar|npz)|{re.escape(_FRESH)}-.*|{re.escape(PICTURES)}")
_MARKER = {"made_by": "blip2edge bulk"}  # in the plan's file: a training has a directory of the same name


@dataclass(frozen=True)
class Plan:
    """All values that change the bytes of the output. Two runs with equal plans give equal outputs.

    Attributes:
        values: JSON values by name: ``source``, ``list`` (hash of the list of pictures), ``pictures`` (their number),
            ``bundle`` (hash of the bundle), the options by their names, and ``versions`` of the packages.
    """

    values: Mapping[str, Any]

    def to_json(self) -> str:
        """Returns the plan as one line of JSON, with keys in a fixed order."""
        return json.dumps(self.values, sort_keys=True)

    def difference(self, other: Mapping[str, Any]) -> str:
        """Describes the first difference between this plan and another plan; returns an empty text for equal plans."""
        mine = json.loads(self.to_json())
        for name in sorted({*mine, *other}):
            if name == "list" and mine.get(name) != other.get(name):
                return f"the pictures of {mine.get('source')} were added to, removed or changed"
            if mine.get(name) != other.get(name):
                return _difference(name, other.get(name), mine.get(name))
        return ""


def _difference(name: str, before: Any, now: Any) -> str:
    """Describes the first difference of two unequal values; for two dictionaries, the first key with unequal values."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in sorted({*before, *now}) if before.get(key) != now.get(key))
        return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return f"{name} was {json.dumps(before)}, and is {json.dumps(now)} now"


@dataclass(frozen=True)
class Chunk:
    """The pictures of one part of the output.

    Attributes:
        number: Number of the part, from 0.
        first: Number, in the source, of the part's first picture.
        items: Pictures of the part.
    """

    number: int
    first: int
    items: tuple[ListedPicture, ...]


class RunDirectory:
    """The directory ``OUT.run`` of an unfinished run.

    Args:
        target: Path of the output.
        suffix: File suffix of the parts, such as ``.parquet``.
    """

    def __init__(self, target: Path, suffix: str) -> None:
        target = with_own_name(target)
        self.path = target.with_name(f"{target.name}{RUN_SUFFIX}")
        self._target, self._suffix = target, suffix
        self._remove = f"remove {self.path}, and run the command again"

    def begin(self, plan: Plan, pictures: Path) -> bool:
        """Prepares the directory for a new run, or checks that an earlier run in the directory had the same plan.

        Args:
            plan: The plan of this run.
            pictures: File with the list of pictures for this run; the file is moved into the directory.

        Returns:
            Whether an earlier run is resumed.

        Raises:
            DataError: The source was changed since the earlier run began, or the earlier run's files are damaged.
            OutputError: The earlier run had another plan, or the directory cannot be written.
        """
        self._check_made_by_bulk()
        if (self.path / PLAN).is_file():
            self._check(plan, pictures)
            for left in self.path.glob(f"{_FRESH}*"):
                left.unlink()
            return True
        self.clear()
        self._writing(lambda: self.path.mkdir(parents=True))
        self.publish(PICTURES, lambda path: os.replace(pictures, path))
        self.publish(PLAN, lambda path: path.write_text(_plan_text(plan), encoding="utf-8"))
        return False

    def _check_made_by_bulk(self) -> None:
        """Checks that the directory is missing, has a plan of bulk, or holds only files that a killed run of bulk left.

        Raises:
            OutputError: Another program made the directory, such as ``blip2edge train``.
        """
        if not os.path.lexists(self.path) or self._plan().items() >= _MARKER.items():
            return
        if not self.path.is_dir() or not all(_NAMES.fullmatch(path.name) for path in self.path.iterdir()):
            raise OutputError(f"{self.path} exists, and was not made by bulk", "move it away, or give another output")

    def _plan(self) -> dict[str, Any]:
        """Returns the values of the file ``plan.json``; empty if the file is missing or damaged."""
        try:
            return read_json(self.path / PLAN, DataError)
        except DataError:
            return {}

    def holds(self, plan: Plan) -> bool:
        """Returns whether the directory belongs to a run with this plan."""
        expected: dict[str, Any] = json.loads(_plan_text(plan))
        return self._plan() == expected

    def _check(self, plan: Plan, pictures: Path) -> None:
        fix = f"restore it, or start again with {option('force', on=True)}, or give another output"
        old = {name: value for name, value in self._plan().items() if name not in _MARKER}
        if old.get("list") != plan.values["list"] and old.get("source") == plan.values["source"]:
            raise DataError(
                f"{plan.values['source']} was changed since the run of {self._target} began: "
                f"{_first_change(self.path / PICTURES, pictures)}",
                fix,
            )
        difference = plan.difference(old)
        if difference:
            raise OutputError(
                f"{self.path} was written by a run with another plan: {difference}",
                f"give the same flags to resume it, start again with {option('force', on=True)}, "
                "or give another output",
            )

    def finished(self) -> int:
        """Returns the number of finished parts before the first missing part; parts are made in order."""
        number = 0
        while self.part(number).exists():
            number += 1
        return number

    def chunks(self, size: int, first: int) -> Iterator[Chunk]:
        """Yields the parts of the output from number ``first`` on, with ``size`` pictures each.

        Raises:
            DataError: The file with the list of pictures is damaged.
        """
        path = self.path / PICTURES
        with reading(path, "the list of pictures", DataError, self._remove), open(path, encoding="utf-8") as file:
            lines = islice(file, first * size, None)
            for number in count(first):
                items = tuple(map(ListedPicture.from_json, islice(lines, size)))
                if not items:
                    return
                yield Chunk(number, number * size, items)

    def part(self, number: int) -> Path:
        """Returns the path of the file of part ``number``."""
        return self.path / f"{_PART}{number:06d}{self._suffix}"

    def parts(self, number: int) -> list[Path]:
        """Returns the paths of the files of the first ``number`` parts."""
        return [self.part(each) for each in range(number)]

    def publish(self, name: str, write: Callable[[Path], Any]) -> None:
        """Writes a file under a temporary name, flushes the file to the disk, and renames the file to ``name``.

        Raises:
            OutputError: The disk is full, or the file cannot be written.
        """
        fresh = self.path / f"{_FRESH}-{name}"

        def publish() -> None:
            write(fresh)
            flush_file(fresh)
            os.replace(fresh, self.path / name)
            flush_names(self.path)

        self._writing(publish)

    def write_embeddings(self, number: int, numbers: list[int], embeddings: NDArray[np.float16]) -> None:
        """Writes the numbers and embeddings of those pictures of a part that are not duplicates of earlier pictures.

        Call it before the part itself is written: a part whose file exists counts as finished.
        """

        def write(path: Path) -> None:
            with open(path, "wb") as file:
                np.savez(file, numbers=np.array(numbers, np.int64), embeddings=embeddings)

        self.publish(self._embeddings(number).name, write)

    def read_embeddings(self, number: int) -> tuple[list[int], NDArray[np.float16]]:
        """Reads the numbers and embeddings that :meth:`write_embeddings` wrote."""
        path = self._embeddings(number)
        with reading(path, "embeddings", DataError, self._remove), np.load(path, allow_pickle=False) as values:
            return values["numbers"].tolist(), values["embeddings"]

    def _embeddings(self, number: int) -> Path:
        return self.path / f"{_PART}{number:06d}.npz"

    def clear(self) -> None:
        """Removes the directory. The plan is renamed first, so that a half removed directory does not count as a run.

        Raises:
            OutputError: The directory was not made by bulk.
        """
        self._check_made_by_bulk()
        for name in (PLAN, PICTURES):
            with suppress(FileNotFoundError):
                (self.path / name).rename(self.path / f"{_FRESH}-{name}")
        shutil.rmtree(self.path, ignore_errors=True)

    def _writing(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            problem = output_error(self.path, error)
            raise OutputError(
                problem.problem, "correct this and run the command again: the run goes on from here"
            ) from error


def _plan_text(plan: Plan) -> str:
    """Returns the content of the file ``plan.json``."""
    return f"{json.dumps({**plan.values, **_MARKER}, sort_keys=True)}\n"


def write_list(items: Iterable[ListedPicture], path: Path, progress: Callable[[int], None]) -> tuple[str, int]:
    """Writes the list of a source's pictures, one line of JSON for each picture.

    Args:
        items: The pictures.
        path: The file to write.
        progress: Called with the number of pictures found so far.

    Returns:
        The hash of the list, and the number of pictures.

    Raises:
        OutputError: The file cannot be written.
    """
    digest, found = hashlib.sha256(), 0
    try:
        with open(path, "w", encoding="utf-8") as file:
            for item in items:
                line = f"{item.to_json()}\n"
                file.write(line)
                digest.update(line.encode())
                found += 1
                progress(found)
    except OSError as error:
        raise output_error(path, error) from error
    return digest.hexdigest(), found


def _first_change(old: Path, new: Path) -> str:
    """Describes the first difference between two files with lists of pictures."""
    with open(old, encoding="utf-8") as before, open(new, encoding="utf-8") as now:
        for one, other in zip_longest(before, now):
            if one == other:
                continue
            was, now_there = (ListedPicture.from_json(line).image if line else None for line in (one, other))
            if was is not None and (now_there is None or was < now_there):
                return f"{printable(was)} was removed"
            return f"{printable(now_there or '')} was {'changed' if was == now_there else 'added'}"
    return "its order"
