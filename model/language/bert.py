"""BERT with attention to a picture: BLIP's text models (Li et al., arXiv 2201.12086, section 3.1).

Post-norm layers as in BERT (arXiv 1810.04805), each with cross-attention between self-attention and
feed-forward. The same layer serves three models: the encoder of questions and captions and the decoder of captions,
which attend to patches, and the decoder of answers, which attends to the encoder's states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError
from blip2edge.model.bert_blocks import BertAttention, BertFeedForward
from blip2edge.model.config_json import Fields, Key, check_heads, transformer_keys, write_keys
from blip2edge.model.interfaces import DecoderModule
from blip2edge.model.layers import (
    ACTIVATIONS,
    KeyValue,
    append_to_cache,
    causal_bias,
    gather_positions,
    key_mask_bias,
    stack,
)

BERT_KEYS = (
    Key("vocab_size", "vocab_size", "integer", 30524),
    *transformer_keys(768, 3072, 12, 8),
    Key("encoder_hidden_size", "encoder_hidden_size", "integer", 768),
    Key("max_positions", "max_position_embeddings", "integer", 512),
    Key("activation", "hidden_act", "activation", "gelu"),
    Key("norm_eps", "layer_norm_eps", "number", 1e-12),
    Key("dropout", "hidden_dropout_prob", "number", 0.0),
    Key("tie_embeddings", "tie_word_embeddings", "flag", True),
)
"""``text_config`` with the defaults of transformers' BlipTextConfig."""


@dataclass(frozen=True)
class BertConfig:
    """Sizes of BLIP's text models.

    Attributes:
        encoder_hidden_size: Width of the states that the layers attend to.
        reads_question: Whether an encoder reads a question first, whose states the decoder attends to (VQA).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    encoder_hidden_size: int
    max_positions: int = 512
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.0
    tie_embeddings: bool = True
    reads_question: bool = False

    kind = "blip_text_model"

    def __post_init__(self) -> None:
        check_heads("text_config", self.hidden_size, self.num_heads)
        if self.reads_question and self.encoder_hidden_size != self.hidden_size:
            raise CheckpointError(
                f"config.json: text_config: expected encoder_hidden_size {self.hidden_size}, the width of the "
                f"question's states, got {self.encoder_hidden_size}"
            )

    @property
    def embed_dim(self) -> int:
        """Width of the token table."""
        return self.hidden_size

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether an encoder reads the prompt."""
        return self.reads_question

    @property
    def cross(self) -> CrossSpec:
        """Every layer attends to the patches, or to the states of the question."""
        return CrossSpec(
            self.num_layers,
            self.num_heads,
            self.head_dim,
            self.encoder_hidden_size,
            mask="keys" if self.reads_question else "none",
            source="encoder_states" if self.reads_question else "image_embeds",
        )

    @classmethod
    def from_hf(cls, values: Any) -> BertConfig:
        """Reads the ``text_config`` of a BLIP ``config.json``."""
        return cls(**Fields("text_config", values).read(BERT_KEYS))

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        return {"model_type": self.kind, **write_keys(self, BERT_KEYS), "is_decoder": True}


class BertLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.self_attention = BertAttention(config, config.hidden_size)
        self.cross_attention = BertAttention(config, config.encoder_hidden_size)
        self.feed_forward = BertFeedForward(config)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        past: KeyValue | None = None,
        cross: KeyValue | None = None,
        cross_bias: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """``x [B, S, D]`` to ``[B, S, D]`` and this layer's keys and values; no cross-attention without ``cross``."""
        present = append_to_cache(past, self.self_attention.key_value(x))
        x = self.self_attention.attend_to(x, present, bias)
        if cross is not None:
            x = self.cross_attention.attend_to(x, cross, cross_bias)
        return self.feed_forward(x), present


class BertEmbeddings(nn.Module):
    """Position embeddings, and the norm before the first layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """``x [B, S, D]`` and int64 ``[B, S]`` or ``[S]``."""
        return self.dropout(self.norm(x + self.positions(position_ids)))


class BertEncoder(nn.Module):
    """Token ids, and patches where there is a picture, to states."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings = BertEmbeddings(config)
        self.layers = stack(BertLayer(config) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Reads a text.

        Args:
            input_ids: int64 ``[B, S]``, padded on the right, as a token's slot is its position.
            attention_mask: int64 ``[B, S]``, 1 where a token is valid.
            image_embeds: ``[B, P, Dv]``; None to read the text alone.

        Returns:
            ``[B, S, D]``.
        """
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings(self.embed_tokens(input_ids), slots)
        bias = key_mask_bias(attention_mask, x.dtype)
        for layer in self.layers:
            cross = None if image_embeds is None else layer.cross_attention.key_value(image_embeds)
            x, _ = layer(x, bias, cross=cross)
        return x


class BertHead(nn.Linear):
    """BERT's transform and the output matrix, which may be the token table; the bias is separate."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """``[B, K, D]`` to ``[B, K, V]``."""
        return super().forward(self.norm(self.activation(self.dense(x))))


class BertDecoder(DecoderModule):
    """BLIP's decoder, with an encoder of questions for VQA."""

    layers: Sequence[BertLayer]

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = BertEncoder(config) if config.reads_question else None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings = BertEmbeddings(config)
        self.layers = stack(BertLayer(config) for _ in range(config.num_layers))
        self.head = BertHead(config)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def encode(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor) -> Tensor:
        """Int64 ``[B, E]`` twice and ``[B, P, Dv]`` to the states of a question about a picture, ``[B, E, D]``."""
        if self.encoder is None:
            raise ValueError("a decoder of captions has no encoder")
        return self.encoder(input_ids, attention_mask, image_embeds)

    def cross_key_values(self, source: Tensor) -> list[KeyValue]:
        """``[B, E, C]`` to two of ``[B, H, E, d]`` per layer."""
        return [layer.cross_attention.key_value(source) for layer in self.layers]

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
        cross: Sequence[KeyValue] = (),
        cross_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """The decoder contract; see :class:`DecoderModule`."""
        x = self.embeddings(inputs_embeds, position_ids)
        bias = causal_bias(attention_mask, x.shape[1], x.dtype)
        cross_bias = None if cross_attention_mask is None else key_mask_bias(cross_attention_mask, x.dtype)
        presents: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, bias, None if past is None else past[index], cross[index], cross_bias)
            presents.append(present)
        return self.head(gather_positions(x, logits_indices)), presents
