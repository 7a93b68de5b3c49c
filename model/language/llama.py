"""Llama, and the similar models Vicuna, Mistral, Qwen2, Qwen3 and SmolLM; flags of the config select the differences.

Touvron et al., arXiv 2302.13971; rotary positions: Su et al., arXiv 2104.09864; grouped heads: Ainslie et al.,
arXiv 2305.13245; sliding window: Jiang et al., arXiv 2310.06825. The same forward runs prefill, decode steps and the
verification of draft tokens: the cache is an argument, and no state is stored in the module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.model.interfaces import DecoderModule, LayerStep
from blip2edge.model.language.llama_config import LlamaConfig, RopeConfig
from blip2edge.model.layers import (
    FeedForward,
    KeyValue,
    RMSNorm,
    append_to_cache,
    attend,
    causal_bias,
    merge_heads,
    split_heads,
    stack,
)


class Rotary(nn.Module):
    """Computes rotary positions as cosines and sines, always in FP32.

    Export keeps this module in FP32; it finds the module by its name in the model, ``rotary``.
    """

    def __init__(self, head_dim: int, rope: RopeConfig) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rope = rope

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Maps positions int64 ``[B, S]`` to cosines and sines, FP32 ``[B, 1, S, d / 2]`` each."""
        positions = position_ids[:, None, :, None].to(torch.float32)
        angles = positions * self._speeds(position_ids.device)
        return angles.cos(), angles.sin()

    def _speeds(self, device: torch.device) -> Tensor:
        """Returns the rotation in radians per position for each pair of channels, ``[d / 2]``."""
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
    """Rotates ``x [B, H, S, d]``: the first half of ``d`` has the real parts, the second half the imaginary parts."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat([real * cos - imaginary * sin, imaginary * cos + real * sin], dim=-1)


class LlamaAttention(nn.Module):
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
        self.query_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Computes self-attention of the new slots to the cache and the new slots.

        Args:
            x: States of the new slots, ``[B, S, D]``.
            rotation: Cosines and sines from :class:`Rotary`, ``[B, 1, S, d / 2]`` in the dtype of ``x``.
            bias: Added to the attention scores, ``[B, 1, S, P + S]``.
            past: Cached keys and values, ``[B, Hkv, P, d]`` each, or None; keys are stored rotated.

        Returns:
            States ``[B, S, D]``, and keys and values ``[B, Hkv, P + S, d]``.
        """
        query = rotate(self.query_norm(split_heads(self.query(x), self.heads)), *rotation)
        key = rotate(self.key_norm(split_heads(self.key(x), self.kv_heads)), *rotation)
        value = split_heads(self.value(x), self.kv_heads)
        present = append_to_cache(past, (key, value))
        return self.out(merge_heads(self._attend(query, *present, bias))), present

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        if groups == 1:
            return attend(query, key, value, bias, self.scale)
        if not torch.compiler.is_exporting():
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
            return attend(query, key, value, bias, self.scale)
        # A further dimension in the graph avoids copies of the shared keys and values.
        query = query.reshape(query.shape[0], self.kv_heads, groups, *query.shape[2:])  # [B, Hkv, G, S, d]
        out = attend(query, key[:, :, None], value[:, :, None], bias[:, :, None], self.scale)
        return out.flatten(1, 2)


def llama_feed_forward(config: LlamaConfig) -> FeedForward:
    """Makes the feed-forward of a Llama layer: three matrices, gate, up and down (SwiGLU)."""
    return FeedForward(config.hidden_size, config.ffn_dim, config.activation, gated=True, bias=config.mlp_bias)


class LlamaLayer(nn.Module):
    """Self-attention and feed-forward, each after a norm.

    Args:
        config: Sizes of the model.
        window: Sliding window in tokens; None for no window. It is only stored: :class:`LlamaDecoder` makes the layer's
            ``bias`` with it.
    """

    def __init__(self, config: LlamaConfig, window: int | None = None) -> None:
        super().__init__()
        self.window = window
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = LlamaAttention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = llama_feed_forward(config)

    def forward(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], bias: Tensor, past: KeyValue | None
    ) -> tuple[Tensor, KeyValue]:
        """Runs the layer on S new slots after P cached slots; takes the arguments of :meth:`LlamaAttention.forward`.

        Returns:
            States ``[B, S, D]``, and this layer's keys and values ``[B, Hkv, P + S, d]``.
        """
        out, present = self.attention(self.attention_norm(x), rotation, bias, past)
        x = x + out
        return x + self.feed_forward(self.feed_forward_norm(x)), present


class LlamaDecoder(DecoderModule):
    """Decoder of Llama and similar models."""

    layers: Sequence[LlamaLayer]

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.rotary = Rotary(config.head_dim, config.rope)
        self.layers = stack(LlamaLayer(config, config.window_of(index)) for index in range(config.num_layers))
        self.final_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def start(self, x: Tensor, mask: Tensor, positions: Tensor, *_: Any) -> tuple[Tensor, LayerStep]:
        """Returns the first layer's input and a function that runs one layer (:meth:`DecoderModule.start`)."""
        cos, sin = self.rotary(positions)
        rotation = (cos.to(x.dtype), sin.to(x.dtype))
        windows: set[int | None] = {layer.window for layer in self.layers}
        bias = {window: causal_bias(mask, x.shape[1], x.dtype, window) for window in windows}

        def step(index: int, x: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
            layer = self.layers[index]
            return layer(x, rotation, bias[layer.window], past)

        return x, step

    def logits(self, x: Tensor) -> Tensor:
        """Maps the last layer's output at K slots, ``[B, K, D]``, to logits ``[B, K, V]`` over V tokens."""
        return self.head(self.final_norm(x))
