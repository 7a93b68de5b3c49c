"""BERT's attention and feed-forward blocks (arXiv 1810.04805): the norm follows the residual addition (post-norm).

The Q-Former, its text head and BLIP's text models use these blocks.
"""

from __future__ import annotations

from torch import Tensor, nn

from blip2edge.model.config import BertSizes
from blip2edge.model.layers import ACTIVATIONS, KeyValue, attend, merge_heads, split_heads


class BertAttention(nn.Module):
    """BERT's attention block: multi-head attention, then the residual addition and the norm.

    Keys and values are computed by a separate method (:meth:`key_value`), so that they can be cached.
    """

    def __init__(self, config: BertSizes, context_width: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.scale = (width // config.num_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(context_width, width)
        self.value = nn.Linear(context_width, width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(width, eps=config.norm_eps)

    def key_value(self, context: Tensor) -> KeyValue:
        """Computes keys and values ``[B, H, T, d]`` from ``context [B, T, C]``."""
        return split_heads(self.key(context), self.heads), split_heads(self.value(context), self.heads)

    def attend_to(self, x: Tensor, key_value: KeyValue, bias: Tensor | None = None) -> Tensor:
        """Lets ``x [B, S, D]`` attend to keys and values; returns ``[B, S, D]``.

        ``bias`` is added to the scores ``[B, H, S, T]``.
        """
        query = split_heads(self.query(x), self.heads)
        out = self.dense(merge_heads(attend(query, *key_value, bias, self.scale)))
        return self.norm(self.dropout(out) + x)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None) -> Tensor:
        """Lets ``x [B, S, D]`` attend to ``context [B, T, C]``; returns ``[B, S, D]``.

        ``x`` may also be ``[1, S, D]``; then this one row is used with every row of ``context``.
        """
        return self.attend_to(x, self.key_value(context), bias)


class BertFeedForward(nn.Module):
    """BERT's feed-forward block: two linear layers with an activation between them, then residual addition and norm."""

    def __init__(self, config: BertSizes) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        """Maps states ``[B, S, D]`` to states of the same shape."""
        return self.norm(self.dropout(self.down(self.activation(self.up(x)))) + x)
