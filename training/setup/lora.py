"""Low-rank adaptation of the frozen language model (LoRA; Hu et al., arXiv 2106.09685), by the package peft.

A linear layer with weight W gets two small matrices, A ``[r, in]`` and B ``[out, r]``. The layer's output is ``W x +
(alpha / r) B A x``. B is 0 at first, so the loss of the first step equals that of the model without LoRA. At the end of
the phase, ``(alpha / r) B A`` is added to W: the checkpoint has the layout of a model without LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.errors import MissingPackageError
from blip2edge.packages import require

ATTENTION = ("query", "key", "value", "out", "dense")
"""Names of the linear layers in attention blocks; ``dense`` is the output layer of BERT's attention."""

MARK = ".lora_"
"""Text that the name of each parameter of LoRA contains."""


_BASE = ".base_layer"  # peft's name of the layer inside one with LoRA


def without_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's tensors, renamed as in the model without LoRA; leaves out LoRA's own tensors."""
    return {name.replace(_BASE, ""): tensor for name, tensor in tensors.items() if MARK not in name}


def add_lora(language: nn.Module, rank: int, alpha: float, targets: str) -> None:
    """Adds LoRA to the layers of a language model, in float32; the new parameters require gradients.

    Args:
        language: The language model, frozen; changed in place.
        rank: r, the rank of the product B A.
        alpha: Factor on the product B A, before the division by the rank.
        targets: Which linear layers get LoRA: ``attention`` (in attention layers), or ``all`` (also in feed-forward
            layers).

    Raises:
        MissingPackageError: The package peft is not installed.
    """
    peft = require("peft", "LoRA (lora_rank in the recipe)", MissingPackageError)
    names = [
        name
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and "layers" in name.split(".") and _is_target(name, targets)
    ]
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)
    peft.inject_adapter_in_model(config, language)
    for name, parameter in language.named_parameters():
        if MARK in name:
            parameter.data = parameter.data.float()  # the frozen weights may be in half precision
            parameter.requires_grad_(True)


def _is_target(name: str, targets: str) -> bool:
    *_, parent, own = name.split(".")
    return targets == "all" or ("attention" in parent and own in ATTENTION)


def merge_lora(language: nn.Module) -> None:
    """Adds (alpha / r) B A to the weights W, in float32, and removes LoRA's layers; does nothing without LoRA."""
    added = [(name, module) for name, module in language.named_modules() if hasattr(module, "get_base_layer")]
    if not added:
        return
    language.float()  # half precision would round away a part of the product
    for name, module in added:
        layer: Any = module
        with torch.no_grad():
            layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(language.get_submodule(parent), own, layer.get_base_layer())
