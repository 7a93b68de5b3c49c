"""The optimiser of every phase.

AdamW as in the BLIP-2 paper (arXiv 2301.12597, section 4): weight decay on matrices only, a linear warm-up, then half
a cosine. Gradients are also clipped, which LAVIS does not do, so that one bad batch cannot spoil the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blip2edge.training.phase_config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Computes the learning rate of a step.

    Args:
        step: Number of the step, counted from 0.
        config: Optimizer settings: peak, floor, warm-up and number of steps.

    Returns:
        The rate, which rises linearly to `learning_rate` over `warmup_steps`, then falls to `min_learning_rate` along
        half a cosine (Loshchilov and Hutter, arXiv 1608.03983, equation 5, without restarts).
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    swing = 0.5 * (1.0 + math.cos(math.pi * min(1.0, share)))
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * swing


def make_optimizer(modules: Iterable[nn.Module], config: OptimizerConfig) -> torch.optim.AdamW:
    """Makes an AdamW optimiser for all parameters with `requires_grad`.

    Args:
        modules: Modules to train; a parameter that two modules share is used once.
        config: Optimizer settings: learning rate, betas and weight decay.

    Returns:
        An optimiser with two groups: weight decay on tensors of two or more dimensions, none on biases, norms and
        scales.
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
    given = [group for group in groups if group["params"]]
    # Fused: one pass over the memory of each tensor. On a CPU this is four times as fast as single operations.
    return torch.optim.AdamW(given, lr=config.learning_rate, betas=betas, fused=True)


def recompute_activations(module: nn.Module) -> None:
    """Makes layers run again in the backward pass, instead of keeping their activations.

    The method is activation checkpointing (Chen et al., arXiv 1604.06174), by ``torch.utils.checkpoint``.
    A layer is an entry of a list named ``layers`` or ``cross_layers`` in any submodule. Dropout draws the same mask
    again. Without gradients nothing changes.
    """
    for name, layers in list(module.named_modules()):
        if isinstance(layers, nn.ModuleList) and name.rpartition(".")[2] in ("layers", "cross_layers"):
            for layer in layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def freeze(module: nn.Module) -> None:
    """Excludes a module from training: no gradients, no dropout."""
    module.requires_grad_(False)
    module.eval()
