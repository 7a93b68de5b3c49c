"""Llama and its kin in one module: Vicuna, Mistral, Qwen2, SmolLM; what differs are flags of the config.

Touvron et al., arXiv 2302.13971; rotary positions: Su et al., arXiv 2104.09864; grouped heads: Ainslie et al.,
arXiv 2305.13245; sliding window: Jiang et al., arXiv 2310.06825. One forward serves prefill, decoding and
verification: the cache is an argument, not a state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.contract import CrossSpec
from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.model.config import Fields
from blip2edge.model.layers import (
    ACTIVATIONS,
    KeyValue,
    RMSNorm,
    attend,
    causal_bias,
    gather_positions,
    merge_heads,
    split_heads,
)

ROPE_KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """How fast the rotary positions turn.

    Attributes:
        theta: Base of the wavelengths.
        kind: One of :data:`ROPE_KINDS`: as they are, all slowed by ``factor``, or (Llama 3.1) the slow ones alone.
        factor: How much slower.
        low_freq_factor: Llama 3.1: wavelengths beyond ``original_positions / low_freq_factor`` are slowed.
        high_freq_factor: Llama 3.1: wavelengths below ``original_positions / high_freq_factor`` are not.
        original_positions: Context that the model was first trained with.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    @classmethod
    def from_hf(cls, values: Mapping[str, Any], max_positions: int) -> RopeConfig:
        """Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (before).

        Raises:
            UnsupportedModelError: A kind without a row.
        """
        f = Fields("rope_parameters", values.get("rope_parameters") or values.get("rope_scaling") or {})
        kind = f.values.get("rope_type", f.values.get("type", "default"))
        partial = f.values.get("partial_rotary_factor", values.get("partial_rotary_factor"))
        if kind not in ROPE_KINDS or partial not in (None, 1, 1.0):
            what = f"of kind {kind!r}" if kind not in ROPE_KINDS else "over a part of each head"
            raise UnsupportedModelError(
                f"the language model has rotary positions {what}, which are not supported",
                f"supported: {', '.join(ROPE_KINDS)}, over whole heads",
            )
        theta = f.number("rope_theta", Fields("text_config", values).number("rope_theta", 10_000.0))
        if kind == "default":
            return cls(theta)
        if kind == "linear":
            return cls(theta, kind, f.number("factor", None))
        return cls(
            theta,
            kind,
            f.number("factor", None),
            f.number("low_freq_factor", None),
            f.number("high_freq_factor", None),
            f.integer("original_max_position_embeddings", max_positions),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``rope_parameters`` that :meth:`from_hf` reads."""
        found: dict[str, Any] = {"rope_type": self.kind, "rope_theta": self.theta}
        if self.kind != "default":
            found["factor"] = self.factor
        if self.kind == "llama3":
            found |= {
                "low_freq_factor": self.low_freq_factor,
                "high_freq_factor": self.high_freq_factor,
                "original_max_position_embeddings": self.original_positions,
            }
        return found


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and variants.

    Attributes:
        qkv_bias: Queries, keys and values have biases (Qwen2).
        out_bias: So has the matrix behind the heads.
        mlp_bias: So have the three of the feed-forward.
        window: A slot sees this many slots, its own included; None for all (Mistral 0.1, Qwen2).
        window_layers: The layers that the window holds for.
        kind: transformers' ``model_type``: ``llama``, ``mistral`` or ``qwen2``.
    """

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int = 2048
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    rope: RopeConfig = field(default_factory=RopeConfig)
    kind: str = "llama"

    is_encoder_decoder = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json: text_config: {self.num_kv_heads} key/value heads do not divide {self.num_heads} heads"
            )
        if self.head_dim % 2:
            raise CheckpointError(
                f"config.json: text_config: rotary positions need an even head_dim, not {self.head_dim}"
            )

    @property
    def embed_dim(self) -> int:
        """Width of the token table."""
        return self.hidden_size

    @property
    def cross(self) -> CrossSpec | None:
        """It looks at nothing but its text."""
        return None

    def window_of(self, layer: int) -> int | None:
        """The window of one layer."""
        return self.window if layer in self.window_layers else None

    @classmethod
    def from_hf(cls, values: Any) -> LlamaConfig:
        """Reads a ``config.json`` or ``text_config`` of Llama, Mistral or Qwen2, with each one's defaults."""
        f = Fields("text_config", values)
        kind = str(f.values.get("model_type", "llama"))
        sizes = DEFAULTS[kind]
        heads = f.integer("num_attention_heads", 32)
        hidden, layers = f.integer("hidden_size", 4096), f.integer("num_hidden_layers", 32)
        longest = f.integer("max_position_embeddings", sizes["max_position_embeddings"])
        bias = kind == "llama" and f.flag("attention_bias", False)
        window, window_layers = _window(kind, f, layers)
        return cls(
            vocab_size=f.integer("vocab_size", sizes["vocab_size"]),
            hidden_size=hidden,
            ffn_dim=f.integer("intermediate_size", sizes["intermediate_size"]),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=_kv_heads(f, heads, sizes),
            head_dim=f.integer("head_dim", hidden // heads),
            max_positions=longest,
            activation=f.activation("hidden_act", "silu"),
            norm_eps=f.number("rms_norm_eps", 1e-6),
            qkv_bias=bias or kind == "qwen2",
            out_bias=bias,
            mlp_bias=kind == "llama" and f.flag("mlp_bias", False),
            tie_embeddings=f.flag("tie_word_embeddings", False),
            window=window,
            window_layers=window_layers,
            rope=RopeConfig.from_hf(f.values, longest),
            kind=kind,
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
        own: dict[str, dict[str, Any]] = {
            "llama": {"attention_bias": self.out_bias, "mlp_bias": self.mlp_bias},
            "mistral": {"sliding_window": self.window},
            "qwen2": {
                "use_sliding_window": self.window is not None,
                "sliding_window": self.window,
                "layer_types": [
                    "sliding_attention" if layer in self.window_layers else "full_attention"
                    for layer in range(self.num_layers)
                ],
            },
        }
        return {
            "model_type": self.kind,
            "architectures": [f"{names[self.kind]}ForCausalLM"],
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.ffn_dim,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "hidden_act": self.activation,
            "rms_norm_eps": self.norm_eps,
            "rope_parameters": self.rope.to_hf(),
            "tie_word_embeddings": self.tie_embeddings,
            **own[self.kind],
        }


DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
    },
    "qwen2": {
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
    },
}
"""What transformers' configs assume where ``config.json`` is silent."""


def _kv_heads(f: Fields, heads: int, sizes: Mapping[str, int]) -> int:
    """An absent number is the class's default, a null as many as there are heads: as in transformers."""
    if "num_key_value_heads" in f.values:
        return f.integer("num_key_value_heads", heads)
    return sizes.get("num_key_value_heads", heads)


def _window(kind: str, f: Fields, layers: int) -> tuple[int | None, tuple[int, ...]]:
    """The sliding window, and which layers it holds for."""
    used = kind == "mistral" or (kind == "qwen2" and f.flag("use_sliding_window", False))
    if not used or f.values.get("sliding_window", 4096) is None:
        return None, ()
    window = f.integer("sliding_window", 4096)
    if kind == "mistral":
        return window, tuple(range(layers))
    types = f.values.get("layer_types")
    if types is None:
        return window, tuple(range(f.integer("max_window_layers", 28), layers))
    return window, tuple(layer for layer, name in enumerate(types) if name == "sliding_attention")


class Rotary(nn.Module):
    """Positions as angles.

    Always in FP32, whatever the rest computes in. The exporter knows it by the name ``rotary`` of the submodule.
    """

    def __init__(self, head_dim: int, rope: RopeConfig) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope = rope

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 ``[B, S]`` to cosines and sines, FP32 ``[B, 1, S, d / 2]``."""
        positions = position_ids[:, None, :, None].to(torch.float32)
        angles = positions * self._speeds(position_ids.device)
        return angles.cos(), angles.sin()

    def _speeds(self, device: torch.device) -> Tensor:
        """Radians a position, ``[d / 2]``."""
        rope = self.rope
        exponents = torch.arange(0, self.head_dim, 2, device=device).to(torch.float32) / self.head_dim
        speeds = 1.0 / rope.theta**exponents
        if rope.kind == "linear":
            return speeds / rope.factor
        if rope.kind == "llama3":  # meta-llama/llama-models, apply_scaling
            turns = rope.original_positions * speeds / (2 * math.pi)  # within the original context
            kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            kept = kept.clamp(0.0, 1.0)
            return (1 - kept) * speeds / rope.factor + kept * speeds
        return speeds


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``x [B, H, S, d]``: its first half are real parts, its second imaginary ones."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


class Attention(nn.Module):
    """Causal self-attention over the cache and the new slots; several query heads share a key/value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.num_heads * config.head_dim
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.scale = config.head_dim**-0.5
        self.query = nn.Linear(width, inner, bias=config.qkv_bias)
        self.key = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.value = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=config.qkv_bias)
        self.out = nn.Linear(inner, width, bias=config.out_bias)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Looks back.

        Args:
            x: ``[B, S, D]``.
            rotation: Two of ``[B, 1, S, d / 2]`` in the dtype of ``x``, from :class:`Rotary`.
            bias: ``[B, 1, S, P + S]``.
            past: Two of ``[B, Hkv, P, d]``; keys are stored turned.

        Returns:
            ``[B, S, D]``, and two of ``[B, Hkv, P + S, d]``.
        """
        query = rotate(split_heads(self.query(x), self.heads), *rotation)
        key = rotate(split_heads(self.key(x), self.kv_heads), *rotation)
        value = split_heads(self.value(x), self.kv_heads)
        if past is not None:
            key = torch.cat([past[0], key], dim=2)
            value = torch.cat([past[1], value], dim=2)
        return self.out(merge_heads(self._attend(query, key, value, bias))), (key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        if groups == 1:
            return attend(query, key, value, bias, self.scale)
        if not torch.compiler.is_exporting():
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
            return attend(query, key, value, bias, self.scale)
        # In the graph a further dimension, so that the shared keys and values are never copied.
        query = query.reshape(query.shape[0], self.kv_heads, groups, *query.shape[2:])  # [B, Hkv, G, S, d]
        out = attend(query, key[:, :, None], value[:, :, None], bias[:, :, None], self.scale)
        return out.flatten(1, 2)


class FeedForward(nn.Module):
    """Three matrices: gate, up, down (SwiGLU; Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.gate = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.mlp_bias)
        self.up = nn.Linear(config.hidden_size, config.ffn_dim, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_dim, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, D]`` to ``[B, S, D]``."""
        return self.down(self.activation(self.gate(x)) * self.up(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Self-attention and feed-forward, each behind a norm.

    Args:
        config: Sizes.
        window: What ``bias`` is to be made for; the layer itself does not use it.
    """

    def __init__(self, config: LlamaConfig, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """``x [B, S, D]`` to ``[B, S, D]`` and this layer's keys and values; see :class:`Attention`."""
        out, present = self.attention(self.attention_norm(x), rotation, bias, past)
        x = x + out
        return x + self.feed_forward(self.feed_forward_norm(x)), present


class LlamaDecoder(nn.Module):
    """Embeddings in, logits and the grown cache out."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.head_dim, config.rope)
        self.layers = nn.ModuleList(
            Layer(config, config.window_of(index)) for index in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def embed(self, token_ids: Tensor) -> Tensor:
        """int64 ``[B, S]`` to ``[B, S, D]``."""
        return self.embed_tokens(token_ids)  # type: ignore[no-any-return]

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """The decoder contract.

        Args:
            inputs_embeds: ``[B, S, D]``.
            attention_mask: int64 ``[B, P + S]``, 1 where a slot is valid.
            position_ids: int64 ``[B, S]``, counted from 0.
            logits_indices: int64 ``[B, K]``, which of the S slots need logits; None for all.
            past: A pair of ``[B, Hkv, P, d]`` a layer; None for an empty cache.

        Returns:
            ``logits [B, K, V]`` and a pair of ``[B, Hkv, P + S, d]`` a layer.
        """
        x, steps = inputs_embeds, inputs_embeds.shape[1]
        cos, sin = self.rotary(position_ids)
        rotation = (cos.to(x.dtype), sin.to(x.dtype))
        windows: set[int | None] = {layer.window for layer in self.layers}  # type: ignore[misc]
        bias = {window: causal_bias(attention_mask, steps, x.dtype, window) for window in windows}
        presents: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, rotation, bias[layer.window], None if past is None else past[index])  # type: ignore[index]
            presents.append(present)
        if logits_indices is not None:
            x = gather_positions(x, logits_indices)
        return self.head(self.final_norm(x)), presents
