"""T5 and Flan-T5: an encoder over the prompt, a decoder that attends to it (Raffel et al., arXiv 1910.10683).

The decoder follows the same contract as the other language models; its keys and values of the encoder's states are
computed once per request and passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError
from blip2edge.model.config_json import Fields, Key, write_keys
from blip2edge.model.interfaces import DecoderModule
from blip2edge.model.layers import (
    ACTIVATIONS,
    KeyValue,
    RMSNorm,
    append_to_cache,
    attend,
    causal_bias,
    gather_positions,
    key_mask_bias,
    merge_heads,
    split_heads,
    stack,
)

T5_MAX_POSITIONS = 2048
"""Longest context of engines and checks. The relative positions themselves have no limit."""


T5_KEYS = (
    Key("vocab_size", "vocab_size", "integer", 32128),
    Key("hidden_size", "d_model", "integer", 512),
    Key("ffn_dim", "d_ff", "integer", 2048),
    Key("head_dim", "d_kv", "integer", 64),
    Key("num_heads", "num_heads", "integer", 8),
    Key("num_encoder_layers", "num_layers", "integer", 6),
    Key("num_buckets", "relative_attention_num_buckets", "integer", 32),
    Key("max_distance", "relative_attention_max_distance", "integer", 128),
    Key("norm_eps", "layer_norm_epsilon", "number", 1e-6),
    Key("dropout", "dropout_rate", "number", 0.1),
)
"""``text_config`` with the defaults of transformers' T5Config."""


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5; ``gated`` is version 1.1 and Flan."""

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    head_dim: int
    num_heads: int
    num_encoder_layers: int
    num_layers: int
    activation: str = "relu"
    gated: bool = False
    num_buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    scale_outputs: bool = False
    tie_embeddings: bool = True
    max_positions: int = T5_MAX_POSITIONS
    dropout: float = 0.1

    kind = "t5"
    is_encoder_decoder = True

    @property
    def embed_dim(self) -> int:
        """Width of the token table."""
        return self.hidden_size

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return self.num_heads

    @property
    def cross(self) -> CrossSpec:
        """Every layer attends to the encoder's states."""
        return CrossSpec(self.num_layers, self.num_heads, self.head_dim, self.hidden_size, mask="keys")

    @classmethod
    def from_hf(cls, values: Any) -> T5Config:
        """Reads a T5 ``config.json`` or ``text_config``."""
        f = Fields("text_config", values)
        kind = f.values.get("feed_forward_proj", "relu")
        gated, _, activation = str(kind).rpartition("-")
        if gated not in ("", "gated"):
            raise CheckpointError(
                f"config.json: text_config.feed_forward_proj must be an activation or gated-ACTIVATION, not {kind!r}"
            )
        activation = "gelu_new" if kind == "gated-gelu" else activation
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json: text_config.feed_forward_proj names the unknown activation {activation!r}"
            )
        untied = f.values.get("tie_word_embeddings") is False
        found = f.read(T5_KEYS)
        return cls(
            **found,
            num_layers=f.integer("num_decoder_layers", found["num_encoder_layers"]),
            activation=activation,
            gated=bool(gated),
            scale_outputs=f.flag("scale_decoder_outputs", not untied),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        activation = "gelu" if self.activation == "gelu_new" else self.activation
        return {
            "model_type": "t5",
            "architectures": ["T5ForConditionalGeneration"],
            "is_encoder_decoder": True,
            **write_keys(self, T5_KEYS),
            "num_decoder_layers": self.num_layers,
            "feed_forward_proj": f"gated-{activation}" if self.gated else self.activation,
            "scale_decoder_outputs": self.scale_outputs,
            "tie_word_embeddings": self.scale_outputs,
        }


def bucket_thresholds(buckets: int, max_distance: int) -> list[int]:
    """Distances at which the next bucket begins.

    Near distances have a bucket each; the rest grow with the logarithm up to ``max_distance`` (T5's
    ``relative_position_bucket``). As whole numbers the rule needs no logarithm in the graph, and so is the same in
    every precision.
    """
    exact = buckets // 2
    distances = torch.arange(max_distance + 1, dtype=torch.float32, device="cpu")
    far = exact + (torch.log(distances / exact) / math.log(max_distance / exact) * (buckets - exact)).floor()
    bucket = torch.where(distances < exact, distances, far.clamp(max=buckets - 1)).long().tolist()
    return [
        next(distance for distance, found in enumerate(bucket) if found >= wanted)
        for wanted in range(1, bucket[-1] + 1)
    ]


class RelativeBias(nn.Module):
    """A learned bias of the attention scores by relative position; all layers of a stack share it."""

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.buckets = config.num_buckets // 2 if bidirectional else config.num_buckets
        self.thresholds = bucket_thresholds(self.buckets, config.max_distance)
        self.table = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The bias ``[B, H, S, T]`` for positions int64 ``[B, S]`` of queries and ``[B, T]`` of keys."""
        relative = keys[:, None, :] - queries[:, :, None]  # [B, S, T]
        distance = relative.abs() if self.bidirectional else (-relative).clamp(min=0)
        bucket = torch.zeros_like(distance)
        for threshold in self.thresholds:
            bucket = bucket + (distance >= threshold)
        if self.bidirectional:
            bucket = bucket + (relative > 0) * self.buckets
        return self.table(bucket).permute(0, 3, 1, 2)


class T5Attention(nn.Module):
    """T5's attention: no bias in its matrices, no scale on its scores."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.query = nn.Linear(config.hidden_size, inner, bias=False)
        self.key = nn.Linear(config.hidden_size, inner, bias=False)
        self.value = nn.Linear(config.hidden_size, inner, bias=False)
        self.out = nn.Linear(inner, config.hidden_size, bias=False)

    def key_value(self, x: Tensor) -> KeyValue:
        """``[B, T, D]`` to two of ``[B, H, T, d]``."""
        return split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)

    def forward(self, x: Tensor, key_value: KeyValue, bias: Tensor) -> Tensor:
        """``x [B, S, D]`` attends to keys and values ``[B, H, T, d]``."""
        out = attend(split_heads(self.query(x), self.heads), *key_value, bias)
        return self.out(merge_heads(out))


class T5FeedForward(nn.Module):
    """Two matrices, or three where it is gated (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.hidden_size, config.ffn_dim, bias=False) if config.gated else None
        self.up = nn.Linear(config.hidden_size, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class T5EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each after a norm."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = T5Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = T5FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """``x [B, S, D]``, ``bias [B, H, S, S]``."""
        normed = self.attention_norm(x)
        x = x + self.dropout(self.attention(normed, self.attention.key_value(normed), bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class T5DecoderLayer(nn.Module):
    """Self-attention over the cache, attention to the encoder's states, feed-forward."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = T5Attention(config)
        self.cross_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.cross_attention = T5Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = T5FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, bias: Tensor, past: KeyValue | None, cross: KeyValue, cross_bias: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """``x [B, S, D]`` to ``[B, S, D]`` and this layer's keys and values."""
        normed = self.attention_norm(x)
        present = append_to_cache(past, self.attention.key_value(normed))
        x = x + self.dropout(self.attention(normed, present, bias))
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), cross, cross_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), present


class T5Encoder(nn.Module):
    """``inputs_embeds [B, E, D]`` to states of the same shape."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative = RelativeBias(config, bidirectional=True)
        self.layers = stack(T5EncoderLayer(config) for _ in range(config.num_encoder_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """``attention_mask`` int64 ``[B, E]``; padding follows the text, so that slots are positions."""
        slots = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        bias = self.relative(slots, slots) + key_mask_bias(attention_mask, inputs_embeds.dtype)
        x = self.dropout(inputs_embeds)
        for layer in self.layers:
            x = layer(x, bias)
        return self.dropout(self.final_norm(x))


class T5(DecoderModule):
    """The encoder, the keys and values of its states, and the decoder."""

    layers: Sequence[T5DecoderLayer]

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = T5Encoder(config)
        self.relative = RelativeBias(config, bidirectional=False)
        self.layers = stack(T5DecoderLayer(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """``[B, E, D]`` and int64 ``[B, E]`` to states ``[B, E, D]``."""
        return self.encoder(inputs_embeds, attention_mask)

    def cross_key_values(self, states: Tensor) -> list[KeyValue]:
        """``[B, E, D]`` to two of ``[B, H, E, d]`` per layer."""
        return [layer.cross_attention.key_value(states) for layer in self.layers]

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
        x = self.dropout(inputs_embeds)
        # Positions of the keys count a row's valid slots, so that rows of a batch may be ragged.
        keys = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        bias = self.relative(position_ids, keys) + causal_bias(attention_mask, x.shape[1], x.dtype)
        if cross_attention_mask is None:
            cross_attention_mask = attention_mask.new_ones(x.shape[0], cross[0][0].shape[2])
        cross_bias = key_mask_bias(cross_attention_mask, x.dtype)
        presents: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, bias, None if past is None else past[index], cross[index], cross_bias)
            presents.append(present)
        x = self.dropout(self.final_norm(gather_positions(x, logits_indices)))
        if self.config.scale_outputs:
            x = x * self.config.hidden_size**-0.5
        return self.head(x), presents
