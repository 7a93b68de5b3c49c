"""T5 and Flan-T5: an encoder of the prompt, and a decoder that attends to its states (Raffel et al., arXiv 1910.10683).

The decoder has the same inputs and outputs as the other language models. The keys and values of the encoder's states
are computed once per request and passed to the decoder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError
from blip2edge.model.config import LanguageConfig
from blip2edge.model.config_json import Fields, key
from blip2edge.model.interfaces import DecoderModule, LayerStep
from blip2edge.model.layers import (
    ACTIVATIONS,
    Attention,
    FeedForward,
    KeyValue,
    RMSNorm,
    append_to_cache,
    causal_bias,
    key_mask_bias,
    stack,
)

T5_MAX_POSITIONS = 2048
"""Longest context in tokens. T5's relative positions have no limit, but bundles and TensorRT engines need one."""


@dataclass(frozen=True)
class T5Config(LanguageConfig):
    """Config of T5, with the defaults of transformers' T5Config; ``gated`` is true for T5 version 1.1 and Flan-T5."""

    vocab_size: int = key("vocab_size", 32128)
    hidden_size: int = key("d_model", 512)
    ffn_dim: int = key("d_ff", 2048)
    head_dim: int = key("d_kv", 64)
    num_heads: int = key("num_heads", 8)
    num_encoder_layers: int = key("num_layers", 6)
    num_layers: int = 6
    activation: str = "relu"
    gated: bool = False
    num_buckets: int = key("relative_attention_num_buckets", 32)
    max_distance: int = key("relative_attention_max_distance", 128)
    norm_eps: float = key("layer_norm_epsilon", 1e-6)
    scale_outputs: bool = False
    tie_embeddings: bool = True
    max_positions: int = T5_MAX_POSITIONS
    dropout: float = key("dropout_rate", 0.1)

    kind = model_type = "t5"
    is_encoder_decoder = True

    @property
    def cross(self) -> CrossSpec:
        """Describes the cross-attention: every decoder layer attends to the encoder's states."""
        return CrossSpec(self.num_layers, self.num_heads, self.head_dim, self.hidden_size, mask="keys")

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> T5Config:
        """Reads a T5 ``config.json`` or ``text_config``; ``given`` are values of fields that it lacks."""
        f, found = Fields(cls.section, values), cls.read(values)
        kind = f.values.get("feed_forward_proj", "relu")
        gated, _, activation = str(kind).rpartition("-")
        if gated not in ("", "gated"):
            raise CheckpointError(
                f"config.json: text_config.feed_forward_proj must be an activation or gated-ACTIVATION, not {kind!r}"
            )
        activation = "gelu_new" if kind == "gated-gelu" else activation
        if activation not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json: text_config.feed_forward_proj names the activation {activation!r}, which is not one "
                f"of {', '.join(sorted(ACTIVATIONS))}"
            )
        untied = f.values.get("tie_word_embeddings") is False
        return cls(
            **found,
            num_layers=f.integer("num_decoder_layers", found["num_encoder_layers"]),
            activation=activation,
            gated=bool(gated),
            scale_outputs=f.flag("scale_decoder_outputs", not untied),
            **given,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``text_config`` that :meth:`from_hf` reads."""
        activation = "gelu" if self.activation == "gelu_new" else self.activation
        return super().to_hf() | {
            "architectures": ["T5ForConditionalGeneration"],
            "is_encoder_decoder": True,
            "num_decoder_layers": self.num_layers,
            "feed_forward_proj": f"gated-{activation}" if self.gated else self.activation,
            "scale_decoder_outputs": self.scale_outputs,
            "tie_word_embeddings": self.scale_outputs,
        }


def bucket_thresholds(buckets: int, max_distance: int) -> list[int]:
    """Computes the distances at which the next bucket of relative positions begins.

    Each small distance has its own bucket; later buckets grow with the logarithm up to ``max_distance`` (T5's
    ``relative_position_bucket``). With these integers the graph needs no logarithm, so the buckets are the same in
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
    """A learned bias of the attention scores by relative position; all layers of encoder or decoder share one bias."""

    def __init__(self, config: T5Config, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.buckets = config.num_buckets // 2 if bidirectional else config.num_buckets
        self.thresholds = bucket_thresholds(self.buckets, config.max_distance)
        self.table = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Computes the bias ``[B, H, S, T]`` from the positions of queries ``[B, S]`` and keys ``[B, T]``, int64."""
        relative = keys[:, None, :] - queries[:, :, None]  # [B, S, T]
        distance = relative.abs() if self.bidirectional else (-relative).clamp(min=0)
        bucket = torch.zeros_like(distance)
        for threshold in self.thresholds:
            bucket = bucket + (distance >= threshold)
        if self.bidirectional:
            bucket = bucket + (relative > 0) * self.buckets
        return self.table(bucket).permute(0, 3, 1, 2)


class T5Layer(nn.Module):
    """Self-attention, attention to the encoder's states (only in a decoder), feed-forward; each after a norm.

    T5 does not scale the attention scores.
    """

    entry_points: ClassVar[tuple[str, ...]] = ("forward", "cross_key_value")

    def __init__(self, config: T5Config, *, decoder: bool) -> None:
        super().__init__()
        width, sizes = config.hidden_size, (config.hidden_size, config.num_heads, config.head_dim)
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = Attention(*sizes, scale=1.0)
        if decoder:
            self.cross_norm = RMSNorm(width, config.norm_eps)
            self.cross_attention = Attention(*sizes, scale=1.0)
        self.feed_forward_norm = RMSNorm(width, config.norm_eps)
        self.feed_forward = FeedForward(width, config.ffn_dim, config.activation, config.gated)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        bias: Tensor,
        past: KeyValue | None = None,
        cross: KeyValue | None = None,
        cross_bias: Tensor | None = None,
    ) -> tuple[Tensor, KeyValue]:
        """Maps ``x [B, S, D]`` to ``[B, S, D]`` and this layer's keys and values; ``cross`` is None in an encoder."""
        normed = self.attention_norm(x)
        present = append_to_cache(past, self.attention.key_value(normed))
        x = x + self.dropout(self.attention(normed, present, bias))
        if cross is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), cross, cross_bias))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), present

    def cross_key_value(self, states: Tensor) -> KeyValue:
        """Computes this decoder layer's keys and values ``[B, H, E, d]`` from the encoder's E states ``[B, E, D]``."""
        return self.cross_attention.key_value(states)


class T5Encoder(nn.Module):
    """T5's encoder of the prompt."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.relative = RelativeBias(config, bidirectional=True)
        self.layers = stack(T5Layer(config, decoder=False) for _ in range(config.num_encoder_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Maps ``inputs_embeds [B, E, D]`` to states of the same shape.

        ``attention_mask`` is int64 ``[B, E]``. Padding must be on the right, because the index of a token in its row is
        its position.
        """
        slots = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)[None]
        bias = self.relative(slots, slots) + key_mask_bias(attention_mask, inputs_embeds.dtype)
        x = self.dropout(inputs_embeds)
        for layer in self.layers:
            x, _ = layer(x, bias)
        return self.dropout(self.final_norm(x))


class T5(DecoderModule):
    """T5: an encoder of the prompt, and a decoder that attends to the encoder's states."""

    layers: Sequence[T5Layer]

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = T5Encoder(config)
        self.relative = RelativeBias(config, bidirectional=False)
        self.layers = stack(T5Layer(config, decoder=True) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def encode(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Maps the embeddings of E tokens, ``[B, E, D]``, and their mask, int64 ``[B, E]``, to states ``[B, E, D]``."""
        return self.encoder(inputs_embeds, attention_mask)

    def cross_key_values(self, states: Tensor) -> list[KeyValue]:
        """Computes each layer's keys and values ``[B, H, E, d]`` from the encoder's E states ``[B, E, D]``."""
        return [layer.cross_key_value(states) for layer in self.layers]

    def start(
        self, x: Tensor, mask: Tensor, positions: Tensor, cross: Sequence[KeyValue], cross_mask: Tensor | None
    ) -> tuple[Tensor, LayerStep]:
        """Returns the first layer's input and a function that runs one layer (:meth:`DecoderModule.start`)."""
        x = self.dropout(x)
        # Positions of the keys count a row's valid slots, so that rows of a batch may be ragged.
        keys = (mask.cumsum(dim=1) - 1).clamp(min=0)
        bias = self.relative(positions, keys) + causal_bias(mask, x.shape[1], x.dtype)
        if cross_mask is None:
            cross_mask = mask.new_ones(x.shape[0], cross[0][0].shape[2])
        cross_bias = key_mask_bias(cross_mask, x.dtype)
        return x, lambda index, x, past: self.layers[index](x, bias, past, cross[index], cross_bias)

    def logits(self, x: Tensor) -> Tensor:
        """Maps the last layer's output at K slots, ``[B, K, D]``, to logits ``[B, K, V]`` over V tokens."""
        x = self.dropout(self.final_norm(x))
        if self.config.scale_outputs:
            x = x * self.config.hidden_size**-0.5
        return self.head(x)
