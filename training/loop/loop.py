"""One loop for every phase of every recipe.

A phase is data: what is trained, on which batches, how. The loop makes the steps, tells about them, and writes
snapshots from which an interrupted run goes on as if nothing had happened. `accelerate` gives the device, the
arithmetic and, under `accelerate launch` or `torchrun`, the other processes; alone it needs no process group.
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
from blip2edge.progress import ProgressCallback
from blip2edge.training.config import OptimizerConfig
from blip2edge.training.loop import states
from blip2edge.training.loop.journal import LINES, Journal
from blip2edge.training.loop.optim import learning_rate, make_optimizer
from blip2edge.training.loop.snapshots import Snapshot, Snapshots

Batch_co = TypeVar("Batch_co", covariant=True)
NAMED = 3  # samples that a message names


class PhaseBatch(Protocol):
    """What the loop asks of a batch."""

    @property
    def sample_ids(self) -> Sequence[str]:
        """Names of its samples on this process."""

    @property
    def weight(self) -> int:
        """Its share when the gradients of several batches make one step: rows, or tokens to be learned."""


class Batches(Protocol[Batch_co]):
    """An endless, resumable series of batches."""

    def __next__(self) -> Batch_co:
        """This process' part of the next batch, on its device."""

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch begins, in JSON's types; the same on every process."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes there."""


@dataclass
class Phase:
    """One phase of a run.

    Attributes:
        name: For log, messages and snapshots.
        module: From a batch to losses by name, whose sum counts unless one is called "loss". Its parameters that
            want a gradient are trained; call it whole, as a wrapper for several processes may stand around it.
        batches: What it is trained on.
        config: Steps, rates and clipping.
        seed: Of the chance within the phase (dropout, drawn negatives).
        gauges: Values to be logged beside the losses.
    """

    name: str
    module: nn.Module
    batches: Batches[Any]
    config: OptimizerConfig
    seed: int = 0
    gauges: Callable[[], Mapping[str, float]] = field(default=dict)


@dataclass(frozen=True)
class Run:
    """What all phases of a run share.

    Attributes:
        accelerator: Device, arithmetic, processes.
        journal: The log.
        snapshots: Where they are written.
        every: Steps between two snapshots.
        lines: Steps between two lines of the log; 0 for a fitting number.
        remember: What a snapshot holds beside the phase: tensors of the model that earlier phases trained, and facts
            ("processes" and "journal" among them).
        progress: Called with (phase, steps done, steps).
        say: Takes a line now and then.
    """

    accelerator: Accelerator
    journal: Journal
    snapshots: Snapshots
    every: int
    remember: Callable[[], Snapshot]
    lines: int = 0
    progress: ProgressCallback | None = None
    say: Callable[[str], None] = lambda _: None


def run_phase(run: Run, phase: Phase, done: int, snapshot: Snapshot | None = None) -> None:
    """Makes the steps of a phase.

    Args:
        run: What is shared.
        phase: Trained in place.
        done: Steps of the phases before.
        snapshot: One that was written within this phase, to go on from.

    Raises:
        DataError: A loss is not finite: step and samples are named, the last snapshot stays.
        OutputError: A snapshot or the log cannot be written.
    """
    accelerator, config = run.accelerator, phase.config
    optimizer = make_optimizer([phase.module], config)
    module, optimizer = accelerator.prepare(phase.module, optimizer)
    first = 0
    if snapshot is not None:
        first = int(snapshot.facts["step"])
        states.restore(accelerator, module, optimizer, snapshot)
        phase.batches.load_state_dict(snapshot.facts["batches"])
    else:
        torch.manual_seed(phase.seed * accelerator.num_processes + accelerator.process_index)
    run.journal.begin()
    lines = run.lines or max(1, config.steps // LINES)
    for step in range(first, config.steps):
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        run.journal.add(_step(run, phase, module, optimizer, step))
        finished = step + 1
        if finished % lines == 0 or finished == config.steps:
            line = run.journal.write(phase.name, finished, rate, phase.gauges())
            run.say(f"{phase.name}: step {finished}/{config.steps} loss {line['loss']:.4f} rate {rate:.1e}")
        if run.progress is not None:
            run.progress(phase.name, finished, config.steps)
        if finished % run.every == 0 and finished < config.steps:
            _save(run, phase, module, optimizer, finished, done)
    states.collect(accelerator, module, phase.module)
    accelerator.free_memory()


def _step(run: Run, phase: Phase, module: nn.Module, optimizer: Any, step: int) -> dict[str, float]:
    """One step; the means of its losses and the gradient's norm."""
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
    scaled = (
        accelerator.scaler is not None
    )  # then a step whose gradients overflow is left out, and the scale lowered
    wrong = [
        name
        for name, value in values.items()
        if not math.isfinite(value) and not (scaled and name == "grad_norm")
    ]
    if wrong:
        raise _not_finite(run, phase, batches, step, f"{wrong[0]} is {values[wrong[0]]}")
    if scaled and not math.isfinite(values["grad_norm"]):
        values["grad_norm"] = 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return values


def _shares(accelerator: Accelerator, weights: Sequence[int]) -> list[float]:
    """The parts that the batches of one step have in its gradient; each batch is averaged over all processes."""
    if len(weights) == 1:
        return [1.0]
    counts = torch.tensor(weights, dtype=torch.float64)
    if accelerator.num_processes > 1:
        counts = accelerator.reduce(counts.to(accelerator.device, torch.float32), "sum").cpu().double()
    return (counts / counts.sum().clamp(min=1)).tolist()


def _over_processes(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    """Means over the processes, so that all of them see the same and stop together."""
    if accelerator.num_processes == 1:
        return values
    means = accelerator.reduce(torch.tensor(list(values.values()), device=accelerator.device), "mean")
    return dict(zip(values, means.tolist(), strict=True))


def _not_finite(run: Run, phase: Phase, batches: Sequence[PhaseBatch], step: int, what: str) -> DataError:
    """The error of a step that must not be made."""
    names = [name for batch in batches for name in batch.sample_ids]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    samples = f" on the samples {', '.join(names[:NAMED])}{more}" if names else ""
    fix = "lower the learning rate of this phase, or raise its warmup_steps"
    if run.snapshots.any:
        fix += f", and go on from {run.snapshots.directory} with {option('resume', on=True)}"
    return DataError(f"{phase.name}: at step {step}{samples} the {what}, expected a finite number", fix)


def _save(run: Run, phase: Phase, module: nn.Module, optimizer: Any, step: int, done: int) -> None:
    """Writes a snapshot within a phase; every process takes part, the first one writes."""
    accelerator = run.accelerator
    tensors = states.capture(accelerator, module, optimizer)
    if accelerator.is_main_process:
        kept = run.remember()
        facts = {
            **kept.facts,
            "phase": phase.name,
            "step": step,
            "batches": phase.batches.state_dict(),
        }
        run.snapshots.write(done + step, Snapshot({**kept.tensors, **tensors}, facts))
    accelerator.wait_for_everyone()
