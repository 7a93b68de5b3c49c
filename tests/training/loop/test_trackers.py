"""Trackers get what the log gets, at the steps of the whole run, also after a run is resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from accelerate import tracking  # noqa: E402
from accelerate.tracking import GeneralTracker  # noqa: E402

from blip2edge.errors import Blip2EdgeError, ConfigError  # noqa: E402
from blip2edge.progress import ProgressCallback  # noqa: E402
from blip2edge.training.config import parse_config  # noqa: E402
from blip2edge.training.loop import trackers  # noqa: E402
from blip2edge.training.run import train  # noqa: E402
from tests.training import recipes  # noqa: E402

LOOP = "log_every = 1\nsnapshot_every = 3\n"
VALIDATION = "every = 2\npictures = 2\nmax_new_tokens = 4\n"


class Recorder(GeneralTracker):
    """Records what it is given."""

    name = "recorder"
    requires_logging_directory = False
    started: ClassVar[list[Recorder]] = []

    def __init__(self, run_name: str) -> None:
        super().__init__(_blank=True)
        self.run_name, self.finished = run_name, False
        self.config: dict[str, Any] | None = None
        self.logged: list[tuple[int, dict[str, Any]]] = []

    @property
    def tracker(self) -> None:
        return None

    def start(self) -> None:
        if self.run_name == "offline":
            raise OSError("no network\nat all")
        self.started.append(self)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        assert not kwargs
        self.logged.append((step or 0, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "started", [])


def interrupt(at: int) -> ProgressCallback:
    """Interrupts stage 2 at a step."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "stage2" and done == at:
            raise KeyboardInterrupt

    return progress


def test_a_tracker_gets_every_line_of_the_log(tmp_path: Path) -> None:
    path = recipes.write(
        tmp_path / "recipe.toml", loop=f'{LOOP}trackers = ["recorder"]\ntracker_project = "mine"', validation=VALIDATION
    )
    train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    (tracker,) = Recorder.started
    assert tracker.run_name == "mine"
    assert tracker.finished
    assert tracker.config is not None
    assert tracker.config["stage2.steps"] == recipes.STEPS
    assert tracker.config["loop.trackers"] == "('recorder',)"
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    # Four phases with four steps each: steps count on.
    assert [step for step, _ in tracker.logged] == list(range(1, 17))
    for line, (_, values) in zip(lines, tracker.logged, strict=True):
        phase = line["phase"]
        whole = {"loss": line["loss"], "grad_norm": line["grad_norm"], "rate": line["rate"]}
        wanted = {**whole, **line["losses"], **line["gauges"], **line.get("validation", {})}
        assert values == {f"{phase}/{name}": value for name, value in wanted.items()}
    assert "stage2/exact_match" in tracker.logged[-1][1]


def test_a_resumed_run_goes_on_at_the_step_of_its_snapshot(tmp_path: Path) -> None:
    path = recipes.write(tmp_path / "recipe.toml", loop=f'{LOOP}trackers = ["recorder"]')
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "out", evaluation_scenes=0, progress=interrupt(4))
    assert Recorder.started[0].finished
    assert (tmp_path / "out.run" / trackers.IDENTITY).is_file()
    train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    first, second = Recorder.started
    assert [step for step, _ in second.logged] == [16]  # the snapshot is of step 15, the third of stage 2
    assert second.logged[0] == first.logged[15]
    assert second.config is None
    assert not (tmp_path / "out" / trackers.IDENTITY).exists()


def test_what_is_not_known_or_not_installed_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "get_available_trackers", list)
    for loop, message in (
        ('trackers = ["tensorbord"]', r"'tensorbord' is not one of aim, .*tensorboard"),
        (
            'trackers = ["wandb"]',
            r"trackers: wandb needs the package wandb, which is not installed; install it: pip .*\[trackers\]",
        ),
        ("tensorboard = true", r"the package tensorboard, which is not installed; install it: pip .*\[trackers\]"),
        ('trackers = ["mlflow"]', r"the package mlflow, which is not installed; pip install mlflow"),
        ('trackers = ["recorder"]\ntracker_project = "offline"', "recorder does not start: OSError: no network at all"),
    ):
        path = recipes.write(tmp_path / "recipe.toml", loop=loop)
        with pytest.raises(ConfigError, match=message):
            train("stage2", path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Failing(Recorder):
    """A server that is away when it gets values, and at the end."""

    name = "failing"

    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        super().log(values, step, **kwargs)
        raise ConnectionError("the server\nis away")

    def finish(self) -> None:
        super().finish()
        raise ConnectionError("the server\nis away")


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "failing", Failing)
    names = '"recorder", "failing", "recorder"'
    path = recipes.write(tmp_path / "recipe.toml", loop=f"{LOOP}trackers = [{names}]")
    said: list[str] = []
    train("stage2", path, tmp_path / "out", evaluation_scenes=0, log=said.append)
    (warning,) = [line for line in said if "failing" in line]
    assert warning.startswith("[loop] trackers: failing fails: ConnectionError: the server is away; the run goes on")
    assert [type(tracker) for tracker in Recorder.started] == [Recorder, Failing]
    for tracker in Recorder.started:
        assert [step for step, _ in tracker.logged] == list(range(1, 17))  # it is tried again at each line
        assert tracker.finished


def test_a_run_that_cannot_begin_starts_no_tracker(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    parts = 'vision_from = "absent"\nlanguage_from = "absent"'
    path.write_text(f'[loop]\n{LOOP}trackers = ["recorder"]\n[model]\n{parts}\n[stage2]\n{recipes.PHASE}')
    with pytest.raises(Blip2EdgeError, match="absent"):
        train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    assert not Recorder.started
    assert not (tmp_path / "out.run" / trackers.IDENTITY).exists()


def test_trackers_are_ended_if_a_phase_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("refused")

    monkeypatch.setattr("blip2edge.training.run._run_phases", refuse)
    path = recipes.write(tmp_path / "recipe.toml", loop=f'{LOOP}trackers = ["recorder"]')
    with pytest.raises(ConfigError, match="refused"):
        train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    assert [tracker.finished for tracker in Recorder.started] == [True]


def test_tensorboard_is_an_alias() -> None:
    parsed = parse_config('[loop]\ntensorboard = true\ntrackers = ["wandb", "tensorboard"]')
    assert parsed.loop.tracker_names == ("wandb", "tensorboard")
    assert parse_config("[loop]\ntensorboard = true").loop.tracker_names == ("tensorboard",)


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: the extra [trackers]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = recipes.write(tmp_path / "recipe.toml", loop=f"{LOOP}tensorboard = true", validation=VALIDATION)
    with pytest.raises(KeyboardInterrupt):
        train("stage2", path, tmp_path / "out", evaluation_scenes=0, progress=interrupt(4))
    train("stage2", path, tmp_path / "out", evaluation_scenes=0)
    events = EventAccumulator(str(tmp_path / "out" / trackers.BOARD)).Reload()
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    wanted = [(12 + line["step"], line["loss"]) for line in lines if line["phase"] == "stage2"]
    found = [(event.step, event.value) for event in events.Scalars("stage2/loss")]
    assert [step for step, _ in found] == [13, 14, 15, 16]
    assert [value for _, value in found] == pytest.approx([value for _, value in wanted], rel=1e-6)
    assert [event.step for event in events.Scalars("stage2/exact_match")] == [14, 16]


def test_wandb_continues_the_run(tmp_path: Path) -> None:
    """Offline; in a process of its own, because wandb starts a service."""
    pytest.importorskip("wandb", reason="wandb is not installed: the extra [trackers]")
    path = recipes.write(tmp_path / "recipe.toml", loop=f'{LOOP}trackers = ["wandb"]')
    code = f"""
import sys
from blip2edge.training.run import train
def progress(phase, done, total):
    if sys.argv[1] == "killed" and phase == "stage2" and done == 4:
        raise KeyboardInterrupt
try:
    train("stage2", {str(path)!r}, {str(tmp_path / "out")!r}, evaluation_scenes=0, progress=progress)
except KeyboardInterrupt:
    pass
"""
    settings = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    for part in ("killed", "resumed"):
        subprocess.run([sys.executable, "-c", code, part], check=True, env=settings, cwd=tmp_path, timeout=300)
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    assert len({run.name.rpartition("-")[2] for run in runs}) == 1, "both parts are one run"
    assert (tmp_path / "out" / "model.safetensors").is_file()
