"""OPT, a decoder-only language model (Zhang et al., arXiv 2205.01068).

The same forward runs prefill, decode steps and the verification of draft tokens: the cache is an argument, and no state
is stored in the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blip2edge.model.config import LanguageConfig
from blip2edge.model.config_json import Fields, check_heads, key
from blip2edge.model.interfaces import DecoderModule, LayerStep
from blip2edge.model.layers import (
    ACTIVATIONS,
    Attention,
    KeyValue,
    append_to_cache,
    causal_bias,
    stack,
)

POSITION_OFFSET = 2
"""Unused rows at the start of OPT's position table (metaseq's padding_idx + 1)."""


@dataclass(frozen=True)
class OPTConfig(LanguageConfig):
    """Config of OPT, with the defaults of transformers' OPTConfig.

    OPT-350m has its norms after the blocks and a narrower token table.
    """

    vocab_size: int = key("vocab_size", 50272)
    hidden_size: int = key("hidden_size", 768)
    ffn_dim: int = key("ffn_dim", 3072)
    num_layers: int = key("num_hidden_layers", 12)
    num_heads: int = key("num_attention_heads", 12)
    max_positions: int = key("max_position_embeddings", 2048)
    embed_dim: int = 0
    activation: str = key("activation_function", "relu")
    norm_before: bool = key("do_layer_norm_before", True)
    final_norm: bool = True
    bias: bool = key("enable_bias", True)
    norm_affine: bool = key("layer_norm_elementwise_affine", True)
    tie_embeddings: bool = key("tie_word_embeddings", True)
    dropout: float = key("dropout", 0.1)

    kind = model_type = "opt"

    def __post_init__(self) -> None:
        check_heads("text_config", self.hidden_size, self.num_heads)
        if self.embed_dim == 0:
            object.__setattr__(self, "embed_dim", self.hidden_size)

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> OPTConfig:
        """Reads an OPT ``config.json`` or ``text_config``; ``given`` are values of fields that it lacks."""
        f, found = Fields(cls.section, values), cls.read(values)
        return cls(
            **found,
            embed_dim=f.integer("word_embed_proj_dim", found["hidden_size"]),
            final_norm=found["norm_before"] and not f.flag("_remove_final_layer_norm", False),
            **given,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``text_config`` that :meth:`from_hf` reads."""
        return super().to_hf() | {
            "architectures": ["OPTForCausalLM"],
            "word_embed_proj_dim": self.embed_dim,
            "_remove_final_layer_norm": self.norm_before and not self.final_norm,
        }


class OPTLayer(nn.Module):
    """A decoder layer with norms before (most sizes) or after (OPT-350m) self-attention and feed-forward."""

    def __init__(self, config: OPTConfig) -> None:
        super().__init__()
        width, affine = config.hidden_size, config.norm_affine
        self.norm_before = config.norm_before
        self.activation = ACTIVATIONS[config.activation]
        self.attention = Attention(width, config.num_heads, config.head_dim, bias=config.bias)
        self.attention_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.fc1 = nn.Linear(width, config.ffn_dim, bias=config.bias)
        self.fc2 = nn.Linear(config.ffn_dim, width, bias=config.bias)
        self.final_norm = nn.LayerNorm(width, elementwise_affine=affine)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, bias: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        """Maps ``x [B, S, D]`` to ``[B, S, D]`` and this layer's keys and values."""
        before = self.norm_before
        normed = self.attention_norm(x) if before else x
        present = append_to_cache(past, self.attention.key_value(normed))
        x = x + self.dropout(self.attention(normed, present, bias))
        x = x if before else self.attention_norm(x)
        out = self.fc2(self.activation(self.fc1(self.final_norm(x) if before else x)))
        x = x + self.dropout(out)
        return x if before else self.final_norm(x), present


class OPTDecoder(DecoderModule):
    """Decoder of OPT, a decoder-only language model."""

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

    def start(self, x: Tensor, mask: Tensor, positions: Tensor, *_: Any) -> tuple[Tensor, LayerStep]:
        """Returns the first layer's input and a function that runs one layer (:meth:`DecoderModule.start`)."""
        x = x if self.project_in is None else self.project_in(x)
        x = x + self.embed_positions(positions + POSITION_OFFSET)
        bias = causal_bias(mask, x.shape[1], x.dtype)
        return x, lambda index, x, past: self.layers[index](x, bias, past)

    def logits(self, x: Tensor) -> Tensor:
        """Maps the last layer's output at K slots, ``[B, K, D]``, to logits ``[B, K, V]`` over V tokens."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        if self.project_out is not None:
            x = self.project_out(x)
        return self.head(x)
