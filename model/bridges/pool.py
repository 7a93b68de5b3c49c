"""An attention pool: learned queries that attend to the patches once.

The attentional pooler of CoCa (Yu et al., arXiv 2205.01917, section 3.2): one layer of multi-head attention between
a norm on the patches and a norm on the queries. CLIP's attention pool (arXiv 2103.00020) and the pooling bridges
of VILA (arXiv 2312.07533) are similar: they make a few visual tokens per picture, at the cost of one layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blip2edge.model.config_json import Section, check_heads, key
from blip2edge.model.layers import Attention, chosen_queries


@dataclass(frozen=True)
class AttentionPoolConfig(Section):
    """Sizes of an attention pool: the ``bridge_config`` of this project's own ``config.json`` (``families/native.py``).

    Attributes:
        hidden_size: Width of a query.
        num_heads: Number of attention heads.
        num_query_tokens: Number of queries, which is the number of visual tokens.
        encoder_hidden_size: Width of a patch embedding.
        norm_eps: Epsilon of both norms.
    """

    hidden_size: int = key("hidden_size", 768)
    num_heads: int = key("num_attention_heads", 12)
    num_query_tokens: int = key("num_query_tokens", 32)
    encoder_hidden_size: int = 1408
    norm_eps: float = key("layer_norm_eps", 1e-6)

    kind = "pool"
    section = "bridge_config"

    def __post_init__(self) -> None:
        check_heads(self.section, self.hidden_size, self.num_heads)

    @property
    def num_visual_tokens(self) -> int:
        """Number of visual tokens per picture."""
        return self.num_query_tokens


class AttentionPoolBridge(nn.Module):
    """Bridge of one attention layer: learned queries attend to the patches, then a projection to the language model."""

    def __init__(self, config: AttentionPoolConfig, embed_dim: int) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.query_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.patch_norm = nn.LayerNorm(config.encoder_hidden_size, eps=config.norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.hidden_size // config.num_heads,
            context_width=config.encoder_hidden_size,
            bias=True,
        )
        self.projection = nn.Linear(config.hidden_size, embed_dim)

    def forward(self, image_embeds: Tensor, query_ids: Tensor | None = None) -> Tensor:
        """Maps ``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``.

        ``query_ids`` are the numbers of the learned queries to use; None for all (:func:`chosen_queries`).
        """
        queries = self.query_norm(chosen_queries(self.query_tokens, query_ids))  # [1, Q, D]: the same for every picture
        patches = self.attention.key_value(self.patch_norm(image_embeds))
        return self.projection(self.attention(queries, patches))
