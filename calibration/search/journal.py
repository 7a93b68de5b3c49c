"""Stores the state of a search in ``OUT.run/`` beside the output, so that a killed search can be resumed.

    OUT.run/plan.json         what decides the result: bundle, pictures, options, versions
    OUT.run/spent.json        CPU seconds of all finished steps
    OUT.run/NAME.json         the result of a finished step
    OUT.run/NAME/             the files of a finished step

A result appears under its name when it is complete and on the disk (fsync). So a finished step is not repeated, and a
killed and resumed search gives the same result as a search that was not killed.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.names import with_own_name
from blip2edge.bundle.outputs.publishing import flush_file, flush_names
from blip2edge.errors import DataError, OutputError, option
from blip2edge.reading import read_json

PLAN, SPENT = "plan.json", "spent.json"
RUN_SUFFIX = ".run"  # added to the output's name, as for training and bulk
MADE_BY = {"made_by": "blip2edge calibrate --search"}

OPTION_OF = {
    "board": "device",
    "pictures": "images",
    "optimized": "no_optimize",
    "method": "method",
    "threads": "threads",
}
"""The option that sets a value of a plan, by the value's key."""


def run_directory(target: Path) -> Path:
    """Returns the directory with the state of a search whose output is ``target``."""
    target = with_own_name(target)
    return target.with_name(f"{target.name}{RUN_SUFFIX}")


def unfinished_search(target: Path) -> Path | None:
    """Returns the directory with the state of a search whose output is ``target``; None if there is no such search."""
    path = run_directory(target)
    try:
        made = read_json(path / PLAN, DataError).items() >= MADE_BY.items()
    except DataError:
        return None
    return path if made else None


class SearchJournal:
    """The stored results of the finished steps of a search.

    Args:
        path: The directory of the state.
        fresh: A directory on the same file system for incomplete files; no other search may use it.
    """

    def __init__(self, path: Path, fresh: Path) -> None:
        self.path, self._fresh = path, fresh
        self._start, self._before = time.process_time(), 0.0
        fresh.mkdir(parents=True, exist_ok=True)

    @property
    def scratch(self) -> Path:
        """A directory for files that only this process uses."""
        return self._fresh

    def begin(self, plan: Mapping[str, Any], *, force: bool) -> bool:
        """Prepares the directory of the state, or checks that its search has the same plan.

        Args:
            plan: The values that decide the result.
            force: Whether to remove the state of a search with another plan.

        Returns:
            True if an earlier search is resumed.

        Raises:
            OutputError: The state belongs to another plan, or the directory was not made by a search.
        """
        values = json.loads(json.dumps({**plan, **MADE_BY}))
        old = self.plan()
        if os.path.lexists(self.path) and not old.items() >= MADE_BY.items() and any(self.path.iterdir()):
            raise OutputError(
                f"{self.path} exists, and was not made by calibrate", "move it away, or give another output"
            )
        if old == values:
            spent = self.path / SPENT
            self._before = read_json(spent, DataError)["cpu_s"] if spent.is_file() else 0.0
            return True
        differing = sorted(name for name in {*old, *values} if old.get(name) != values.get(name))
        if old and not force:
            named = [option(OPTION_OF[name]) if name in OPTION_OF else name for name in differing]
            raise OutputError(
                f"{self.path} is of a search with another plan: {', '.join(named)} "
                f"{'differs' if len(named) == 1 else 'differ'}",
                f"give the same flags to resume it, start again with {option('force', on=True)}, or give another "
                "output",
            )
        self.clear()
        self.path.mkdir(parents=True, exist_ok=True)
        self._write(PLAN, values)
        return False

    def plan(self) -> dict[str, Any]:
        """Returns the plan that is stored in the directory; empty if there is none."""
        try:
            return read_json(self.path / PLAN, DataError)
        except DataError:
            return {}

    @property
    def cpu_s(self) -> float:
        """CPU seconds of the search so far, in this process and in earlier processes that were killed."""
        return self._before + time.process_time() - self._start

    def value(self, name: str, compute: Callable[[], Any]) -> Any:
        """Returns the result of a step: reads the stored result, or computes and stores it.

        Args:
            name: Name of the step; it becomes a file name.
            compute: Computes the result, a JSON value.
        """
        path = self.path / f"{name}.json"
        if path.is_file():
            return read_json(path, DataError, f"remove {self.path}, and run the command again")["value"]
        found = compute()
        self._write(path.name, {"value": found})
        self._write(SPENT, {"cpu_s": round(self.cpu_s, 2)})
        return found

    def has(self, name: str) -> bool:
        """Returns whether the result of a step is stored."""
        return (self.path / f"{name}.json").is_file()

    def stored(self, name: str) -> Any:
        """Returns the stored result of a step; None if no result is stored."""
        return read_json(self.path / f"{name}.json", DataError)["value"] if self.has(name) else None

    def replace(self, name: str, value: Any) -> None:
        """Stores the result of a step; an earlier result is replaced."""
        self._write(f"{name}.json", {"value": value})

    def folder(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Returns the directory of a step's files.

        Args:
            name: Name of the step.
            fill: Writes the files into a new directory; called if the step is not finished yet.
        """
        path = self.path / name
        if path.is_dir():
            return path
        fresh = self._fresh / name
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        fill(fresh)
        for file in (file for file in fresh.rglob("*") if file.is_file()):
            flush_file(file)
        flush_names(fresh)
        fresh.rename(path)
        flush_names(self.path)
        self._write(SPENT, {"cpu_s": round(self.cpu_s, 2)})
        return path

    def clear(self) -> None:
        """Removes the directory of the state.

        The plan is removed first. So, if the removal is killed, no later search resumes the incomplete state.
        """
        with suppress(FileNotFoundError):
            (self.path / PLAN).rename(self._fresh / PLAN)
        shutil.rmtree(self.path, ignore_errors=True)

    def _write(self, name: str, value: Any) -> None:
        fresh = self._fresh / name
        try:
            fresh.write_text(json.dumps(value) + "\n", encoding="utf-8")
            flush_file(fresh)
            os.replace(fresh, self.path / name)
            flush_names(self.path)
        except OSError as error:
            problem = output_error(self.path, error)
            raise OutputError(
                problem.problem, "correct this and run the command again: it resumes the search"
            ) from error
