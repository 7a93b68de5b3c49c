"""An attention pool: learned queries that attend to the patches once.

The attentional pooler of CoCa (Yu et al., arXiv 2205.01917, section 3.2): one layer of multi-head attention between
a norm on the patches and one on the queries. CLIP's attention pool (arXiv 2103.00020) and the pooling bridges
of VILA (arXiv 2312.07533) are of this kind: a few tokens per picture at the cost of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.model.config_json import Fields, Key, check_heads, write_keys
from blip2edge.model.layers import attend, merge_heads, split_heads

POOL_KEYS = (
    Key("hidden_size", "hidden_size", "integer", 768),
    Key("num_heads", "num_attention_heads", "integer", 12),
    Key("num_query_tokens", "num_query_tokens", "integer", 32),
    Key("norm_eps", "layer_norm_eps", "number", 1e-6),
)
"""``bridge_config`` of an attention pool."""


@dataclass(frozen=True)
class AttentionPoolConfig:
    """Sizes of an attention pool.

    Attributes:
        hidden_size: Width of a query.
        num_heads: Heads.
        num_query_tokens: Number of queries, and of visual tokens.
        encoder_hidden_size: Width of a patch.
        norm_eps: Epsilon of both norms.
    """

    hidden_size: int
    num_heads: int
    num_query_tokens: int
    encoder_hidden_size: int
    norm_eps: float = 1e-6

    kind = "pool"

    def __post_init__(self) -> None:
        check_heads("bridge_config", self.hidden_size, self.num_heads)

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens per picture."""
        return self.num_query_tokens

    @classmethod
    def from_hf(cls, values: Any, *, encoder_hidden_size: int) -> AttentionPoolConfig:
        """Reads the ``bridge_config`` of this project's own ``config.json`` (``families/native.py``)."""
        found = Fields("bridge_config", values).read(POOL_KEYS)
        return cls(encoder_hidden_size=encoder_hidden_size, **found)

    def to_hf(self) -> dict[str, Any]:
        """The section that :meth:`from_hf` reads."""
        return write_keys(self, POOL_KEYS)


class Pooling(nn.Module):
    """Queries attend to patches."""

    def __init__(self, config: AttentionPoolConfig) -> None:
        super().__init__()
        width, context = config.hidden_size, config.encoder_hidden_size
        self.heads = config.num_heads
        self.scale = (width // config.num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context, width)
        self.value = nn.Linear(context, width)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, patches: Tensor) -> Tensor:
        """``queries [1, Q, D]`` and ``patches [B, P, Dv]`` to ``[B, Q, D]``."""
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(queries), self.key(patches), self.value(patches))
        )
        return self.out(merge_heads(attend(query, key, value, scale=self.scale)))


class AttentionPoolBridge(nn.Module):
    """Norms, attention and the projection to the language model."""

    def __init__(self, config: AttentionPoolConfig, embed_dim: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.patch_norm = nn.LayerNorm(config.encoder_hidden_size, eps=config.norm_eps)
        self.attention = Pooling(config)
        self.projection = nn.Linear(config.hidden_size, embed_dim)

    def forward(self, image_embeds: Tensor) -> Tensor:
        """``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``."""
        queries = self.query_norm(self.query_tokens)  # [1, Q, D]: the same for every picture
        return self.projection(self.attention(queries, self.patch_norm(image_embeds)))
