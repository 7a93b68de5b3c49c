"""A lost process is explained in one line by the others; errors name the rank; the time of all parts counts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

import torch.distributed as dist  # noqa: E402

from blip2edge.cli import guarded  # noqa: E402
from blip2edge.errors import ConfigError, ProcessError  # noqa: E402
from blip2edge.training import run as runs  # noqa: E402
from blip2edge.training.loop import training_run  # noqa: E402
from blip2edge.training.loop.processes import ended_processes  # noqa: E402
from blip2edge.training.loop.snapshots import FACTS, Snapshot, Snapshots  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.training import recipes  # noqa: E402

GLOO = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer")


def several(count: int) -> Any:
    return SimpleNamespace(num_processes=count)


def _guard(error: RuntimeError, snapshots: Snapshots) -> None:
    with ended_processes(several(2), snapshots):
        raise error


@pytest.mark.parametrize("error", [GLOO, dist.DistBackendError("NCCL error"), RuntimeError("Broken pipe")])
def test_a_lost_process_is_told_with_the_snapshot(error: RuntimeError, tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "out.run")
    with pytest.raises(ProcessError, match=r"from the beginning, because there is no snapshot yet$"):
        _guard(error, snapshots)
    snapshots.write(38, Snapshot({}, {"phase": "stage2", "step": 18}))
    with (
        pytest.raises(
            ProcessError, match=r"again with the same command: .* from the snapshot of stage2 step 18 in \S+"
        ),
        ended_processes(several(2), snapshots),
    ):
        raise error


def test_a_snapshot_that_is_removed_meanwhile_does_not_hide_the_lost_process(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path / "out.run")
    snapshots.write(38, Snapshot({}, {"phase": "stage2", "step": 18}))
    (snapshots.directory / "step-000000038" / FACTS).unlink()
    with pytest.raises(ProcessError, match=r"continues from the newest snapshot in \S+out\.run$"):
        _guard(GLOO, snapshots)


def test_other_errors_and_those_of_one_process_stay(tmp_path: Path) -> None:
    for count, error in ((1, GLOO), (2, RuntimeError("shape mismatch")), (2, ConfigError("wrong"))):
        with pytest.raises(type(error)) as caught, ended_processes(several(count), Snapshots(tmp_path)):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    ("rank", "size", "said"),
    [
        ("1", "2", "error: [rank 1] wrong"),
        ("0", "2", "error: wrong"),
        ("3", "1", "error: wrong"),
        ("", "", "error: wrong"),
    ],
)
def test_an_error_names_the_rank_of_its_process(
    rank: str, size: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> int:
        raise ConfigError("wrong")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    assert guarded(run) == 1
    assert capsys.readouterr().err == f"{said}\n"


def test_the_time_of_all_parts_of_a_run_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes a minute of a false clock; the run is stopped after the first snapshot of stage 2."""
    now = [0.0]
    monkeypatch.setattr(
        training_run, "time", SimpleNamespace(monotonic=lambda: now[0], process_time=lambda: now[0] / 2)
    )
    monkeypatch.setattr(runs, "draw_curve", lambda lines, path: False)
    path = recipes.write(tmp_path / "recipe.toml", loop="snapshot_every = 2\nlog_every = 1")
    stops = [True]

    def minute(stage: str, done: int, total: int) -> None:
        now[0] += 60
        if stops[0] and (stage, done) == ("stage2", 3):
            raise KeyboardInterrupt

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "out", progress=minute, evaluation_scenes=0)
    assert Snapshots(tmp_path / "out.run").position == "stage2 step 2"
    stops[0], now[0] = False, 1e6  # hours later, in another process
    record = train("stage2", path, tmp_path / "out", progress=minute, log=lines.append, evaluation_scenes=0)
    assert any(line.startswith("resumes from the snapshot of stage2 step 2 in ") for line in lines)
    steps = len(recipes.PHASES) * recipes.STEPS
    assert record["seconds"] == steps * 60
    assert record["cpu_seconds"] == steps * 30
    assert record["phases"]["stage2"]["seconds"] == recipes.STEPS * 60
    assert record["phases"]["stage1"]["seconds"] == recipes.STEPS * 60
    assert json.loads((tmp_path / "out" / "training.json").read_text())["seconds"] == record["seconds"]
