"""The training loop, the same for every phase.

A phase names the module, the batches and the optimiser settings. The loop makes the optimiser steps, writes the log
and writes snapshots; an interrupted run resumes from the newest snapshot and ends with the same weights. `accelerate`
provides the device, the arithmetic and, under `accelerate launch` or `torchrun`, the other processes. One process
needs no process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blip2edge.errors import DataError, option
from blip2edge.training.loop import phase_state
from blip2edge.training.loop.journal import LINES
from blip2edge.training.loop.optim import learning_rate, make_optimizer
from blip2edge.training.loop.snapshots import Snapshot
from blip2edge.training.loop.training_run import TrainingRun
from blip2edge.training.loop.validation import Validation
from blip2edge.training.phase_config import OptimizerConfig

Batch_co = TypeVar("Batch_co", covariant=True)
_NAMED = 3  # samples named in a message


class PhaseBatch(Protocol):
    """What the training loop needs from a batch."""

    @property
    def sample_ids(self) -> Sequence[str]:
        """Names of the batch's samples on this process."""

    @property
    def weight(self) -> int:
        """Weight of this batch in the mean loss of a step: number of its rows, or of the tokens that give loss."""


class Batches(Protocol[Batch_co]):
    """An endless series of batches that can be continued from a saved position."""

    def __next__(self) -> Batch_co:
        """This process' rows of the next batch, on its device."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next batch, as JSON values; the same on every process."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the position that `state_dict` returned."""


@dataclass
class Phase:
    """One phase of a training run.

    Attributes:
        name: Name of the phase in log, messages and snapshots.
        module: Maps a batch to losses by name. The loss "loss" is minimised if there is one, else the sum of all.
            Parameters with `requires_grad` are trained. Call the module itself, not its parts: with several
            processes the module is wrapped.
        batches: The training data.
        config: Steps, learning rates and clipping.
        seed: Seed of dropout and of drawn negatives.
        gauges: Returns values to log in addition to the losses.
        validation: Scores the model during the phase; None for no validation.
        before_step: Called with the number of a step before it is made, on every process.
    """

    name: str
    module: nn.Module
    batches: Batches[Any]
    config: OptimizerConfig
    seed: int = 0
    gauges: Callable[[], Mapping[str, float]] = field(default=dict)
    validation: Validation | None = None
    before_step: Callable[[int], None] = lambda step: None


def run_phase(run: TrainingRun, phase: Phase, done: int, snapshot: Snapshot | None = None) -> None:
    """Trains the module of a phase: makes all its optimiser steps.

    Args:
        run: The run that the phase belongs to.
        phase: The phase; its module is trained in place.
        done: Number of steps of all phases before this one.
        snapshot: A snapshot of this phase to resume from; None to start the phase.

    Raises:
        DataError: A loss is not finite. The error names step and samples; the last snapshot is kept.
        OutputError: A snapshot or the log cannot be written.
    """
    accelerator, config = run.accelerator, phase.config
    optimizer = make_optimizer([phase.module], config)
    module, optimizer = accelerator.prepare(phase.module, optimizer)
    first = 0
    validation = phase.validation
    if validation is not None:
        validation.check(module)
    if snapshot is not None:
        if validation is not None:
            validation.restore(snapshot)
        first = int(snapshot.facts["step"])
        phase_state.restore(accelerator, module, optimizer, snapshot)
        phase.batches.load_state_dict(snapshot.facts["batches"])
    else:
        torch.manual_seed(phase.seed * accelerator.num_processes + accelerator.process_index)
    run.journal.begin()
    loop = run.config.loop
    log_every = loop.log_every or max(1, config.steps // LINES)
    for step in range(first, config.steps):
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        phase.before_step(step)
        run.journal.add(_step(run, phase, module, optimizer, step))
        finished = step + 1
        scores: dict[str, float] = {}
        if validation is not None and validation.due(finished, config.steps):
            scores = validation.run(finished, phase.module)
        if finished % log_every == 0 or finished == config.steps or scores:
            line = run.journal.write(phase.name, finished, rate, phase.gauges(), scores)
            run.log(f"{phase.name}: step {finished}/{config.steps} loss {line['loss']:.4f} rate {rate:.1e}")
        if validation is not None and scores:
            best = "best so far" if validation.best_step == finished else f"best at step {validation.best_step}"
            run.log(f"{phase.name}: step {finished} {validation.metric} {scores[validation.metric]:.4f} ({best})")
        if run.progress is not None:
            run.progress(phase.name, finished, config.steps)
        if finished % loop.snapshot_every == 0 and finished < config.steps:
            _save(run, phase, module, optimizer, finished, done)
        if validation is not None and validation.exhausted:
            run.log(
                f"{phase.name}: stops at step {finished}; the last {validation.config.patience} validations"
                " brought no better score"
            )
            break
    phase_state.gather_parameters(accelerator, module, phase.module)
    accelerator.free_memory()
    if validation is not None:
        validation.finish(phase.module)


def _step(run: TrainingRun, phase: Phase, module: nn.Module, optimizer: Any, step: int) -> dict[str, float]:
    """Makes one optimiser step. Returns its mean losses and the gradient's norm."""
    accelerator, config = run.accelerator, phase.config
    batches = [next(phase.batches) for _ in range(config.accumulate)]
    shares = _shares(accelerator, [batch.weight for batch in batches])
    values: dict[str, float] = {}
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True), 1):
        last = number == len(batches)
        with nullcontext() if last else accelerator.no_sync(module):
            losses: dict[str, Tensor] = dict(module(batch))
            total = losses.pop("loss", None)
            if total is None:
                total = torch.stack(list(losses.values())).sum()
            accelerator.backward(total if share == 1.0 else total * share)
        for name, loss in {"loss": total, **losses}.items():
            values[name] = values.get(name, 0.0) + share * float(loss.detach())
    values = _over_processes(accelerator, values)
    norm = accelerator.clip_grad_norm_(module.parameters(), config.clip_norm)
    values["grad_norm"] = float(norm) if norm is not None else 0.0
    # With a scaled loss (float16), a step whose gradients overflow is skipped and the scale is lowered.
    scaled = accelerator.scaler is not None
    wrong = [
        name for name, value in values.items() if not math.isfinite(value) and not (scaled and name == "grad_norm")
    ]
    if wrong:
        raise _not_finite(run, phase, batches, step, f"{wrong[0]} is {values[wrong[0]]}")
    if scaled and not math.isfinite(values["grad_norm"]):
        values["grad_norm"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def _shares(accelerator: Accelerator, weights: Sequence[int]) -> list[float]:
    """Weights of the batches of one step in its gradient, averaged over all processes; they sum to 1."""
    if len(weights) == 1:
        return [1.0]
    counts = torch.tensor(weights, dtype=torch.float64)
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").cpu().double()
    return (counts / counts.sum().clamp(min=1)).tolist()


def _over_processes(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """Means over the processes, so that all processes have the same values and stop together."""
    if accelerator.num_processes == 1:
        return values
    means = accelerator.reduce(torch.tensor(list(values.values()), device=accelerator.device), "mean")
    return dict(zip(values, means.tolist(), strict=True))


def _not_finite(run: TrainingRun, phase: Phase, batches: Sequence[PhaseBatch], step: int, what: str) -> DataError:
    """The error for a step whose losses are not finite."""
    names = [name for batch in batches for name in batch.sample_ids]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    samples = f" on the samples {', '.join(names[:_NAMED])}{more}" if names else ""
    fix = "lower the learning rate of this phase, or raise its warmup_steps"
    if run.snapshots.steps is not None:
        fix += f", and continue from {run.snapshots.directory} with {option('resume', on=True)}"
    return DataError(f"{phase.name}: at step {step}{samples} the {what}, expected a finite number", fix)


def _save(run: TrainingRun, phase: Phase, module: nn.Module, optimizer: Any, step: int, done: int) -> None:
    """Writes a snapshot within a phase. All processes gather the tensors, the first one writes."""
    accelerator = run.accelerator
    tensors = phase_state.capture(accelerator, module, optimizer)
    facts: dict[str, Any] = {}
    if phase.validation is not None:
        best, facts = phase.validation.state()
        tensors |= best
    position = phase.batches.state_dict()
    if accelerator.is_main_process:
        kept = run.snapshot(phase=phase.name, step=step, batches=position, **facts)
        run.snapshots.write(done + step, Snapshot({**kept.tensors, **tensors}, kept.facts))
    accelerator.wait_for_everyone()
