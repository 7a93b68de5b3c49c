"""The training loop, the same for every phase.

A phase consists of the module to train, the batches and the optimiser settings. The loop makes the optimiser steps,
writes the log and writes snapshots; an interrupted run resumes from the newest snapshot and ends with the same weights.
`accelerate` selects the device and the arithmetic, and connects the processes that `accelerate launch` or `torchrun`
started. A run with one process needs no process group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from blip2edge.errors import ConfigError, DataError, one_line, option
from blip2edge.training.loop import phase_state
from blip2edge.training.loop.averaging import Averages
from blip2edge.training.loop.journal import LINES
from blip2edge.training.loop.optim import learning_rate, make_optimizer, set_rate
from blip2edge.training.loop.sharding import Sharding, clip_gradients, shard, views_allowed
from blip2edge.training.loop.snapshots import Snapshot
from blip2edge.training.loop.training_run import TrainingRun
from blip2edge.training.loop.validation import Validation
from blip2edge.training.phase_config import OptimizerConfig

Batch_co = TypeVar("Batch_co", covariant=True)
_NAMED = 3  # samples named in a message


class PhaseBatch(Protocol):
    """Interface of a batch: the values that the training loop needs."""

    @property
    def sample_ids(self) -> Sequence[str]:
        """Returns the names of the batch's samples on this process."""

    @property
    def weight(self) -> int:
        """Returns the batch's weight in the mean loss of a step: number of rows, or of tokens with a loss."""


class Batches(Protocol[Batch_co]):
    """An endless series of batches that can be continued from a saved position."""

    def __next__(self) -> Batch_co:
        """Returns this process' rows of the next batch, on the device of the process."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next batch, as JSON values that are equal on every process."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the position that `state_dict` returned."""


@dataclass
class Phase:
    """One phase of a training run.

    Attributes:
        name: Name of the phase in log, messages and snapshots.
        module: Maps a batch to losses by name. If there is a loss named "loss", it is minimised, else the sum of all
            losses. Parameters with `requires_grad` are trained. Call the module itself, not its submodules: with
            several processes the module is wrapped.
        batches: The training data.
        config: Steps, learning rates and clipping.
        seed: Seed of dropout and of drawn negatives.
        gauges: Function that returns values to log in addition to the losses.
        validation: Scores the model during the phase; None for no validation.
        before_step: Called before each step, on every process, with the number of the step.
        frozen: Frozen modules outside of `module` that make the batches; their parameters are sharded too.
        rate_of: Function from the name of a parameter of the module to the factor on its learning rate.
    """

    name: str
    module: nn.Module
    batches: Batches[Any]
    config: OptimizerConfig
    seed: int = 0
    gauges: Callable[[], Mapping[str, float]] = field(default=dict)
    validation: Validation | None = None
    before_step: Callable[[int], None] = lambda step: None
    rate_of: Callable[[str], float] = lambda name: 1.0
    frozen: Sequence[nn.Module] = ()


@dataclass
class _PreparedPhase:
    """A phase, with its module and optimizer prepared for this run's device and processes.

    Attributes:
        run: The training run that the phase belongs to.
        phase: The phase.
        module: The phase's module as returned by `accelerator.prepare`.
        optimizer: The optimizer from `accelerator.prepare`.
        averages: Averages of the trained weights; None without `ema_decay`.
        sharding: The modules whose parameters are spread over the processes; None without `fsdp`.
    """

    run: TrainingRun
    phase: Phase
    module: nn.Module
    optimizer: Any
    averages: Averages | None
    sharding: Sharding | None

    def averaged(self, where: str) -> bool:
        """Returns whether the recipe uses the averaged weights in `where`: "validation" or "checkpoint"."""
        return self.averages is not None and self.run.config.loop.ema_weights in ("everywhere", where)


def run_phase(run: TrainingRun, phase: Phase, done: int, snapshot: Snapshot | None = None) -> None:
    """Trains the module of a phase: makes all its optimiser steps.

    Args:
        run: The run that the phase belongs to.
        phase: The phase; its module is trained in place.
        done: Number of steps of all phases before this one.
        snapshot: A snapshot of this phase to resume from; None to start the phase.

    Raises:
        DataError: A loss is not finite. The error names step and samples; the last snapshot is kept.
        ConfigError: The memory of the device is too small for a step.
        OutputError: A snapshot or the log cannot be written.
    """
    with _memory_told(run, phase):
        prepared = _prepare(run, phase)
        with views_allowed() if prepared.sharding is not None else nullcontext():
            _make_steps(prepared, done, snapshot)
        _finish(prepared)


@contextmanager
def _memory_told(run: TrainingRun, phase: Phase) -> Iterator[None]:
    """Turns the errors of a failed allocation in a ``with`` block into a ConfigError that names the recipe's keys."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)):
            raise
        raise ConfigError(
            f"{phase.name}: memory ran out ({one_line(error)}); [{phase.name}] batch_size is {phase.config.batch_size}",
            f"lower batch_size and raise accumulate{_continue(run)}",
        ) from error


def _make_steps(prepared: _PreparedPhase, done: int, snapshot: Snapshot | None) -> None:
    """Makes the optimiser steps of a phase, with validations, log lines and snapshots.

    Args:
        prepared: The phase, prepared for this run's device and processes.
        done: Number of steps of all phases before this one.
        snapshot: A snapshot of this phase to resume from; None to start the phase.
    """
    run, phase = prepared.run, prepared.phase
    first = _restore(prepared, snapshot)
    run.journal.begin(done, run.clock.phase_seconds)
    config, loop, validation = phase.config, run.config.loop, phase.validation
    log_every = loop.log_every or max(1, config.steps // LINES)
    for step in range(first, config.steps):
        rate = learning_rate(step, config)
        set_rate(prepared.optimizer, rate)
        phase.before_step(step)
        run.journal.add(_step(prepared, step))
        finished = step + 1
        scores = _validate(prepared, finished)
        if finished % log_every == 0 or finished == config.steps or scores:
            line = run.journal.write(phase.name, finished, rate, phase.gauges(), scores)
            run.log(f"{phase.name}: step {finished}/{config.steps} loss {line['loss']:.4f} rate {rate:.1e}")
        if validation is not None and scores:
            best = "best so far" if validation.best_step == finished else f"best at step {validation.best_step}"
            run.log(f"{phase.name}: step {finished} {validation.metric} {scores[validation.metric]:.4f} ({best})")
        stops = validation is not None and validation.exhausted
        if run.progress is not None:  # a phase that stops early is complete, or its bar would wait for the other steps
            run.progress(phase.name, finished, finished if stops else config.steps)
        if finished % loop.snapshot_every == 0 and finished < config.steps and not stops:
            _save(prepared, finished, done)
        if validation is not None and stops:
            patience = validation.config.patience
            last = "last validation" if patience == 1 else f"last {patience} validations"
            run.log(f"{phase.name}: stops at step {finished}; the {last} brought no better score")
            break


def _prepare(run: TrainingRun, phase: Phase) -> _PreparedPhase:
    """Prepares module and optimizer for this run's device, arithmetic and processes."""
    sharding = shard(run.accelerator, (phase.module, *phase.frozen)) if run.config.loop.fsdp else None
    optimizer = make_optimizer([phase.module], phase.config, phase.rate_of)
    if sharding is None:
        module, optimizer = run.accelerator.prepare(phase.module, optimizer)
    else:
        module, optimizer = phase.module, run.accelerator.prepare(optimizer)
    decay = run.config.loop.ema_decay
    return _PreparedPhase(run, phase, module, optimizer, Averages(phase.module, decay) if decay else None, sharding)


def _restore(prepared: _PreparedPhase, snapshot: Snapshot | None) -> int:
    """Continues from a snapshot, or seeds the phase if there is none. Returns the number of steps done."""
    phase, accelerator = prepared.phase, prepared.run.accelerator
    if snapshot is None:
        torch.manual_seed(phase.seed * accelerator.num_processes + accelerator.process_index)
        return 0
    if phase.validation is not None:
        phase.validation.restore(snapshot)
    phase_state.restore(accelerator, prepared.module, prepared.optimizer, snapshot)
    if prepared.averages is not None:
        prepared.averages.restore(snapshot)
    phase.batches.load_state_dict(snapshot.facts["batches"])
    return int(snapshot.facts["step"])


def _validate(prepared: _PreparedPhase, finished: int) -> dict[str, float]:
    """Scores the model after a step; returns the scores by name, or no scores if no validation is due."""
    phase, validation = prepared.phase, prepared.phase.validation
    if validation is None or not validation.due(finished, phase.config.steps):
        return {}
    averages = prepared.averages if prepared.averaged("validation") else None
    with nullcontext() if averages is None else averages.applied():
        return validation.run(finished, phase.module)


def _finish(prepared: _PreparedPhase) -> None:
    """Ends a phase: puts the weights that the checkpoint gets into the phase's module, on all processes.

    They are the averaged weights or those of the best validation, if the recipe says so, else those of the last step.
    Shards are gathered.
    """
    phase, accelerator = prepared.phase, prepared.run.accelerator
    if prepared.averages is not None and prepared.averaged("checkpoint"):
        prepared.averages.exchange()
    if prepared.sharding is not None:
        prepared.sharding.undo()
    phase_state.gather_parameters(accelerator, prepared.module, phase.module)
    accelerator.free_memory()
    if phase.validation is not None:
        phase.validation.finish(phase.module)


def _step(prepared: _PreparedPhase, step: int) -> dict[str, float]:
    """Makes one optimiser step. Returns the mean losses of the step and the gradient's norm."""
    phase, module, accelerator = prepared.phase, prepared.module, prepared.run.accelerator
    config = phase.config
    batches = [next(phase.batches) for _ in range(config.accumulate)]
    shares = _shares(accelerator, [batch.weight for batch in batches])
    values: dict[str, float] = {}
    for number, (batch, share) in enumerate(zip(batches, shares, strict=True), 1):
        last = number == len(batches)
        with nullcontext() if last or prepared.sharding is not None else accelerator.no_sync(module):
            losses, total = _losses(prepared, batch)
            accelerator.backward(total if share == 1.0 else total * share)
        for name, loss in {"loss": total, **losses}.items():
            values[name] = values.get(name, 0.0) + share * float(loss.detach())
    values = _over_processes(accelerator, values)
    values["grad_norm"] = _clip(prepared)
    # With a scaled loss (float16), a step whose gradients overflow is skipped and the scale is lowered.
    scaled = accelerator.scaler is not None
    wrong = [
        name for name, value in values.items() if not math.isfinite(value) and not (scaled and name == "grad_norm")
    ]
    if wrong:
        raise _not_finite(prepared.run, phase, batches, step, f"{wrong[0]} is {values[wrong[0]]}")
    if scaled and not math.isfinite(values["grad_norm"]):
        values["grad_norm"] = 0.0
    prepared.optimizer.step()
    prepared.optimizer.zero_grad(set_to_none=True)
    if prepared.averages is not None and not prepared.optimizer.step_was_skipped:
        prepared.averages.update()
    return values


def _losses(prepared: _PreparedPhase, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Runs the module on a batch. Returns the batch's losses by name, and the loss to minimise."""
    # accelerate's wrapper of a module begins autocast itself; sharded parameters have no wrapper.
    with nullcontext() if prepared.sharding is None else prepared.run.accelerator.autocast():
        losses: dict[str, Tensor] = dict(prepared.module(batch))
    total = losses.pop("loss", None)
    return losses, torch.stack(list(losses.values())).sum() if total is None else total


def _clip(prepared: _PreparedPhase) -> float:
    """Clips the gradients; returns the norm that they had before."""
    largest = prepared.phase.config.clip_norm
    if prepared.sharding is not None:
        prepared.sharding.sync_scalars()
        return clip_gradients(prepared.module, largest)
    norm = prepared.run.accelerator.clip_grad_norm_(prepared.module.parameters(), largest)
    return float(norm) if norm is not None else 0.0


def _shares(accelerator: Accelerator, weights: Sequence[int]) -> list[float]:
    """Returns the weight of each batch in the gradient of a step, equal on all processes; the weights sum to 1."""
    if len(weights) == 1:
        return [1.0]
    counts = torch.tensor(weights, dtype=torch.float64)
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").cpu().double()
    return (counts / counts.sum().clamp(min=1)).tolist()


def _over_processes(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """Returns the mean of each value over all processes, so that all processes have equal values and stop together."""
    if accelerator.num_processes == 1:
        return values
    means = accelerator.reduce(torch.tensor(list(values.values()), device=accelerator.device), "mean")
    return dict(zip(values, means.tolist(), strict=True))


def _not_finite(run: TrainingRun, phase: Phase, batches: Sequence[PhaseBatch], step: int, what: str) -> DataError:
    """Returns the error for a step whose losses are not finite; it names the step and the samples."""
    names = [name for batch in batches for name in batch.sample_ids]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    samples = f" on the samples {', '.join(names[:_NAMED])}{more}" if names else ""
    fix = f"lower the learning rate of this phase, or raise its warmup_steps{_continue(run)}"
    return DataError(f"{phase.name}: at step {step + 1}{samples} the {what}, expected a finite number", fix)


def _continue(run: TrainingRun) -> str:
    """Returns the end of an error's advice: how to continue from the last snapshot; empty if there is no snapshot."""
    if run.snapshots.steps is None:
        return ""
    return f", and continue from {run.snapshots.directory} with {option('resume', on=True)}"


def _save(prepared: _PreparedPhase, step: int, done: int) -> None:
    """Writes a snapshot within a phase. All processes gather the tensors; the first process writes the snapshot."""
    run, phase = prepared.run, prepared.phase
    tensors = phase_state.capture(run.accelerator, prepared.module, prepared.optimizer)
    facts: dict[str, Any] = {}
    for part in (phase.validation, prepared.averages):
        if part is not None:
            own, known = part.state()
            tensors, facts = tensors | own, facts | known
    position = phase.batches.state_dict()
    first = run.accelerator.is_main_process
    if first or prepared.sharding is not None:  # sharded tensors of finished phases are gathered
        kept = run.snapshot(phase=phase.name, step=step, batches=position, **facts)
        if first:
            run.snapshots.write(done + step, Snapshot({**kept.tensors, **tensors}, kept.facts))
    run.accelerator.wait_for_everyone()
