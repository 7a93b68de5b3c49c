"""Snapshots of a run: what an interrupted training goes on from.

A snapshot is a directory with `state.safetensors` (weights, the optimiser's moments, generators of chance) and
`state.json` (phase, step, where each source of samples stands). It is written to a sibling and renamed: at any
moment the newest whole one is there. The one before it is removed afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from blip2edge.errors import DataError, OutputError, option

TENSORS, FACTS = "state.safetensors", "state.json"
PREFIX = "step-"  # of a whole snapshot; what is being written begins with a dot


@dataclass(frozen=True)
class Snapshot:
    """What a run can go on from.

    Attributes:
        tensors: By name.
        facts: Everything else, in JSON's types.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Snapshots:
    """The snapshots of one run.

    Args:
        directory: Where they are; made when the first is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def newest(self) -> Snapshot | None:
        """The last one that was written whole; None where there is none.

        Raises:
            DataError: It is there and cannot be read.
        """
        found = self._whole()
        if not found:
            return None
        path = found[-1]
        try:
            facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
            return Snapshot(load_file(path / TENSORS), facts)
        except (OSError, ValueError, SafetensorError) as error:
            raise DataError(
                f"the snapshot {path} cannot be read ({error})",
                f"start again with {option('force', on=True)}, or remove {path}",
            ) from error

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return bool(self._whole())

    def write(self, step: int, snapshot: Snapshot) -> None:
        """Adds a snapshot and removes those before it.

        Args:
            step: Of the whole run; counts the optimiser steps of all phases.
            snapshot: The content.

        Raises:
            OutputError: The disk is full or not writable; the snapshot before stays.
        """
        fresh = self.directory / f".{PREFIX}{step:09d}-{os.getpid()}"
        target = self.directory / f"{PREFIX}{step:09d}"
        try:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            content = save({name: tensor.contiguous() for name, tensor in snapshot.tensors.items()})
            _write(fresh / TENSORS, content)
            _write(fresh / FACTS, json.dumps(snapshot.facts).encode())
            while target.exists():  # of a run that was started again: it stays until this one is there
                target = target.with_name(f"{target.name}+")  # which sorts behind it
            fresh.rename(target)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise OutputError(
                f"cannot write a snapshot to {self.directory}: {error.strerror or error}",
                "make room and run the command again: it goes on from the snapshot before",
            ) from error
        for path in [*self._whole(), *self.directory.glob(f".{PREFIX}*")]:
            if path != target:
                shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Removes all of them."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _whole(self) -> list[Path]:
        return sorted(self.directory.glob(f"{PREFIX}*"))


def _write(path: Path, content: bytes) -> None:
    """Writes a file and waits until the disk has it."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
