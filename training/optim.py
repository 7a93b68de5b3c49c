"""The optimiser of every phase, and the loop around it.

AdamW as in the BLIP-2 paper (arXiv 2301.12597, section 4): weight decay on matrices only, a linear
warm-up, then half a cosine. Clipping, which LAVIS leaves out, keeps a bad batch from doing harm.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from blip2edge.errors import DataError
from blip2edge.progress import ProgressCallback
from blip2edge.training.config import OptimizerConfig

Batch = TypeVar("Batch")
Log = Callable[[str], None]
LOG_LINES = 20  # a phase tells its loss this many times


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """The learning rate of a step.

    Args:
        step: Counted from 0.
        config: Peak, floor, warm-up and number of steps.

    Returns:
        Rises linearly to `learning_rate` over `warmup_steps`, then falls to `min_learning_rate` along
        half a cosine (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    swing = 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * swing


def make_optimizer(modules: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over all parameters that want a gradient.

    Args:
        modules: Their trainable parameters are taken, each once.
        config: Rates, betas and weight decay.

    Returns:
        An optimiser with two groups: tensors of two and more dimensions decay, biases, norms and scales do not.
    """
    seen: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), parameter)
    matrices = [parameter for parameter in seen.values() if parameter.ndim > 1]
    vectors = [parameter for parameter in seen.values() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=config.learning_rate, betas=betas
    )


def freeze(module: nn.Module) -> None:
    """Takes a part out of training: no gradients, no dropout."""
    module.requires_grad_(False)
    module.eval()


def fit(
    name: str,
    modules: Iterable[nn.Module],
    batches: Iterator[Batch],
    loss: Callable[[Batch], Tensor],
    config: OptimizerConfig,
    log: Log,
    progress: ProgressCallback | None = None,
) -> list[float]:
    """Trains for `config.steps` steps.

    Args:
        name: The phase, for the log.
        modules: What the optimiser may change.
        batches: Gives a batch a step.
        loss: From a batch to a scalar with a gradient.
        config: Steps, rates and clipping.
        log: Takes one line at a time.
        progress: Called with (name, steps done, steps) after each step.

    Returns:
        The loss of every step.

    Raises:
        DataError: The loss is not finite; the step is named and nothing is saved.
    """
    trained = list(modules)
    optimizer = make_optimizer(trained, config)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    every = max(1, config.steps // LOG_LINES)
    losses: list[float] = []
    start = time.monotonic()
    for step in range(config.steps):
        rate = learning_rate(step, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(next(batches))
        number = float(value.detach())
        if not math.isfinite(number):
            raise DataError(
                f"{name}: the loss of step {step} is {number}, expected a finite number",
                "lower the learning rate of this phase, or raise its warmup_steps",
            )
        optimizer.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
        losses.append(number)
        if progress is not None:
            progress(name, step + 1, config.steps)
        if (step + 1) % every == 0 or step + 1 == config.steps:
            recent = losses[-every:]
            log(
                f"{name}: step {step + 1}/{config.steps} loss {sum(recent) / len(recent):.4f} "
                f"rate {rate:.1e} {time.monotonic() - start:.0f} s"
            )
    return losses
