"""Runs a whole training: reads a recipe and writes a checkpoint directory. An interrupted run can be resumed."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from blip2edge import __version__
from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import NEW, locked
from blip2edge.bundle.outputs.names import with_own_name
from blip2edge.bundle.outputs.publishing import check_not_source, check_target, publish
from blip2edge.errors import ConfigError, OutputError, option, plural
from blip2edge.progress import ProgressCallback
from blip2edge.training.config import RECORD_FILE, TrainingConfig, config_hash, in_recipe, load_config
from blip2edge.training.evaluation.models import ModelOptions
from blip2edge.training.evaluation.open_model import open_captioner
from blip2edge.training.evaluation.scene_scores import evaluate_scenes
from blip2edge.training.inputs import check_output_apart
from blip2edge.training.loop.journal import CURVE, LOG, Journal, draw_curve
from blip2edge.training.loop.loop import Phase, run_phase
from blip2edge.training.loop.processes import ended_processes
from blip2edge.training.loop.sharding import check_launcher, check_sharding
from blip2edge.training.loop.snapshots import Snapshot, Snapshots
from blip2edge.training.loop.trackers import BOARD, TrackedRun, Trackers, check_trackers, recipe_values, run_identity
from blip2edge.training.loop.training_run import TrainingRun
from blip2edge.training.phases.registry import PHASES, phases_of
from blip2edge.training.setup.build import write_stage1
from blip2edge.training.setup.planning import plan_training

_RUN_SUFFIX = ".run"  # added to the output's name: the directory of log and snapshots during the run
_AUTOCAST = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}


def snapshots_of(out_dir: str | Path) -> Snapshots:
    """Returns the snapshots of the run that writes ``out_dir``.

    They are in the directory ``OUT.run`` beside the checkpoint directory ``OUT``, until the run has succeeded.
    """
    target = with_own_name(Path(out_dir))
    return Snapshots(target.with_name(f"{target.name}{_RUN_SUFFIX}"))


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
    """Trains a model as a recipe describes, and writes a checkpoint that transformers can load.

    Phases that the stage needs, and for which the recipe names no checkpoint, run first. The directory appears only
    when the run has succeeded, and is then complete. During the run, log and snapshots are in `OUT.run`. A run that
    resumes from a snapshot ends with exactly the weights of a run that was not interrupted.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config_path: The recipe, TOML or JSON.
        out_dir: The checkpoint directory to make.
        resume: Whether to resume from the last snapshot even if the recipe has changed. If the recipe is unchanged,
            the run always resumes.
        force: Whether to replace `out_dir` if it exists and was written by `train`, and to ignore snapshots.
        log: Called with status lines.
        progress: Called with (phase, steps done, number of all steps).
        evaluation_scenes: Number of held-out scenes on which a model trained on scenes is scored; 0: no scoring.

    Returns:
        The record, also saved as `training.json`: losses of each phase, scores, hash of the recipe, machine, and the
        seconds, including the time before the run was resumed.

    Raises:
        ConfigError: The recipe is wrong, the snapshots belong to another recipe or stage, or accelerate's launcher
            divides the model.
        OutputError: `out_dir` exists, contains the recipe or what it reads, or cannot be written; `OUT.run` has only
            files of others.
        ProcessError: Another process of the run has ended.
        DataError, CheckpointError: A loss is not finite; data or a checkpoint cannot be read.
    """
    config = load_config(config_path)
    target = Path(out_dir)
    with in_recipe(config_path):
        phases_of(stage, config)  # refuses a stage without steps
        check_trackers(config.loop.tracker_names)
    check_not_source(target, Path(config_path))
    check_output_apart(target, config, Path(config_path).resolve().parent, stage)
    check_target(target, force, RECORD_FILE)
    snapshots_of(target).check_own()
    check_launcher()
    torch.set_num_threads(config.threads)
    with in_recipe(config_path):
        accelerator = _accelerator(config)
        if config.loop.fsdp:
            check_sharding(accelerator)
    first = accelerator.is_main_process
    with locked(target) if first else contextlib.nullcontext(target) as part:
        check_target(target, force, RECORD_FILE)
        options = _Options(config_path, target, part, resume, force, evaluation_scenes)
        with ended_processes(accelerator, snapshots_of(target)):
            return _train(stage, config, accelerator, options, log, progress)


@dataclass(frozen=True)
class _Options:
    """The arguments of :func:`train`, and the directories of the checkpoint.

    The checkpoint is written into ``part``, a temporary directory. When it is complete, it is moved to ``target``.
    """

    config_path: str | Path
    target: Path
    part: Path
    resume: bool
    force: bool
    evaluation_scenes: int


def _train(
    stage: str,
    config: TrainingConfig,
    accelerator: Accelerator,
    options: _Options,
    log: Callable[[str], None] | None,
    progress: ProgressCallback | None,
) -> dict[str, Any]:
    """Runs the phases and publishes the checkpoint; returns the record of the run."""
    first, target, config_path = accelerator.is_main_process, options.target, options.config_path
    snapshots = snapshots_of(target)
    snapshot = _snapshot_to_resume(snapshots, stage, config, resume=options.resume, force=options.force, first=first)
    accelerator.wait_for_everyone()
    status = (log if first else None) or (lambda _: None)
    base = Path(config_path).resolve().parent
    torch.manual_seed(config.seed)
    with in_recipe(config_path):
        planned = plan_training(stage, config, base, accelerator, phases_of(stage, config), status)
    parts = planned.parts.build()
    # The trackers begin last: a recipe that is refused leaves no run open in them.
    journal = _journal(config, target, snapshots, status, resumed=snapshot is not None) if first else Journal(None)
    run = TrainingRun(stage, config, base, accelerator, parts, journal, snapshots, status, progress if first else None)
    run.validation = planned.validation
    with contextlib.closing(run), contextlib.closing(journal):
        if snapshot is not None:
            run.log(f"resumes from the snapshot of {snapshots.position} in {snapshots.directory}")
        _run_phases(run, snapshot)
    record = _record(run, config_path)
    if first:
        _publish(run, options, record)
        snapshots.clear()
    accelerator.wait_for_everyone()
    return record


def _journal(
    config: TrainingConfig, target: Path, snapshots: Snapshots, log: Callable[[str], None], *, resumed: bool
) -> Journal:
    """Makes the log of the run with its trackers; called in the first process only.

    Raises:
        ConfigError: A tracker cannot be started.
        OutputError: The directory of the run is not writable.
    """
    names, loop = config.loop.tracker_names, config.loop
    if not names:
        return Journal(snapshots.directory)
    identity = run_identity(snapshots.directory, resumed=resumed)
    first_step = (snapshots.steps or 0) if resumed else 0
    tracked = TrackedRun(snapshots.directory, loop.tracker_project, target.name, identity, first_step)
    return Journal(snapshots.directory, Trackers(names, tracked, recipe_values(config), log))


def _first_phase(run: TrainingRun, snapshot: Snapshot, names: list[str]) -> int:
    """Restores the finished phases of a snapshot. Returns the number of the phase to resume in.

    Raises:
        ConfigError: The recipe no longer has the phase of the snapshot.
    """
    phase = snapshot.facts["phase"]
    if phase not in names:
        raise ConfigError(
            f"the snapshot is of the phase {phase}, but this recipe has only {', '.join(names)}",
            f"resume with the recipe of the snapshot, or start again with {option('force', on=True)}",
        )
    run.restore(snapshot)
    first = names.index(phase)
    for name in names[:first]:
        run.changed += PHASES[name].changes(run.config)
    return first


def _run_phases(run: TrainingRun, snapshot: Snapshot | None) -> None:
    """Runs all phases, from the beginning or from a snapshot."""
    names = phases_of(run.stage, run.config)
    first = 0 if snapshot is None else _first_phase(run, snapshot, names)
    run.journal.restart(None if snapshot is None else snapshot.facts["journal"])
    for number, name in enumerate(names[first:], first):
        within = snapshot if snapshot is not None and number == first and snapshot.facts["step"] else None
        run.clock.begin_phase(0.0 if within is None else within.facts.get("phase_seconds", 0.0))
        phase = PHASES[name].make(run)
        done = sum(getattr(run.config, earlier).steps for earlier in names[:number])
        run_phase(run, phase, done, within)
        PHASES[name].finish(run)
        broken = run.broken()
        run.close()
        run.figures[name] = _phase_figures(run, phase, run.clock.phase_seconds)
        if broken:
            run.figures[name]["broken"] = {"samples": len(broken), "first": dict(list(broken.items())[:3])}
            run.log(f"{name}: skipped {plural(len(broken), 'broken sample')}")
        run.changed += PHASES[name].changes(run.config)
        if number + 1 < len(names) and run.accelerator.is_main_process:
            run.snapshots.write(done + phase.config.steps, run.snapshot(phase=names[number + 1], step=0))


def _phase_figures(run: TrainingRun, phase: Phase, seconds: float) -> dict[str, Any]:
    """Returns the losses and the seconds of a phase, for ``training.json``.

    A loss is the mean over the last twentieth of the phase's lines in the log.
    """
    lines = [line for line in run.journal.lines if line["phase"] == phase.name]
    last = lines[-max(1, len(lines) // 20) :]
    validated = {} if phase.validation is None else {"validation": phase.validation.figures()}
    return {
        "steps": last[-1]["step"],
        "final_loss": round(sum(line["loss"] for line in last) / len(last), 5),
        "losses": {key: round(sum(line["losses"][key] for line in last) / len(last), 5) for key in last[-1]["losses"]},
        "seconds": round(seconds, 1),
        **validated,
    }


def _accelerator(config: TrainingConfig) -> Accelerator:
    """Makes the accelerator, which sets up device, arithmetic and processes.

    Raises:
        ConfigError: The recipe's arithmetic is not available on this machine.
    """
    wanted = _AUTOCAST[config.loop.autocast]
    try:
        # Without an accelerator device, several processes work only with cpu=True.
        return Accelerator(mixed_precision=wanted, cpu=not torch.accelerator.is_available())
    except ValueError as error:
        raise ConfigError(
            f"[loop] autocast = {config.loop.autocast!r} is not available here: {error}",
            "set autocast to float32 or bfloat16, which work on a CPU; all runs of one process need the same autocast",
        ) from error


def _snapshot_to_resume(
    snapshots: Snapshots, stage: str, config: TrainingConfig, *, resume: bool, force: bool, first: bool
) -> Snapshot | None:
    """Returns the snapshot to resume from; None to start from the beginning.

    Raises:
        ConfigError: The snapshot belongs to another recipe or stage, or `resume` is set and there is no snapshot.
    """
    if force and not resume:
        if first:
            snapshots.clear()
        return None
    if first:
        snapshots.remove_incomplete()
    snapshot = snapshots.newest()
    if snapshot is None:
        if resume:
            raise ConfigError(
                f"{option('resume', on=True)}: there is no snapshot in {snapshots.directory}",
                f"run without {option('resume', on=True)}",
            )
        return None
    if snapshot.facts["stage"] != stage:
        raise ConfigError(
            f"{snapshots.directory} holds a run of {snapshot.facts['stage']}, but this run is {stage}",
            f"give another output directory, or start again with {option('force', on=True)}",
        )
    if snapshot.facts["recipe"] != config_hash(config) and not resume:
        raise ConfigError(
            f"{snapshots.directory} holds a run of another recipe",
            f"resume the run anyway with {option('resume', on=True)}, or start again with {option('force', on=True)}",
        )
    return snapshot


def _record(run: TrainingRun, config_path: str | Path) -> dict[str, Any]:
    """Returns the content of `training.json`, without the scores."""
    config = run.config
    return {
        "stage": run.stage,
        "config": Path(config_path).name,
        "config_sha256": config_hash(config),
        "seed": config.seed,
        "phases": run.figures,
        "seconds": round(run.clock.seconds, 1),
        "cpu_seconds": round(run.clock.cpu_seconds, 1),
        "parameters": sum(parameter.numel() for parameter in run.parts.model.parameters()),
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
            "device": run.accelerator.device.type,
            "processes": run.accelerator.num_processes,
            "threads": config.threads,
        },
    }


def _publish(run: TrainingRun, options: _Options, record: dict[str, Any]) -> None:
    """Writes the checkpoint to a directory beside the target, scores it there, and renames the directory."""
    beside, target, fresh = run.snapshots.directory, options.target, options.part / NEW
    config, parts = run.config, run.parts
    try:
        fresh.mkdir()
        if run.stage == "stage1" and run.stage1 is not None:
            write_stage1(parts, run.stage1, fresh)
        else:
            parts.write(fresh, config.weights_dtype)
            if options.evaluation_scenes and config.data.only_scenes and parts.model.config.family == "blip-2":
                scores = evaluate_scenes(open_captioner(fresh, ModelOptions()), options.evaluation_scenes)
                record["heldout"] = scores
                run.log(f"heldout: exact match {scores['exact_match']:.4f}")
        (fresh / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        shutil.copyfile(beside / LOG, fresh / LOG)
        if (beside / BOARD).is_dir():
            shutil.copytree(beside / BOARD, fresh / BOARD)
        draw_curve(run.journal.lines, fresh / CURVE)
        if os.path.lexists(target) and not options.force:
            raise OutputError(
                f"{target} appeared while the run was training",
                f"move {target} away and run the command again: the run resumes from its last snapshot",
            )
        publish(fresh, target, replace=options.force, marker=RECORD_FILE)
    except (OSError, SafetensorError) as error:
        raise output_error(target, error, "give a directory on a disk with free space") from error
