"""Builds a bridge from its config; a table has one row for each kind of bridge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from blip2edge.model.bridges.instruct import InstructedQFormer
from blip2edge.model.bridges.perceiver import PerceiverResampler
from blip2edge.model.bridges.pool import AttentionPoolBridge
from blip2edge.model.bridges.qformer import QFormer, QFormerBridge
from blip2edge.model.config import BridgeConfig, LanguageConfig
from blip2edge.model.layers import MLP

BRIDGE_BUILDERS: dict[str, Callable[[Any, LanguageConfig], nn.Module]] = {
    "none": lambda config, language: nn.Identity(),
    "mlp": lambda config, language: MLP(
        config.input_size, config.hidden_size, config.hidden_size, config.activation, config.bias
    ),
    "pool": lambda config, language: AttentionPoolBridge(config, language.embed_dim),
    "perceiver": lambda config, language: PerceiverResampler(config),
    "qformer": lambda config, language: QFormerBridge(QFormer(config), language),
    "instructed-qformer": lambda config, language: QFormerBridge(InstructedQFormer(config), language),
}


def build_bridge(config: BridgeConfig, language: LanguageConfig) -> nn.Module:
    """Builds the bridge, a module that maps ``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``.

    A bridge that reads an instruction also takes ``instruction_ids`` and ``instruction_mask`` ``[B, T]``.
    """
    return BRIDGE_BUILDERS[config.kind](config, language)
