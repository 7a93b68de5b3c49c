"""Snapshots whose removal is cut short do not count."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from blip2edge.training.loop.snapshots import FACTS, Snapshot, Snapshots


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
