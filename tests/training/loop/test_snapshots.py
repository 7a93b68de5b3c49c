"""Snapshots whose removal is cut short do not count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from blip2edge.errors import OutputError
from blip2edge.training.loop.journal import LOG
from blip2edge.training.loop.snapshots import FACTS, Snapshot, Snapshots
from blip2edge.training.loop.trackers import BOARD, IDENTITY


@pytest.mark.parametrize("how", ["write", "clear"])
def test_a_kill_while_a_snapshot_is_removed(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshots, one = Snapshots(tmp_path / "run"), Snapshot({"weight": torch.ones(2)}, {"step": 1})
    snapshots.write(1, one)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if (path / FACTS).exists():
            (path / FACTS).unlink()
            raise KeyboardInterrupt
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        snapshots.write(2, Snapshot(one.tensors, {"step": 2})) if how == "write" else snapshots.clear()
    monkeypatch.setattr(shutil, "rmtree", remove)
    newest = snapshots.newest()
    assert (newest.facts if newest else None) == ({"step": 2} if how == "write" else None)
    snapshots.remove_incomplete()
    assert len(list((tmp_path / "run").iterdir())) == (how == "write")


def test_files_of_the_user_in_the_directory_are_kept(tmp_path: Path) -> None:
    """Only files of a run are removed, and no other file counts as a snapshot."""
    directory = tmp_path / "run"
    snapshots = Snapshots(directory)
    snapshots.write(7, Snapshot({"weight": torch.ones(2)}, {"phase": "stage2", "step": 7}))
    notes = ("step-by-step.md", ".step-1", "step-8.txt", "thesis.txt")
    for name in notes:
        (directory / name).write_text("mine")
    own = [LOG, IDENTITY, ".step-000000009-123", f".{LOG}.part", BOARD]
    for name in own:
        (directory / name).mkdir() if name.startswith(".") or name == BOARD else (directory / name).touch()
    assert (snapshots.steps, snapshots.position) == (7, "stage2 step 7")
    snapshots.clear()
    assert sorted(path.name for path in directory.iterdir()) == sorted(notes)
    with pytest.raises(OutputError, match="contains files"):
        snapshots.clear()
    for name in notes:
        (directory / name).unlink()
    (directory / LOG).touch()
    snapshots.clear()
    assert not directory.exists()
