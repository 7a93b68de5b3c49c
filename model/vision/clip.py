"""CLIP's text side (Radford et al., arXiv 2103.00020, section 2.4), and how it meets the picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from blip2edge.model.config import Fields, check_heads
from blip2edge.model.interfaces import Matcher
from blip2edge.model.layers import Unit, causal_bias, stack
from blip2edge.model.vision.vit import Block

if TYPE_CHECKING:
    from blip2edge.model.retrieval import RetrievalConfig

LEGACY_EOS = 2
"""An ``eos_token_id`` that older configs hold by mistake: there the largest id of a text stands at its end."""


@dataclass(frozen=True)
class ClipTextConfig:
    """A causal transformer whose state at the text's end is the text."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int = 77
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    eos_token_id: int = 49407

    kind = "clip_text_model"
    qkv_bias: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_heads("text_config", self.hidden_size, self.num_heads)

    @classmethod
    def from_hf(cls, values: Any) -> ClipTextConfig:
        """Reads the ``text_config`` of a CLIP ``config.json``."""
        f = Fields("text_config", values)
        eos = f.token_id("eos_token_id", 49407)
        return cls(
            vocab_size=f.integer("vocab_size", 49408),
            hidden_size=f.integer("hidden_size", 512),
            intermediate_size=f.integer("intermediate_size", 2048),
            num_layers=f.integer("num_hidden_layers", 12),
            num_heads=f.integer("num_attention_heads", 8),
            max_positions=f.integer("max_position_embeddings", 77),
            activation=f.activation("hidden_act", "quick_gelu"),
            norm_eps=f.number("layer_norm_eps", 1e-5),
            eos_token_id=49407 if eos is None else eos,
        )

    def to_hf(self) -> dict[str, Any]:
        """The ``text_config`` that :meth:`from_hf` reads."""
        return {
            "model_type": "clip_text_model",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "max_position_embeddings": self.max_positions,
            "hidden_act": self.activation,
            "layer_norm_eps": self.norm_eps,
            "eos_token_id": self.eos_token_id,
        }


class ClipText(nn.Module):
    """Token ids to the state at the text's end."""

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


class ClipMatcher(Matcher):
    """CLIP: a vector of the class token, a vector of the text's end, and no head that reads both."""

    def __init__(self, config: RetrievalConfig) -> None:
        super().__init__()
        text: Any = config.text
        self.text = ClipText(text)
        self.image_projection = nn.Linear(config.vision.hidden_size, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(text.hidden_size, config.embed_dim, bias=False)
        self.unit = Unit()

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """``[B, P, Dv]`` to ``[B, 1, F]`` of length 1."""
        return self.unit(self.image_projection(image_embeds[:, :1]))

    def text_embeds(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Int64 ``[B, S]`` twice, padded on the right, to ``[B, F]`` of length 1."""
        return self.unit(self.text_projection(self.text(input_ids, attention_mask)))
