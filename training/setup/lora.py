"""Low-rank adaptation of the frozen language model (LoRA; Hu et al., arXiv 2106.09685), by the package peft.

A linear layer gets two small matrices, A ``[r, in]`` and B ``[out, r]``; its output is ``W x + (alpha / r) B A x``. B
is 0 at first, so the first step has the loss of the model without LoRA. At the end of the phase the product is added to
W: the checkpoint has the layout of a model without LoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.errors import MissingPackageError
from blip2edge.packages import require

ATTENTION = ("query", "key", "value", "out", "dense")
"""Names of the linear layers of an attention; ``dense`` is BERT's output."""

MARK = ".lora_"
"""Is in the name of each parameter that LoRA adds."""


_BASE = ".base_layer"  # peft's name of the layer inside one with LoRA


def without_lora(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a model's tensors under the names that they have without LoRA; those of LoRA itself are left out."""
    return {name.replace(_BASE, ""): tensor for name, tensor in tensors.items() if MARK not in name}


def add_lora(language: nn.Module, rank: int, alpha: float, targets: str) -> None:
    """Adds LoRA to the layers of a language model, in float32; the new parameters require gradients.

    Args:
        language: The language model, frozen; changed in place.
        rank: Rank r of the product of A and B.
        alpha: Scale of the product, divided by the rank.
        targets: ``attention`` for the linear layers of attentions, ``all`` for those of the feed-forward layers too.

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
    """Adds the trained products to the weights, in float32, and removes LoRA's layers; does nothing without LoRA."""
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
