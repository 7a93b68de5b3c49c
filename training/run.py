"""A whole training run: recipe in, checkpoint directory out; interrupted, it goes on from its last snapshot."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from blip2edge import __version__
from blip2edge.errors import ConfigError, OutputError, option
from blip2edge.progress import ProgressCallback
from blip2edge.training.config import TrainingConfig, config_hash, load_config
from blip2edge.training.evaluation.evaluate import evaluate_scenes
from blip2edge.training.evaluation.judges import JudgeOptions, open_answerer
from blip2edge.training.loop.journal import BOARD, CURVE, LOG, Journal, draw_curve
from blip2edge.training.loop.loop import Run, run_phase
from blip2edge.training.loop.snapshots import Snapshot, Snapshots
from blip2edge.training.phases.registry import PHASES, Studio, phases_of
from blip2edge.training.setup.parts import build, first_stage, write_stage1

RECORD = "training.json"  # beside the weights: how they came about
RUN = ".run"  # behind the output's name: log and snapshots while the run lasts
WORKSHOP = "workshop."
AUTOCAST = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
STAGES = ("stage1", "stage2", "instruct")


def _silent(_: str) -> None:
    """Takes a line and drops it."""


@dataclass
class _Session:
    """One run in the making."""

    stage: str
    config: TrainingConfig
    accelerator: Accelerator
    studio: Studio
    journal: Journal
    snapshots: Snapshots
    say: Callable[[str], None]
    progress: ProgressCallback | None
    figures: dict[str, Any] = field(default_factory=dict)
    written: tuple[str, ...] = ()  # the captioner's parts that finished phases changed

    def remember(self) -> Snapshot:
        """What a snapshot holds beside the phase that it is in."""
        tensors = self.studio.workshop.trained(self.written)
        facts = {
            "stage": self.stage,
            "recipe": config_hash(self.config),
            "figures": self.figures,
            "journal": self.journal.state(),
            "processes": self.accelerator.num_processes,
        }
        return Snapshot({f"{WORKSHOP}{name}": tensor for name, tensor in tensors.items()}, facts)

    def go_on(self, snapshot: Snapshot, names: list[str]) -> int:
        """Takes what finished phases left; the number of the phase to go on with.

        Raises:
            ConfigError: The recipe has no such phase any more.
        """
        phase = snapshot.facts["phase"]
        if phase not in names:
            raise ConfigError(
                f"the snapshot is of the phase {phase}, and this recipe has {', '.join(names)}",
                f"begin anew with {option('force', on=True)}",
            )
        begun = names.index(phase)
        self.figures = dict(snapshot.facts["figures"])
        for name in names[:begun]:
            self.written += PHASES[name].writes(self.config)
        kept = {name: tensor for name, tensor in snapshot.tensors.items() if name.startswith(WORKSHOP)}
        self.studio.workshop.take({name.removeprefix(WORKSHOP): tensor for name, tensor in kept.items()})
        for name in names[:begun]:
            if name == "stage1":
                self.studio.workshop.fresh = True
        return begun

    def run(self, snapshot: Snapshot | None) -> None:
        """Runs the phases, from the beginning or from a snapshot."""
        names = phases_of(self.stage, self.config)
        begun = 0
        if snapshot is not None:
            begun = self.go_on(snapshot, names)
        self.journal.restart(None if snapshot is None else snapshot.facts["journal"])
        shared = Run(
            self.accelerator,
            self.journal,
            self.snapshots,
            self.config.loop.snapshot_every,
            self.remember,
            self.config.loop.log_every,
            self.progress,
            self.say,
        )
        for number, name in enumerate(names):
            phase_config = getattr(self.config, name)
            if number < begun:
                continue
            start = time.monotonic()
            phase = PHASES[name].make(self.studio)
            done = sum(getattr(self.config, earlier).steps for earlier in names[:number])
            within = snapshot if snapshot is not None and number == begun and snapshot.facts["step"] else None
            run_phase(shared, phase, done, within)
            PHASES[name].leave(self.studio)
            broken = self.studio.broken()
            self.studio.close()
            self._note(name, phase_config.steps, time.monotonic() - start)
            if broken:
                self.figures[name]["broken"] = {
                    "samples": len(broken),
                    "first": dict(list(broken.items())[:3]),
                }
                self.say(f"{name}: {len(broken)} samples are broken and were skipped")
            self.written += PHASES[name].writes(self.config)
            if number + 1 < len(names) and self.accelerator.is_main_process:
                kept = self.remember()
                facts = {**kept.facts, "phase": names[number + 1], "step": 0}
                self.snapshots.write(done + phase_config.steps, Snapshot(kept.tensors, facts))

    def _note(self, name: str, steps: int, seconds: float) -> None:
        """The figures of a phase: the loss is the mean of the last twentieth of its log."""
        lines = [line for line in self.journal.lines if line["phase"] == name]
        last = lines[-max(1, len(lines) // 20) :]
        keys = last[-1]["losses"]
        self.figures[name] = {
            "steps": steps,
            "final_loss": round(sum(line["loss"] for line in last) / len(last), 5),
            "losses": {key: round(sum(line["losses"][key] for line in last) / len(last), 5) for key in keys},
            "seconds": round(seconds, 1),
        }


def train(
    stage: str,
    config_path: str | Path,
    out_dir: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    log: Callable[[str], None] | None = None,
    progress: ProgressCallback | None = None,
    evaluation_scenes: int = 1000,
) -> dict[str, Any]:
    """Trains by a recipe and writes a checkpoint that transformers loads.

    What a stage needs and the recipe names no checkpoint for runs before it. The directory appears at the end, whole,
    or not at all. Until then log and snapshots are beside it; a run that goes on from there ends with the same bits.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config_path: The recipe, TOML or JSON.
        out_dir: The checkpoint directory to make.
        resume: Go on from the last snapshot even if the recipe has changed. An unchanged one goes on by itself.
        force: Replace `out_dir` where it exists, and begin anew.
        log: Takes a line now and then.
        progress: Called with (phase, steps done, steps).
        evaluation_scenes: Held-out scenes that a captioner of scenes is scored on; 0: none.

    Returns:
        The record, also saved as `training.json`: losses of each phase, scores, hash of the recipe, machine.

    Raises:
        ConfigError: The recipe is wrong, or not that of the run that is there.
        OutputError: `out_dir` exists, or cannot be written.
        DataError, CheckpointError: A loss is not finite; data or a checkpoint cannot be read.
    """
    config = load_config(config_path)
    target = Path(out_dir)
    phases_of(stage, config)  # refuses a stage without steps
    if target.exists() and not force:
        raise OutputError(
            f"{target} exists already",
            f"give another directory, or replace it with {option('force', on=True)}",
        )
    torch.set_num_threads(config.threads)
    accelerator = _accelerator(config)
    first = accelerator.is_main_process
    snapshots = Snapshots(target.with_name(f"{target.name}{RUN}"))
    snapshot = _begin(snapshots, stage, config, resume=resume, force=force, first=first)
    accelerator.wait_for_everyone()
    journal = Journal(snapshots.directory if first else None, tensorboard=config.loop.tensorboard)
    studio = _studio(stage, config, Path(config_path).resolve().parent, accelerator)
    told = (log or _silent, progress) if first else (_silent, None)
    session = _Session(stage, config, accelerator, studio, journal, snapshots, *told)
    start, clock = time.monotonic(), time.process_time()
    with contextlib.closing(studio), contextlib.closing(journal):
        session.run(snapshot)
    record = _record(session, config_path, time.monotonic() - start, time.process_time() - clock)
    if first:
        _publish(session, target, record, evaluation_scenes)
        snapshots.clear()
    accelerator.wait_for_everyone()
    return record


def _studio(stage: str, config: TrainingConfig, base: Path, accelerator: Accelerator) -> Studio:
    """The parts of a run, and what its phases are made with."""
    torch.manual_seed(config.seed)
    workshop = build(stage, config, base)
    return Studio(config, workshop, accelerator, base, partial(first_stage, config=config, base=base))


def _accelerator(config: TrainingConfig) -> Accelerator:
    """Device, arithmetic and processes.

    Raises:
        ConfigError: The arithmetic is not possible here.
    """
    wanted = AUTOCAST[config.loop.autocast]
    try:
        # Without a device, accelerate takes several processes for one unless it is told to stay on the CPU.
        return Accelerator(mixed_precision=wanted, cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise ConfigError(
            f"[loop] autocast = {config.loop.autocast!r} is not possible here: {error}",
            "float32 and bfloat16 work on a CPU; one process trains in one arithmetic",
        ) from error


def _begin(
    snapshots: Snapshots, stage: str, config: TrainingConfig, *, resume: bool, force: bool, first: bool
) -> Snapshot | None:
    """The snapshot to go on from; None to begin anew.

    Raises:
        ConfigError: There is one of another recipe or stage, or none where one is asked for.
    """
    if force and not resume:
        if first:
            snapshots.clear()
        return None
    snapshot = snapshots.newest()
    if snapshot is None:
        if resume:
            raise ConfigError(
                f"{option('resume', on=True)}: there is no snapshot in {snapshots.directory}",
                f"leave {option('resume', on=True)} out",
            )
        return None
    if snapshot.facts["stage"] != stage:
        raise ConfigError(
            f"{snapshots.directory} holds a run of {snapshot.facts['stage']}, and this is {stage}",
            f"give another output directory, or begin anew with {option('force', on=True)}",
        )
    if snapshot.facts["recipe"] != config_hash(config) and not resume:
        raise ConfigError(
            f"{snapshots.directory} holds a run of another recipe",
            f"go on with {option('resume', on=True)} all the same, or begin anew with {option('force', on=True)}",
        )
    return snapshot


def _record(session: _Session, config_path: str | Path, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """What `training.json` tells, the scores aside."""
    config = session.config
    return {
        "stage": session.stage,
        "config": Path(config_path).name,
        "config_sha256": config_hash(config),
        "seed": config.seed,
        "phases": session.figures,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "parameters": sum(parameter.numel() for parameter in session.studio.workshop.model.parameters()),
        "versions": {
            "blip2edge": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
        },
        "machine": {
            "processor": platform.machine(),
            "system": platform.system(),
            "device": session.accelerator.device.type,
            "processes": session.accelerator.num_processes,
            "threads": config.threads,
        },
    }


def _publish(session: _Session, target: Path, record: dict[str, Any], evaluation_scenes: int) -> None:
    """Writes a temporary sibling, scores what was written, and renames it to `target`."""
    beside = session.snapshots.directory
    config, workshop = session.config, session.studio.workshop
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as temporary:
            fresh = Path(temporary) / "checkpoint"
            fresh.mkdir()
            if session.stage == "stage1" and session.studio.stage1 is not None:
                write_stage1(workshop, session.studio.stage1, fresh)
            else:
                workshop.write(fresh, config.weights_dtype)
                if (
                    evaluation_scenes
                    and config.data.kind == "scenes"
                    and workshop.model.config.family == "blip-2"
                ):
                    scores = evaluate_scenes(open_answerer(fresh, JudgeOptions()), evaluation_scenes)
                    record["heldout"] = scores
                    session.say(f"heldout: exact match {scores['exact_match']:.4f}")
            (fresh / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.copyfile(beside / LOG, fresh / LOG)
            if (beside / BOARD).is_dir():
                shutil.copytree(beside / BOARD, fresh / BOARD)
            draw_curve(session.journal.lines, fresh / CURVE)
            _swap(fresh, target, Path(temporary) / "old")
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"cannot write {target}: {reason}", "give a directory on a disk with room"
        ) from error


def _swap(fresh: Path, target: Path, old: Path) -> None:
    """Puts `fresh` in the place of `target`; when that fails or is interrupted, what was there comes back."""
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
