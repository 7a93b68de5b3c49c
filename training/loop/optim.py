"""Makes the optimiser (AdamW) of a phase, and computes its learning rates.

The settings are those of the BLIP-2 paper (arXiv 2301.12597, section 4): weight decay on matrices only, a linear
warm-up, then half a cosine. The training loop also clips gradients, so that a batch with large gradients has less
effect; LAVIS does not clip them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from blip2edge.model.layers import entry_points
from blip2edge.training.phase_config import OptimizerConfig

LAYER_LISTS = ("layers", "cross_layers")
RATE = "rate"  # key of an optimizer's group: its factor on the learning rate


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


def layer_rates(layers: int, decay: float) -> list[float]:
    """Computes the factors on the learning rate in a picture encoder (layer-wise learning-rate decay).

    Factor i is ``decay ** (layers + 1 - i)``: i = 0 for the patch, class and position embeddings, i = 1 for the first
    layer, i = ``layers`` for the last layer. The last factor, 1, is for the norm after the layers and for all other
    modules. This is the rule of BEiT (arXiv 2106.08254; microsoft/unilm, ``LayerDecayValueAssigner``) and EVA (arXiv
    2211.07636).
    LAVIS computes the same factors in ``get_optimizer_params``, but its schedules of the rate do not apply them.

    Args:
        layers: Number L of layers.
        decay: Factor from one layer to the layer below it; 1 for equal rates.

    Returns:
        L + 2 factors.
    """
    return [decay ** (layers + 1 - number) for number in range(layers + 2)]


def layer_number(name: str, layers: int) -> int:
    """Returns the index of the factor in :func:`layer_rates` that applies to a parameter of the picture encoder.

    Args:
        name: Name of the parameter in :class:`~blip2edge.model.vision.vit.VisionTransformer`.
        layers: Number of layers of this transformer.
    """
    part, _, rest = name.partition(".")
    if part == "layers":
        return int(rest.split(".")[0]) + 1
    return layers + 1 if part == "post_norm" else 0


def make_optimizer(
    modules: Iterable[nn.Module], config: OptimizerConfig, rate_of: Callable[[str], float] = lambda name: 1.0
) -> torch.optim.AdamW:
    """Makes an AdamW optimiser for all parameters with `requires_grad`.

    Args:
        modules: Modules to train; a parameter that two modules share is used once.
        config: Optimizer settings: learning rate, betas and weight decay.
        rate_of: Function from the name of a parameter in its module to the factor on its learning rate.

    Returns:
        An optimiser with two groups for each factor: weight decay on tensors of two or more dimensions, none on biases,
        norms and scales. The factor is in the group's entry :data:`RATE`.
    """
    seen: dict[int, tuple[nn.Parameter, float]] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                seen.setdefault(id(parameter), (parameter, rate_of(name)))
    groups = [
        {
            "params": [each for each, own in seen.values() if own == rate and (each.ndim > 1) == matrices],
            "weight_decay": config.weight_decay if matrices else 0.0,
            RATE: rate,
        }
        for rate in sorted({rate for _, rate in seen.values()}, reverse=True)
        for matrices in (True, False)
    ]
    betas = (config.beta1, config.beta2)
    given = [group for group in groups if group["params"]]
    # Fused: one pass over the memory of each tensor. On a CPU this is four times as fast as single operations.
    return torch.optim.AdamW(given, lr=config.learning_rate, betas=betas, fused=True)


def set_rate(optimizer: Any, rate: float) -> None:
    """Sets the learning rate of a step: each group of parameters gets ``rate`` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE]


def transformer_layers(module: nn.Module, names: Sequence[str] = LAYER_LISTS) -> list[nn.Module]:
    """Returns the layers of all transformers in a module: the entries of each module list with a name in `names`."""
    lists = [each for name, each in module.named_modules() if name.rpartition(".")[2] in names]
    return [layer for each in lists if isinstance(each, nn.ModuleList) for layer in each]


def recompute_activations(module: nn.Module) -> None:
    """Changes layers so that their activations are not kept: each layer's forward pass runs again in the backward pass.

    The method is activation checkpointing (Chen et al., arXiv 1604.06174), by ``torch.utils.checkpoint``.
    Dropout draws the same mask again. Without gradients nothing changes.
    """
    for layer in transformer_layers(module):
        for name in entry_points(layer):
            if name not in vars(layer):  # else an earlier phase has done this
                setattr(layer, name, partial(checkpoint, getattr(layer, name), use_reentrant=False))


def freeze(module: nn.Module) -> None:
    """Excludes a module from training: no gradients, no dropout."""
    module.requires_grad_(False)
    module.eval()
