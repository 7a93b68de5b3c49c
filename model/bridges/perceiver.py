"""The perceiver resampler: learned latents that attend to any number of picture embeddings.

Alayrac et al., arXiv 2204.14198, section 3.1. This is Flamingo's variant of the Perceiver (arXiv 2103.03206): in every
layer the latents attend to the picture and to each other, then pass through a feed-forward. The output has the width of
the picture's embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.model.config_json import Section, key
from blip2edge.model.layers import Attention, FeedForward, chosen_queries, stack


@dataclass(frozen=True)
class PerceiverConfig(Section):
    """Sizes of the resampler, with the defaults of transformers' IdeficsPerceiverConfig.

    Attributes:
        width: Width of the picture's embeddings and of the latents.
        num_latents: Number of latents, which is the number of visual tokens.
        output_size: Width of the visual tokens after a linear layer; 0 for no linear layer, as in Flamingo, whose
            decoder attends to the latents.
    """

    width: int
    num_latents: int = key("resampler_n_latents", 64)
    num_layers: int = key("resampler_depth", 6)
    num_heads: int = key("resampler_n_heads", 16)
    head_dim: int = key("resampler_head_dim", 96)
    qk_norms: bool = key("qk_layer_norms_perceiver", False)
    output_size: int = 0

    kind = "perceiver"
    section = "perceiver_config"
    model_type = "idefics_perciever"  # transformers' own spelling

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens per picture."""
        return self.num_latents

    def to_hf(self) -> dict[str, Any]:
        """Returns the section of ``config.json`` that :meth:`from_hf` reads."""
        return super().to_hf() | {"use_resampler": True}


class PerceiverAttention(Attention):
    """Attention of the latents to the picture's embeddings and to all latents; the matrices have no bias."""

    def __init__(self, config: PerceiverConfig) -> None:
        norm = partial(nn.LayerNorm, config.head_dim) if config.qk_norms else None
        super().__init__(config.width, config.num_heads, config.head_dim, norm=norm)
        self.context_norm = nn.LayerNorm(config.width)
        self.latents_norm = nn.LayerNorm(config.width)

    def read(self, context: Tensor, latents: Tensor) -> Tensor:
        """Lets ``latents [B, Q, D]`` attend to the picture ``context [B, P, D]``; returns ``[B, Q, D]``."""
        latents = self.latents_norm(latents)
        context = torch.cat([self.context_norm(context), latents], dim=1)  # [B, P + Q, D]
        return self(latents, self.key_value(context))


class PerceiverFeedForward(FeedForward):
    """A norm, and two matrices without bias around a ReLU, as in Idefics; Flamingo's paper has a squared ReLU."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__(config.width, 4 * config.width, "relu", gated=False)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps latents ``[B, Q, D]`` to the same shape."""
        return super().forward(self.norm(x))


class PerceiverLayer(nn.Module):
    """A layer of the resampler: attention and feed-forward, whose outputs are added to the latents."""

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.attention = PerceiverAttention(config)
        self.feed_forward = PerceiverFeedForward(config)

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        """Updates ``latents [B, Q, D]`` from the picture ``context [B, P, D]``; returns ``[B, Q, D]``."""
        latents = latents + self.attention.read(context, latents)
        return latents + self.feed_forward(latents)


class PerceiverResampler(nn.Module):
    """Bridge with learned latents that attend to the picture.

    The width D of the visual tokens is the width Dv of the embeddings if there is no linear layer at the end.
    """

    def __init__(self, config: PerceiverConfig) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.zeros(config.num_latents, config.width))
        self.layers = stack(PerceiverLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.output_size) if config.output_size else None

    def forward(self, image_embeds: Tensor, query_ids: Tensor | None = None) -> Tensor:
        """Maps ``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``.

        ``query_ids`` are the numbers of the latents to use; None for all (:func:`chosen_queries`).
        """
        latents = chosen_queries(self.latents, query_ids).expand(image_embeds.shape[0], -1, -1)
        for layer in self.layers:
            latents = layer(image_embeds, latents)
        latents = self.norm(latents)
        return latents if self.projection is None else self.projection(latents)
