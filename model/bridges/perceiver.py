"""The perceiver resampler: learned latents that read a picture of any length (Alayrac et al., arXiv 2204.14198, 3.1).

Flamingo's form of the Perceiver (arXiv 2103.03206): in every layer the latents attend to the picture and to
themselves, then pass a feed-forward. The output is as wide as the picture's embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.model.config_json import Fields, Key, write_keys
from blip2edge.model.layers import attend, merge_heads, split_heads, stack

PERCEIVER_KEYS = (
    Key("num_latents", "resampler_n_latents", "integer", 64),
    Key("num_layers", "resampler_depth", "integer", 6),
    Key("num_heads", "resampler_n_heads", "integer", 16),
    Key("head_dim", "resampler_head_dim", "integer", 96),
    Key("qk_norms", "qk_layer_norms_perceiver", "flag", False),
)
"""``perceiver_config`` with the defaults of transformers' IdeficsPerceiverConfig."""


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes of the resampler.

    Attributes:
        width: Width of the picture's embeddings and of the latents.
        num_latents: Number of latents, and of visual tokens.
        output_size: Width of the visual tokens after a linear layer; 0 for no such layer, as in Flamingo, which
            attends to the latents themselves.
    """

    width: int
    num_latents: int
    num_layers: int
    num_heads: int
    head_dim: int
    qk_norms: bool = False
    output_size: int = 0

    kind = "perceiver"

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens per picture."""
        return self.num_latents

    @classmethod
    def from_hf(cls, values: Any, *, width: int) -> PerceiverConfig:
        """Reads ``perceiver_config`` of an Idefics ``config.json``."""
        return cls(width=width, **Fields("perceiver_config", values).read(PERCEIVER_KEYS))

    def to_hf(self) -> dict[str, Any]:
        """The section that :meth:`from_hf` reads."""
        return {
            "model_type": "idefics_perciever",  # transformers' own spelling
            "use_resampler": True,
            **write_keys(self, PERCEIVER_KEYS),
        }


class PerceiverAttention(nn.Module):
    """Latents attend to the picture and to themselves; no bias in the matrices."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.scale = config.head_dim**-0.5
        self.context_norm = nn.LayerNorm(config.width)
        self.latents_norm = nn.LayerNorm(config.width)
        self.query_norm = nn.LayerNorm(config.head_dim) if config.qk_norms else None
        self.key_norm = nn.LayerNorm(config.head_dim) if config.qk_norms else None
        self.query = nn.Linear(config.width, inner, bias=False)
        self.key = nn.Linear(config.width, inner, bias=False)
        self.value = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(inner, config.width, bias=False)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """``context [B, P, D]`` and ``latents [B, Q, D]`` to ``[B, Q, D]``."""
        latents = self.latents_norm(latents)
        context = torch.cat([self.context_norm(context), latents], dim=1)  # [B, P + Q, D]
        query = split_heads(self.query(latents), self.heads)
        key = split_heads(self.key(context), self.heads)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        value = split_heads(self.value(context), self.heads)
        return self.out(merge_heads(attend(query, key, value, scale=self.scale)))


class PerceiverFeedForward(nn.Module):
    """A norm, and two matrices without bias around a ReLU (the paper's squared ReLU is plain in Idefics)."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, Q, D]`` to ``[B, Q, D]``."""
        return self.down(torch.relu(self.up(self.norm(x))))


class PerceiverLayer(nn.Module):
    """Attention and feed-forward, each added to the latents."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.attention = PerceiverAttention(config)
        self.feed_forward = PerceiverFeedForward(config)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """``context [B, P, D]`` and ``latents [B, Q, D]`` to ``[B, Q, D]``."""
        latents = latents + self.attention(context, latents)
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``; D is Dv without a linear layer after it."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.zeros(config.num_latents, config.width))
        self.layers = stack(PerceiverLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.output_size) if config.output_size else None

    def forward(self, image_embeds: Tensor) -> Tensor:
        """The latents after all layers."""
        latents = self.latents.expand(image_embeds.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(image_embeds, latents)
        latents = self.norm(latents)
        return latents if self.projection is None else self.projection(latents)
