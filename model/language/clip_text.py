"""The text encoder of CLIP (Radford et al., arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blip2edge.model.config_json import Fields, Key, check_heads, transformer_keys, write_keys
from blip2edge.model.layers import causal_bias, stack
from blip2edge.model.vision.vit import Block

LEGACY_EOS = 2
"""Wrong ``eos_token_id`` of older configs. With it, the largest id of a text marks its end."""


CLIP_EOS = 49407

CLIP_TEXT_KEYS = (
    Key("vocab_size", "vocab_size", "integer", 49408),
    *transformer_keys(512, 2048, 12, 8),
    Key("max_positions", "max_position_embeddings", "integer", 77),
    Key("activation", "hidden_act", "activation", "quick_gelu"),
    Key("norm_eps", "layer_norm_eps", "number", 1e-5),
)
"""``text_config`` with the defaults of transformers' CLIPTextConfig."""


@dataclass(frozen=True)
class ClipTextConfig:
    """A causal transformer; its state at the end token represents the text."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    eos_token_id: int = CLIP_EOS

    kind = "clip_text_model"
    qkv_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_heads("text_config", self.hidden_size, self.num_heads)

    @classmethod
    def from_hf(cls, values: Any) -> ClipTextConfig:
        """Reads the ``text_config`` of a CLIP ``config.json``."""
        f = Fields("text_config", values)
        eos = f.token_id("eos_token_id", CLIP_EOS)
        return cls(**f.read(CLIP_TEXT_KEYS), eos_token_id=CLIP_EOS if eos is None else eos)

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        return {
            "model_type": self.kind,
            **write_keys(self, CLIP_TEXT_KEYS),
            "eos_token_id": self.eos_token_id,
        }


class ClipText(nn.Module):
    """Token ids to the state at the end token."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = stack(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 ``[B, S]`` twice, padded on the right, to ``[B, D]``."""
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids) + self.positions(slots)
        bias = causal_bias(attention_mask, input_ids.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.final_norm(x)
        return (x * self.end(input_ids).to(x.dtype)[:, :, None]).sum(dim=1)

    def end(self, input_ids: Tensor) -> Tensor:
        """1 at the first end token of each row, else 0: ``[B, S]``; at the first slot where there is none."""
        if self.eos_token_id == LEGACY_EOS:
            ends = input_ids == input_ids.amax(dim=1, keepdim=True)
        else:
            ends = input_ids == self.eos_token_id
        count = ends.long().cumsum(dim=1)
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        none = (count[:, -1:] == 0) & (slots[None] == 0)
        return (ends & (count == 1)) | none
