"""The text encoder of CLIP (Radford et al., arXiv 2103.00020, section 2.4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blip2edge.model.config import TransformerConfig
from blip2edge.model.config_json import Fields, key
from blip2edge.model.layers import causal_bias, stack
from blip2edge.model.vision.vit import Block

LEGACY_EOS = 2
"""Wrong ``eos_token_id`` in older configs. For such a config, the token with the largest id counts as the end token."""

CLIP_EOS = 49407


@dataclass(frozen=True)
class ClipTextConfig(TransformerConfig):
    """Config of CLIP's text encoder: a causal transformer whose state at the end token represents the text.

    The defaults are those of transformers' CLIPTextConfig.
    """

    vocab_size: int = key("vocab_size", 49408)
    hidden_size: int = key("hidden_size", 512)
    intermediate_size: int = key("intermediate_size", 2048)
    num_heads: int = key("num_attention_heads", 8)
    max_positions: int = key("max_position_embeddings", 77)
    activation: str = key("hidden_act", "quick_gelu")
    norm_eps: float = key("layer_norm_eps", 1e-5)
    eos_token_id: int = CLIP_EOS

    kind = model_type = "clip_text_model"

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> ClipTextConfig:
        """Reads the ``text_config`` of a CLIP ``config.json``; ``given`` are values of fields that it lacks."""
        eos = Fields(cls.section, values).token_id("eos_token_id", CLIP_EOS)
        return super().from_hf(values, eos_token_id=CLIP_EOS if eos is None else eos, **given)

    def to_hf(self) -> dict[str, Any]:
        """Returns the ``text_config`` that :meth:`from_hf` reads."""
        return super().to_hf() | {"eos_token_id": self.eos_token_id}


class ClipText(nn.Module):
    """CLIP's text encoder."""

    def __init__(self, config: ClipTextConfig) -> None:
        super().__init__()
        self.eos_token_id = config.eos_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(config.max_positions, config.hidden_size)
        self.layers = stack(Block(config) for _ in range(config.num_layers))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Returns the state at the end token ``[B, D]``; ids and mask are int64 ``[B, S]``, padded on the right."""
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.embed_tokens(input_ids) + self.positions(slots)
        bias = causal_bias(attention_mask, input_ids.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, bias)
        x = self.final_norm(x)
        return (x * self.end(input_ids).to(x.dtype)[:, :, None]).sum(dim=1)

    def end(self, input_ids: Tensor) -> Tensor:
        """Returns a mask, bool ``[B, S]``, that is true at the first end token of each row.

        In a row without an end token, it is true at the first slot.
        """
        if self.eos_token_id == LEGACY_EOS:
            ends = input_ids == input_ids.amax(dim=1, keepdim=True)
        else:
            ends = input_ids == self.eos_token_id
        count = ends.long().cumsum(dim=1)
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        none = (count[:, -1:] == 0) & (slots[None] == 0)
        return (ends & (count == 1)) | none
