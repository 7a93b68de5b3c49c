"""Snapshots of a training run, from which an interrupted run resumes.

A snapshot is a directory with `state.safetensors` (weights, optimiser moments, random generators) and `state.json`
(phase, step, position in the data). It is written to a temporary directory and renamed, so that a complete snapshot
exists at any moment. The previous snapshot is removed afterwards.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import part_of, remove
from blip2edge.errors import DataError, OutputError, option
from blip2edge.reading import read_json, reading
from blip2edge.training.loop.journal import LOG
from blip2edge.training.loop.trackers import BOARD, IDENTITY

_TENSORS, FACTS = "state.safetensors", "state.json"
_PREFIX = "step-"  # of a complete snapshot; an incomplete one begins with a dot
_COMPLETE = re.compile(r"step-\d{9,}\+*")
_INCOMPLETE = re.compile(r"\.step-\d{9,}\+*-(\d+|removed)")  # the number is that of the process which wrote it


@dataclass(frozen=True)
class Snapshot:
    """Content of a snapshot.

    Attributes:
        tensors: Tensors by name.
        facts: Everything else, as JSON values.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Snapshots:
    """Reads, writes and removes the snapshots of one run.

    Args:
        directory: Directory of the snapshots; created with the first snapshot.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def newest(self) -> Snapshot | None:
        """Reads the newest complete snapshot; None if there is no snapshot.

        Raises:
            DataError: The snapshot cannot be read.
        """
        found = self._whole()
        if not found:
            return None
        path = found[-1]
        fix = f"start again with {option('force', on=True)}, or remove {path}"
        facts = read_json(path / FACTS, DataError, fix)
        with reading(path / _TENSORS, "the tensors of a snapshot", DataError, fix):
            return Snapshot(load_file(path / _TENSORS), facts)

    @property
    def steps(self) -> int | None:
        """Returns the number of optimiser steps (over all phases) at the newest snapshot; None without a snapshot."""
        found = self._whole()
        return int(found[-1].name.removeprefix(_PREFIX).rstrip("+")) if found else None

    @property
    def position(self) -> str | None:
        """Returns phase and step of the newest snapshot, such as ``stage2 step 20``; None without a snapshot.

        The step counts within the phase, as in the progress.
        """
        found = self._whole()
        if not found:
            return None
        facts = read_json(found[-1] / FACTS, DataError)
        return f"{facts['phase']} step {facts['step']}"

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Writes a snapshot and removes the previous ones.

        Args:
            step: Number of optimiser steps done, over all phases of the run.
            snapshot: Content of the snapshot.

        Raises:
            OutputError: The disk is full or not writable; the previous snapshot is kept.
        """
        fresh = self.directory / f".{_PREFIX}{step:09d}-{os.getpid()}"
        target = self.directory / f"{_PREFIX}{step:09d}"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            content = save({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()})
            _write(fresh / _TENSORS, content)
            _write(fresh / FACTS, json.dumps(snapshot.facts).encode())
            while target.exists():  # from an earlier run; kept until the new snapshot is complete
                target = target.with_name(f"{target.name}+")  # sorts after it
            fresh.rename(target)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise OutputError(
                output_error(self.directory, error).problem,
                "free some space and run the command again: it resumes from the previous snapshot",
            ) from error
        for path in self._whole():
            if path != target:
                _remove(path)
        self.remove_incomplete()

    def remove_incomplete(self) -> None:
        """Removes the incomplete snapshots that killed runs left."""
        for path in self._named(_INCOMPLETE):
            shutil.rmtree(path, ignore_errors=True)

    def check_own(self) -> None:
        """Checks that the directory is empty or missing, or that a run has written files in it.

        Raises:
            OutputError: The directory contains files, and no run has written any of them.
        """
        found = self.directory.is_dir() and any(self.directory.iterdir())
        if found and all(path.name == BOARD for path in self._own_files()):  # a run has its log or id beside it
            raise OutputError(
                f"{self.directory} contains files, but no {LOG} of a run, and a run writes its snapshots there",
                "rename it, or give another output directory",
            )

    def clear(self) -> None:
        """Removes all snapshots, the log, and the files of trackers; then the directory, if no other files are in it.

        Raises:
            OutputError: The directory contains files, and no run has written any of them.
        """
        self.check_own()
        for path in self._whole():
            _remove(path)
        for path in self._own_files():
            remove(path)
        with suppress(OSError):  # files of the user are kept
            self.directory.rmdir()

    def _own_files(self) -> list[Path]:
        """Returns the files and directories of a run: snapshots, log, files of trackers, and temporary forms of all."""
        files = [self.directory / name for name in (LOG, IDENTITY)]
        named = [self.directory / BOARD, *(part_of(path) for path in files), *files]
        return [
            *self._named(_COMPLETE),
            *self._named(_INCOMPLETE),
            *(path for path in named if os.path.lexists(path)),
        ]

    def _whole(self) -> list[Path]:
        return self._named(_COMPLETE)

    def _named(self, pattern: re.Pattern[str]) -> list[Path]:
        return sorted(path for path in self.directory.glob("*") if pattern.fullmatch(path.name))


def _remove(path: Path) -> None:
    """Removes a snapshot. If the process is killed meanwhile, the rest of the snapshot counts as incomplete."""
    hidden = path.with_name(f".{path.name}-removed")
    with suppress(OSError):
        path.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _write(path: Path, content: bytes) -> None:
    """Writes a file and flushes it to the disk (fsync)."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
