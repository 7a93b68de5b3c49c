"""OPT with explicit keys and values (Zhang et al., arXiv 2205.01068).

One forward serves prefill, decoding and verification: the cache is an argument, not a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blip2edge.model.config_json import Fields, Key, check_heads, write_keys
from blip2edge.model.interfaces import DecoderModule
from blip2edge.model.layers import (
    ACTIVATIONS,
    KeyValue,
    append_to_cache,
    attend,
    causal_bias,
    gather_positions,
    merge_heads,
    split_heads,
    stack,
)

POSITION_OFFSET = 2
"""Unused rows at the start of OPT's position table (metaseq's padding_idx + 1)."""


OPT_KEYS = (
    Key("vocab_size", "vocab_size", "integer", 50272),
    Key("hidden_size", "hidden_size", "integer", 768),
    Key("ffn_dim", "ffn_dim", "integer", 3072),
    Key("num_layers", "num_hidden_layers", "integer", 12),
    Key("num_heads", "num_attention_heads", "integer", 12),
    Key("max_positions", "max_position_embeddings", "integer", 2048),
    Key("activation", "activation_function", "activation", "relu"),
    Key("norm_before", "do_layer_norm_before", "flag", True),
    Key("bias", "enable_bias", "flag", True),
    Key("norm_affine", "layer_norm_elementwise_affine", "flag", True),
    Key("tie_embeddings", "tie_word_embeddings", "flag", True),
    Key("dropout", "dropout", "number", 0.1),
)
"""``text_config`` with the defaults of transformers' OPTConfig."""


@dataclass(frozen=True)
class OPTConfig:
    """Sizes and variants: 350m has its norms after the blocks and a narrower token table."""

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    max_positions: int = 2048
    embed_dim: int = 0
    activation: str = "relu"
    norm_before: bool = True
    final_norm: bool = True
    bias: bool = True
    norm_affine: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.1

    kind = "opt"
    is_encoder_decoder = False
    cross = None

    def __post_init__(self) -> None:
        check_heads("text_config", self.hidden_size, self.num_heads)
        if self.embed_dim == 0:
            object.__setattr__(self, "embed_dim", self.hidden_size)

    @property
    def num_kv_heads(self) -> int:
        """Heads of the cache."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @classmethod
    def from_hf(cls, values: Any) -> OPTConfig:
        """Reads an OPT ``config.json`` or ``text_config``."""
        f = Fields("text_config", values)
        found = f.read(OPT_KEYS)
        return cls(
            **found,
            embed_dim=f.integer("word_embed_proj_dim", found["hidden_size"]),
            final_norm=found["norm_before"] and not f.flag("_remove_final_layer_norm", False),
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        return {
            "model_type": "opt",
            "architectures": ["OPTForCausalLM"],
            **write_keys(self, OPT_KEYS),
            "word_embed_proj_dim": self.embed_dim,
            "_remove_final_layer_norm": self.norm_before and not self.final_norm,
        }


class OPTAttention(nn.Module):
    """Causal self-attention over the cache and the new slots."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_heads
        self.scale = config.head_dim**-0.5
        self.query = nn.Linear(width, width, bias=config.bias)
        self.key = nn.Linear(width, width, bias=config.bias)
        self.value = nn.Linear(width, width, bias=config.bias)
        self.out = nn.Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, bias: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """``x [B, S, D]``, ``bias [B, 1, S, P + S]``, ``past`` two of ``[B, H, P, d]``."""
        query = split_heads(self.query(x), self.heads)
        key = split_heads(self.key(x), self.heads)
        value = split_heads(self.value(x), self.heads)
        present = append_to_cache(past, (key, value))
        return self.out(merge_heads(attend(query, *present, bias, self.scale))), present


class OPTLayer(nn.Module):
    """A decoder layer with its norms before (most sizes) or after (350m) its two halves."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, affine = config.hidden_size, config.norm_affine
        self.norm_before = config.norm_before
        self.activation = ACTIVATIONS[config.activation]
        self.attention = OPTAttention(config)
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = nn.Linear(width, config.ffn_dim, bias=config.bias)
        self.fc2 = nn.Linear(config.ffn_dim, width, bias=config.bias)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """``x [B, S, D]`` to ``[B, S, D]`` and this layer's keys and values."""
        before = self.norm_before
        out, present = self.attention(self.attention_norm(x) if before else x, bias, past)
        x = x + self.dropout(out)
        x = x if before else self.attention_norm(x)
        out = self.fc2(self.activation(self.fc1(self.final_norm(x) if before else x)))
        x = x + self.dropout(out)
        return x if before else self.final_norm(x), present


class OPTDecoder(DecoderModule):
    """The decoder."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, narrow = config.hidden_size, config.embed_dim
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, narrow)
        self.embed_positions = nn.Embedding(config.max_positions + POSITION_OFFSET, width)
        self.project_in = nn.Linear(narrow, width, bias=False) if narrow != width else None
        self.layers = stack(OPTLayer(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=config.norm_affine) if config.final_norm else None
        self.project_out = nn.Linear(width, narrow, bias=False) if narrow != width else None
        self.head = nn.Linear(narrow, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed_tokens.weight

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor | None = None,
        past: Sequence[KeyValue] | None = None,
    ) -> tuple[Tensor, list[KeyValue]]:
        """The decoder contract; see :class:`DecoderModule`."""
        x = inputs_embeds if self.project_in is None else self.project_in(inputs_embeds)
        x = x + self.embed_positions(position_ids + POSITION_OFFSET)
        bias = causal_bias(attention_mask, inputs_embeds.shape[1], x.dtype)
        presents: list[KeyValue] = []
        for index, layer in enumerate(self.layers):
            x, present = layer(x, bias, None if past is None else past[index])
            presents.append(present)
        x = gather_positions(x, logits_indices)
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.head(x), presents
