"""Validation during a phase: scores the captioner on held-out pictures, keeps the best weights, and stops early.

The first process reads the pictures and scores; all processes get the result. If the parameters are spread over the
processes (FSDP), all processes generate the captions together, because each holds a part of every layer. Nothing here
draws random numbers, so a run with validation makes the same steps as one without.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from blip2edge.errors import ProcessError, one_line
from blip2edge.training.loop.sharding import usable_outside_forward, whole_tensor
from blip2edge.training.loop.snapshots import Snapshot
from blip2edge.training.loop_config import ValidationConfig

_BEST = "best."  # begins the names of the best weights in a snapshot
FACTS = "validation"  # key of a snapshot's facts


class Together(Protocol):
    """A captioner that generates in all processes at once, because its parameters are spread over them."""

    def end(self) -> None:
        """Ends :meth:`follow` in the other processes; called in the first process."""

    def follow(self) -> None:
        """Generates the same texts as the first process, until the first process calls :meth:`end`.

        Called in all processes except the first.
        """


@dataclass
class Validation:
    """Scores the captioner during one phase, and keeps the best score and its weights.

    Attributes:
        config: Section ``[validation]`` of the recipe.
        score: Function that scores the captioner with its present weights; returns scores by name, also the metric.
        metric: Name of the score to maximise.
        accelerator: Device and processes.
        together: The captioner, if its parameters are spread over the processes; None if `score` needs one process.
        best: Largest score so far; None before the first validation whose score is not NaN.
        best_step: Step at which the score was `best`.
        steps: Steps after which a validation ran.
        tensors: Trained weights at `best_step`, on the CPU, by name; empty if the recipe does not keep them.
    """

    config: ValidationConfig
    score: Callable[[], Mapping[str, Any]]
    metric: str
    accelerator: Accelerator
    together: Together | None = None
    best: float | None = None
    best_step: int = 0
    steps: list[int] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def due(self, step: int, last: int) -> bool:
        """Returns whether a validation runs after step number `step`; `last` is the number of the last step."""
        return step % self.config.every == 0 or step == last

    def run(self, step: int, module: nn.Module) -> dict[str, float]:
        """Scores the captioner after a step, and keeps its trained weights if the score is the best so far.

        Args:
            step: Number of steps done.
            module: The trained module, without the wrapper of several processes.

        Returns:
            The scores that are numbers, by name.

        Raises:
            ProcessError: In the other processes, if the first process has raised an error.
        """
        found: list[Any] = [None, None]  # the numbers, and the error in one line
        failure: Exception | None = None
        if self.accelerator.is_main_process or self.together is not None:
            try:
                found[0] = self._scored(module)
            except Exception as error:
                if not self.accelerator.is_main_process:
                    raise  # the process ends, and its launcher ends the others
                # raised below, when the other processes know
                failure, found[1] = error, f"{type(error).__name__}: {one_line(error)}"
        values, problem = broadcast_object_list(found)
        if failure is not None:
            raise failure
        if problem is not None:
            raise ProcessError(f"the validation after step {step} failed in the first process: {problem}")
        value: float = values[self.metric]
        self.steps.append(step)
        if not math.isnan(value) and (self.best is None or value > self.best):
            self.best, self.best_step = value, step
            if self.config.keep_best:
                self.tensors = {
                    name: whole_tensor(tensor.detach()).cpu().clone() for name, tensor in _trained(module).items()
                }
        return dict(values)

    def _scored(self, module: nn.Module) -> dict[str, float]:
        """Scores the captioner in eval mode; returns the scores that are numbers, as int or float, by name.

        The other processes, if they generate with the first, return no scores.
        """
        training = module.training
        module.eval()
        try:
            with torch.no_grad(), usable_outside_forward(module):
                figures = self._led() if self.accelerator.is_main_process else self._followed()
        finally:
            module.train(training)
        return {
            name: int(value) if isinstance(value, Integral) else float(value)
            for name, value in figures.items()
            if not isinstance(value, bool) and isinstance(value, Real)
        }

    def _led(self) -> Mapping[str, Any]:
        """Scores the captioner in the first process; then ends `follow` in the others, also after an error."""
        try:
            return self.score()
        finally:
            if self.together is not None:
                self.together.end()

    def _followed(self) -> Mapping[str, Any]:
        """Generates what the first process generates; returns no scores."""
        if self.together is not None:
            self.together.follow()
        return {}

    @property
    def exhausted(self) -> bool:
        """Returns whether the last `patience` validations gave no better score (always False if `patience` is 0)."""
        since = sum(step > self.best_step for step in self.steps)
        return 0 < self.config.patience <= since

    def finish(self, module: nn.Module) -> None:
        """Copies the best weights, if they were kept, into the module."""
        trained = _trained(module)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                trained[name].copy_(tensor)

    def figures(self) -> dict[str, Any]:
        """Returns the entry about validation for ``training.json``.

        The entry has the metric, the best score with its step, and all steps after which a validation ran.
        """
        return {"metric": self.metric, "best": self.best, "best_step": self.best_step, "steps": list(self.steps)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns what a snapshot stores about the validation.

        These are the best weights by name, and the values of :meth:`figures`.
        """
        return {f"{_BEST}{name}": tensor for name, tensor in self.tensors.items()}, {FACTS: self.figures()}

    def restore(self, snapshot: Snapshot) -> None:
        """Restores the state from a snapshot; does nothing if the snapshot has no state for this metric."""
        facts = snapshot.facts.get(FACTS)
        if facts is None or facts["metric"] != self.metric:
            return
        self.best, self.best_step, self.steps = facts["best"], int(facts["best_step"]), list(facts["steps"])
        self.tensors = {
            name.removeprefix(_BEST): tensor for name, tensor in snapshot.tensors.items() if name.startswith(_BEST)
        }


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters of a module, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
