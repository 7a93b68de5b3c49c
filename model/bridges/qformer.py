"""The Q-Former: a few learned queries that attend to the picture (Li et al., arXiv 2301.12597, section 3.1).

Post-norm layers as in BERT (arXiv 1810.04805). Queries have their own feed-forward layers; every
``cross_attention_frequency``-th layer, from the first, also attends to the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from blip2edge.errors import CheckpointError
from blip2edge.model.bert_blocks import BertAttention, BertFeedForward
from blip2edge.model.config import LanguageConfig, QFormerConfig
from blip2edge.model.layers import KeyValue, append_to_cache, chosen_queries, stack


class QFormerLayer(nn.Module):
    """A Q-Former layer: self-attention, attention to the picture (only in some layers), feed-forward."""

    entry_points: ClassVar[tuple[str, ...]] = ("read", "write")

    def __init__(self, config: QFormerConfig, index: int) -> None:
        super().__init__()
        self.self_attention = BertAttention(config, config.hidden_size)
        self.cross_attention: BertAttention | None = None
        if index % config.cross_attention_frequency == 0:
            self.cross_attention = BertAttention(config, config.encoder_hidden_size)
        self.feed_forward = BertFeedForward(config)

    def read(self, queries: Tensor, image_embeds: Tensor) -> tuple[Tensor, KeyValue]:
        """Runs the layer on the queries, which attend to each other and (in some layers) to the picture.

        Args:
            queries: ``[B, Q, D]``, or ``[1, Q, D]`` while the queries are the same for every row of the batch.
            image_embeds: The picture's embeddings, ``[B, P, Dv]``.

        Returns:
            The queries, and the keys and values of the self-attention, all with the batch size of `queries`.
        """
        key_value = self.self_attention.key_value(queries)
        queries = self.self_attention.attend_to(queries, key_value)
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, image_embeds)
        return self.feed_forward(queries), key_value

    def write(self, x: Tensor, past: KeyValue, bias: Tensor, feed_forward: BertFeedForward) -> tuple[Tensor, KeyValue]:
        """Runs the layer on the tokens of a text, which attend to the queries and to the text.

        Args:
            x: States of the tokens, ``[B, S, D]``.
            past: Keys and values ``[B, H, P, d]`` of the queries and the earlier tokens.
            bias: Added to the attention scores, broadcastable to ``[B, H, S, P + S]``; hides later tokens and padding.
            feed_forward: The feed-forward for text; the layer's own feed-forward is for the queries.

        Returns:
            States ``[B, S, D]``, and keys and values ``[B, H, P + S, d]``.
        """
        present = append_to_cache(past, self.self_attention.key_value(x))
        return feed_forward(self.self_attention.attend_to(x, present, bias)), present


class QFormerBase(nn.Module):
    """Base of the Q-Formers: the queries, and the layers in which they attend to a picture."""

    config: QFormerConfig
    query_tokens: nn.Parameter
    norm: nn.LayerNorm
    dropout: nn.Dropout
    layers: Sequence[QFormerLayer]

    def read(self, image_embeds: Tensor, query_ids: Tensor | None = None) -> tuple[Tensor, list[KeyValue]]:
        """Runs the queries through all layers.

        Before the first attention to the picture, the queries are the same for every row. They stay ``[1, Q, D]``,
        so that a graph optimiser can fold these layers into constants. In training with dropout, the queries are
        expanded first, because each row needs its own random mask.

        Args:
            image_embeds: The picture's embeddings, ``[B, P, Dv]``.
            query_ids: Numbers of the learned queries to use, int64 ``[B, Q]`` or ``[1, Q]``; None for all
                (:func:`chosen_queries`).

        Returns:
            The queries ``[B, Q, D]``, and keys and values ``[B, H, Q, d]`` of each layer's self-attention, to which a
            text after the queries attends.
        """
        rows = image_embeds.shape[0]
        queries = chosen_queries(self.query_tokens, query_ids)
        if self.training and self.dropout.p > 0:
            queries = queries.expand(rows, -1, -1)
        queries = self.dropout(self.norm(queries))
        key_values: list[KeyValue] = []
        for layer in self.layers:
            queries, (key, value) = layer.read(queries, image_embeds)
            key_values.append((key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1)))
        return queries, key_values


class QFormer(QFormerBase):
    """The Q-Former of BLIP-2: learned queries that attend to the picture."""

    def __init__(self, config: QFormerConfig) -> None:
        super().__init__()
        self.config = config
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = stack(QFormerLayer(config, index) for index in range(config.num_layers))

    def forward(self, image_embeds: Tensor, query_ids: Tensor | None = None) -> Tensor:
        """Maps ``image_embeds [B, P, Dv]`` to queries ``[B, Q, D]``.

        ``query_ids`` are the numbers of the learned queries to use; None for all (:func:`chosen_queries`).
        """
        return self.read(image_embeds, query_ids)[0]


class Projection(nn.Linear):
    """Linear layer from the bridge's width to the language model's width.

    The linear layer has ``hidden_size`` outputs. In OPT-350m, the token table is narrower: ``embed_dim`` is smaller
    than ``hidden_size``. For this case, transformers flattens the outputs of all Q queries and uses the first
    ``Q * embed_dim`` values as the visual tokens. This module does the same for each picture, so that a single picture
    gets the same caption as in transformers. (transformers flattens the whole batch, so that there the second and later
    pictures of a batch get values that belong to earlier pictures.)
    """

    def __init__(self, width: int, hidden_size: int, embed_dim: int) -> None:
        if embed_dim > hidden_size:
            raise CheckpointError(
                f"config.json: text_config: expected embed_dim of at most hidden_size {hidden_size}, got {embed_dim}"
            )
        super().__init__(width, hidden_size)
        self.embed_dim = embed_dim

    def forward(self, x: Tensor) -> Tensor:
        """Maps the bridge's output ``[B, Q, width]`` to visual tokens ``[B, Q, embed_dim]``."""
        x = super().forward(x)  # [B, Q, hidden]
        if self.out_features == self.embed_dim:
            return x
        queries = x.shape[1]
        return x.flatten(1)[:, : queries * self.embed_dim].reshape(-1, queries, self.embed_dim)


class QFormerBridge(nn.Module):
    """A Q-Former and the projection to the language model."""

    def __init__(self, qformer: QFormerBase, language: LanguageConfig) -> None:
        super().__init__()
        self.qformer = qformer
        self.projection = Projection(qformer.config.hidden_size, language.hidden_size, language.embed_dim)

    def forward(self, image_embeds: Tensor, *instruction: Tensor, query_ids: Tensor | None = None) -> Tensor:
        """Maps ``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``.

        For a Q-Former that reads an instruction, ``instruction`` is token ids and mask, int64 ``[B, T]`` each.
        ``query_ids`` are the numbers of the learned queries to use; None for all (:func:`chosen_queries`).
        """
        return self.projection(self.qformer(image_embeds, *instruction, query_ids=query_ids))
