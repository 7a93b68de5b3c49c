"""The data of one training run that all its phases use: the recipe, the model, the log and the snapshots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from blip2edge.progress import ProgressCallback
from blip2edge.training.config import TrainingConfig, config_hash
from blip2edge.training.evaluation.validation import ValidationData
from blip2edge.training.loading.loader import Loader
from blip2edge.training.loop.journal import Journal
from blip2edge.training.loop.snapshots import Snapshot, Snapshots
from blip2edge.training.phases.stage1 import Stage1Model
from blip2edge.training.setup.model_parts import ModelParts

MODEL_PREFIX = "workshop."
"""Prefix of the names of the model's tensors in a snapshot. It must not change, because older snapshots have it."""


class Clock:
    """Measures the time of a run and of its current phase, including the time before the run was resumed.

    A resumed run repeats the steps that were made after the snapshot. Only their second time is counted.
    """

    def __init__(self) -> None:
        self._began = self._phase_began = time.monotonic()
        self._cpu_began = time.process_time()
        self._before = self._cpu_before = 0.0

    @property
    def seconds(self) -> float:
        """Returns the seconds of the run, including the time before it was resumed."""
        return self._before + time.monotonic() - self._began

    @property
    def cpu_seconds(self) -> float:
        """Returns the CPU seconds of this process, including the time before the run was resumed."""
        return self._cpu_before + time.process_time() - self._cpu_began

    @property
    def phase_seconds(self) -> float:
        """Returns the seconds of the current phase, including the time before the run was resumed."""
        return time.monotonic() - self._phase_began

    def begin_phase(self, before: float = 0.0) -> None:
        """Begins a phase, or continues it after its first `before` seconds."""
        self._phase_began = time.monotonic() - before

    def state(self) -> dict[str, float]:
        """Returns the three times for a snapshot."""
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "phase_seconds": self.phase_seconds}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Adds the times that a snapshot stores; a snapshot of an older version of blip2edge stores none."""
        self._before, self._cpu_before = (float(state.get(name, 0.0)) for name in ("seconds", "cpu_seconds"))


@dataclass
class TrainingRun:
    """The data that all phases of a run share.

    Attributes:
        stage: "stage1", "stage2" or "instruct".
        config: The recipe.
        base: Directory of the recipe; its relative paths start there.
        accelerator: Device, arithmetic and processes.
        parts: The captioner and the other files of its checkpoint.
        journal: The log.
        snapshots: The snapshots of this run.
        log: Receives status lines.
        progress: Called with (phase, steps done, number of all steps).
        figures: Losses and seconds of each finished phase.
        changed: Prefixes of the captioner's parameters that finished phases changed.
        stage1: The model of stage 1; None before stage 1 begins.
        loaders: Open loaders of the current phase.
        validation: The held-out data of the validations; None without validation.
        clock: Measures the time of the run.
    """

    stage: str
    config: TrainingConfig
    base: Path
    accelerator: Accelerator
    parts: ModelParts
    journal: Journal
    snapshots: Snapshots
    log: Callable[[str], None] = lambda _: None
    progress: ProgressCallback | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    stage1: Stage1Model | None = None
    loaders: list[Loader] = field(default_factory=list)
    validation: ValidationData | None = None
    clock: Clock = field(default_factory=Clock)

    def snapshot(self, **facts: Any) -> Snapshot:
        """Makes a snapshot with the results of the finished phases; the loop adds the state of the current phase.

        Args:
            **facts: Further entries of `state.json`, such as the current phase and step.
        """
        tensors = self.parts.tensors(self.changed)
        shared = {
            "stage": self.stage,
            "recipe": config_hash(self.config),
            "figures": self.figures,
            "journal": self.journal.state(),
            "processes": self.accelerator.num_processes,
            **self.clock.state(),
        }
        return Snapshot({f"{MODEL_PREFIX}{name}": tensor for name, tensor in tensors.items()}, shared | facts)

    def restore(self, snapshot: Snapshot) -> None:
        """Restores the losses, times and model tensors of the finished phases from a snapshot."""
        self.figures = dict(snapshot.facts["figures"])
        self.clock.restore(snapshot.facts)
        tensors = snapshot.tensors.items()
        kept = {name.removeprefix(MODEL_PREFIX): value for name, value in tensors if name.startswith(MODEL_PREFIX)}
        self.parts.load_tensors(kept)

    def broken(self) -> dict[str, str]:
        """Returns, by sample id, why the current phase skipped a sample."""
        return {name: problem for loader in self.loaders for name, problem in loader.broken.items()}

    def close(self) -> None:
        """Stops the loaders of the current phase."""
        for loader in self.loaders:
            loader.close()
        self.loaders.clear()
