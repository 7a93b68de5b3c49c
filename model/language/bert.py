"""BERT with attention to a picture: BLIP's text models (Li et al., arXiv 2201.12086, section 3.1).

Post-norm layers as in BERT (arXiv 1810.04805), each with cross-attention between self-attention and
feed-forward. Three models use the same layer. The encoder of questions and captions attends to patches, and so does
the decoder of captions. The decoder of answers attends to the states of the encoder.
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
from blip2edge.model.config import BertSizes, LanguageConfig
from blip2edge.model.config_json import key
from blip2edge.model.interfaces import DecoderModule, LayerStep
from blip2edge.model.layers import (
    ACTIVATIONS,
    KeyValue,
    append_to_cache,
    causal_bias,
    key_mask_bias,
    stack,
)


@dataclass(frozen=True)
class BertConfig(BertSizes, LanguageConfig):
    """Sizes of BLIP's text models, with the defaults of transformers' BlipTextConfig.

    Attributes:
        encoder_hidden_size: Width of the patches or states that the layers attend to.
        reads_question: Whether an encoder reads a question first (VQA); then the decoder attends to the encoder's
            states.
    """

    vocab_size: int = key("vocab_size", 30524)
    num_heads: int = key("num_attention_heads", 8)
    encoder_hidden_size: int = key("encoder_hidden_size", 768)
    max_positions: int = key("max_position_embeddings", 512)
    dropout: float = key("hidden_dropout_prob", 0.0)
    tie_embeddings: bool = key("tie_word_embeddings", True)
    reads_question: bool = False

    kind = "blip_text_model"
    model_type = kind

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reads_question and self.encoder_hidden_size != self.hidden_size:
            raise CheckpointError(
                f"config.json: text_config: expected encoder_hidden_size {self.hidden_size}, the width of the "
                f"question's states, got {self.encoder_hidden_size}"
            )

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the model has an encoder, which reads the prompt."""
        return self.reads_question

    @property
    def cross(self) -> CrossSpec:
        """Describes the cross-attention: every layer attends to the patches, or to the encoder's states (VQA)."""
        return CrossSpec(
            self.num_layers,
            self.num_heads,
            self.head_dim,
            self.encoder_hidden_size,
            mask="keys" if self.reads_question else "none",
            source="encoder_states" if self.reads_question else "image_embeds",
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``text_config`` that :meth:`from_hf` reads."""
        return super().to_hf() | {"is_decoder": True}


class BertLayer(nn.Module):
    """A layer of BLIP's text models: self-attention, cross-attention, feed-forward."""

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
        """Runs the layer on ``x [B, S, D]``; returns ``[B, S, D]``, and keys and values ``[B, H, P + S, d]``.

        ``past`` are cached keys and values ``[B, H, P, d]``. ``cross`` are the keys and values of the cross-attention;
        if it is None, the cross-attention is skipped.
        """
        present = append_to_cache(past, self.self_attention.key_value(x))
        x = self.self_attention.attend_to(x, present, bias)
        if cross is not None:
            x = self.cross_attention.attend_to(x, cross, cross_bias)
        return self.feed_forward(x), present


class BertEmbeddings(nn.Module):
    """Adds position embeddings and applies the norm before the first layer."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """Adds positions, int64 ``[B, S]`` or ``[S]``, to token embeddings ``x [B, S, D]``; returns ``[B, S, D]``."""
        return self.dropout(self.norm(x + self.positions(position_ids)))


class BertEncoder(nn.Module):
    """Text encoder: maps token ids, optionally with the patches of a picture, to states."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embeddings = BertEmbeddings(config)
        self.layers = stack(BertLayer(config) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Encodes a text.

        Args:
            input_ids: Token ids int64 ``[B, S]``, padded on the right: the index of a token in its row is its position.
            attention_mask: int64 ``[B, S]``, 1 where a token is valid.
            image_embeds: Patches ``[B, P, Dv]`` to attend to; None to read the text alone.

        Returns:
            States ``[B, S, D]``.
        """
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embeddings(self.embed_tokens(input_ids), slots)
        bias = key_mask_bias(attention_mask, x.dtype)
        for layer in self.layers:
            cross = None if image_embeds is None else layer.cross_attention.key_value(image_embeds)
            x, _ = layer(x, bias, cross=cross)
        return x


class BertHead(nn.Linear):
    """Maps states to logits: a linear layer, an activation and a norm, then the output matrix and a separate bias.

    The output matrix may be the token table.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config.hidden_size, config.vocab_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x: Tensor) -> Tensor:
        """Maps the states of K tokens, ``[B, K, D]``, to logits ``[B, K, V]`` over V tokens."""
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
        """Encodes a question, ids and mask int64 ``[B, E]``, with patches ``[B, P, Dv]``; returns ``[B, E, D]``."""
        if self.encoder is None:
            raise ValueError("a decoder of captions has no encoder")
        return self.encoder(input_ids, attention_mask, image_embeds)

    def cross_key_values(self, source: Tensor) -> list[KeyValue]:
        """Computes keys and values ``[B, H, E, d]`` of each cross-attention, from E patches or states ``[B, E, C]``."""
        return [layer.cross_attention.key_value(source) for layer in self.layers]

    def start(
        self, x: Tensor, mask: Tensor, positions: Tensor, cross: Sequence[KeyValue], cross_mask: Tensor | None
    ) -> tuple[Tensor, LayerStep]:
        """Returns the first layer's input and a function that runs one layer (:meth:`DecoderModule.start`)."""
        x = self.embeddings(x, positions)
        bias = causal_bias(mask, x.shape[1], x.dtype)
        cross_bias = None if cross_mask is None else key_mask_bias(cross_mask, x.dtype)
        return x, lambda index, x, past: self.layers[index](x, bias, past, cross[index], cross_bias)

    def logits(self, x: Tensor) -> Tensor:
        """Maps the last layer's output at K slots, ``[B, K, D]``, to logits ``[B, K, V]`` over V tokens."""
        return self.head(x)
