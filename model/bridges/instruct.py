"""The Q-Former that also reads an instruction (InstructBLIP: Dai et al., arXiv 2305.06500, section 2.3).

Queries and instruction share each layer's self-attention; only the queries attend to the picture; queries and
instruction have separate feed-forward layers. Only the queries are projected to the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from blip2edge.model.bert_blocks import BertFeedForward
from blip2edge.model.bridges.qformer import QFormerBase, QFormerLayer
from blip2edge.model.config import QFormerConfig
from blip2edge.model.config_json import key
from blip2edge.model.layers import chosen_queries, key_mask_bias, stack


@dataclass(frozen=True)
class InstructedQFormerConfig(QFormerConfig):
    """Config of a Q-Former that also reads a text, with the defaults of transformers' InstructBlipQFormerConfig.

    Attributes:
        vocab_size: Rows of the Q-Former's token embedding table; the tokenizer is BERT's, not the language model's.
        instruction_positions: Rows of the position table: the length of the longest instruction.
    """

    vocab_size: int = key("vocab_size", 30522)
    instruction_positions: int = key("max_position_embeddings", 512)

    kind = "instructed-qformer"
    model_type = "instructblip_qformer"


class InstructedLayer(QFormerLayer):
    """A Q-Former layer for query tokens and text."""

    entry_points: ClassVar[tuple[str, ...]] = ("forward", "read", "read_text", "write")

    def __init__(self, config: InstructedQFormerConfig, index: int) -> None:
        super().__init__(config, index)
        self.text_feed_forward = BertFeedForward(config)

    def forward(
        self, queries: Tensor, text: Tensor, bias: Tensor, image_embeds: Tensor, *, last: bool
    ) -> tuple[Tensor, Tensor]:
        """Runs the layer on queries ``[B, Q, D]`` and text states ``[B, T, D]``; returns both in the same shapes.

        ``bias [B, 1, 1, Q + T]`` hides the padding of the text. If ``last`` is true (last layer), the feed-forward of
        the text is left out, because the text states after the last layer are not used.
        """
        count = queries.shape[1]
        both = torch.cat([queries, text], dim=1)  # [B, Q + T, D]
        both = self.self_attention(both, both, bias)
        queries, text = both[:, :count], both[:, count:]
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, image_embeds)
        return self.feed_forward(queries), text if last else self.text_feed_forward(text)

    def read_text(self, text: Tensor, bias: Tensor) -> Tensor:
        """Runs the layer on text states ``[B, T, D]`` without queries; ``bias [B, 1, 1, T]`` hides padding."""
        return self.text_feed_forward(self.self_attention(text, text, bias))


class InstructedQFormer(QFormerBase):
    """Q-Former that reads a picture and an instruction (InstructBLIP)."""

    layers: Sequence[InstructedLayer]

    def __init__(self, config: InstructedQFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.instruction_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = stack(InstructedLayer(config, index) for index in range(config.num_layers))

    def forward(
        self,
        image_embeds: Tensor,
        instruction_ids: Tensor,
        instruction_mask: Tensor,
        query_ids: Tensor | None = None,
    ) -> Tensor:
        """Runs all layers; returns the queries ``[B, Q, D]``.

        Args:
            image_embeds: The picture's embeddings, ``[B, P, Dv]``.
            instruction_ids: Token ids int64 ``[B, T]``, padded on the right: the index of a token in its row is its
                position.
            instruction_mask: int64 ``[B, T]``, 1 where a token is valid.
            query_ids: Numbers of the learned queries to use, int64 ``[B, Q]`` or ``[1, Q]``; None for all
                (:func:`chosen_queries`).
        """
        slots = torch.arange(instruction_ids.shape[1], device=instruction_ids.device)
        words = self.word_embeddings(instruction_ids) + self.position_embeddings(slots)  # [B, T, D]
        text = self.dropout(self.norm(words))
        queries = self.norm(chosen_queries(self.query_tokens, query_ids)).expand(image_embeds.shape[0], -1, -1)
        queries = self.dropout(queries)
        query_mask = instruction_mask.new_ones(instruction_mask.shape[0], queries.shape[1])
        bias = key_mask_bias(torch.cat([query_mask, instruction_mask], dim=1), text.dtype)
        for index, layer in enumerate(self.layers):
            queries, text = layer(queries, text, bias, image_embeds, last=index + 1 == len(self.layers))
        return queries
