"""Flamingo's decoder: a Llama with gated cross-attention layers between its layers (arXiv 2204.14198, 3.2).

Before every ``cross_interval``-th layer, a gated layer lets each token attend to the visual tokens of the last picture
before it. The keys and values of those tokens are computed once per request. The output of a gated layer is multiplied
by the tanh of a learned gate, which is 0 at the start of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from blip2edge.bundle.schema import CrossSpec
from blip2edge.errors import CheckpointError
from blip2edge.model.config_json import Fields, Section, check_heads, key, layered
from blip2edge.model.interfaces import LayerStep
from blip2edge.model.language.llama import LlamaDecoder, llama_feed_forward
from blip2edge.model.language.llama_config import LlamaConfig
from blip2edge.model.layers import (
    MASKED,
    Attention,
    KeyValue,
    RMSNorm,
    stack,
)

GATES = ("float", "vector")
"""Values of the key ``alpha_type``: ``float`` for one gate per layer, ``vector`` for one gate per channel."""


@dataclass(frozen=True)
class FlamingoConfig(LlamaConfig):
    """Config of a Llama with gated cross-attention layers, as in Idefics.

    Attributes:
        base_vocab_size: Rows of the original Llama's token table and head; additional rows, up to ``vocab_size``, are
            separate tensors in a checkpoint.
        cross_interval: Number n: a gated layer comes before each of the Llama layers 0, n, 2n and so on.
        qk_norms: Whether queries and keys of the gated layers are normed.
        gates: Kind of the gates, one of :data:`GATES`.
        source: What the gated layers attend to: ``visual_tokens``, or ``image_embeds`` without a resampler.
        source_dim: Width of ``source``.
    """

    base_vocab_size: int = 0
    cross_interval: int = key("cross_layer_interval", 1)
    qk_norms: bool = key("qk_layer_norms", False)
    gates: str = "float"
    source: str = "visual_tokens"
    source_dim: int = 768
    kind: str = "idefics"

    section = "config.json"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.section, self.hidden_size, self.num_heads)
        if self.gates not in GATES:
            raise CheckpointError(f"config.json: alpha_type is {self.gates!r}, not one of {', '.join(GATES)}")
        if self.num_layers % self.cross_interval:
            raise CheckpointError(
                f"config.json: a cross_layer_interval of {self.cross_interval} does not divide {self.num_layers} "
                "layers; expected a divisor of the number of layers"
            )

    @property
    def cross(self) -> CrossSpec:
        """Describes the cross-attention: in every gated layer, a token attends to the last picture before it."""
        layers = self.num_layers // self.cross_interval
        return CrossSpec(layers, self.num_heads, self.head_dim, self.source_dim, "steps", self.source)

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> FlamingoConfig:
        """Reads the language model's keys, at the top level of an Idefics ``config.json``.

        ``given`` are values of fields that the file lacks.
        """
        f = Fields(cls.section, values)
        own = Fields("vision_config", f.values.get("vision_config") or {})
        resampled = f.flag("use_resampler", False)
        rows = f.integer("vocab_size", cls.vocab_size)
        return super().from_hf(
            layered({"model_type": "llama", "num_key_value_heads": None}, f.values),
            kind="idefics",
            vocab_size=rows + f.count("additional_vocab_size"),
            base_vocab_size=rows,
            gates=str(f.values.get("alpha_type", "float")),
            source="visual_tokens" if resampled else "image_embeds",
            source_dim=own.integer("embed_dim", own.integer("hidden_size", 768)),
            **given,
        )

    def to_hf(self) -> dict[str, Any]:
        """Returns the keys of an Idefics ``config.json`` that :meth:`from_hf` reads."""
        return {
            **Section.to_hf(self),
            "vocab_size": self.base_vocab_size,
            "additional_vocab_size": self.vocab_size - self.base_vocab_size,
            "rope_parameters": self.rope.to_hf(),
            "alpha_type": self.gates,
            "use_resampler": self.source == "visual_tokens",
        }


class GatedLayer(nn.Module):
    """Attention to the pictures and a feed-forward, each with a norm before and a gate after."""

    entry_points: ClassVar[tuple[str, ...]] = ("forward", "key_value")

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__()
        shape = (1, 1, config.hidden_size) if config.gates == "vector" else (1,)
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.head_dim,
            context_width=config.source_dim,
            norm=partial(RMSNorm, config.head_dim, config.norm_eps) if config.qk_norms else None,
        )
        self.attention_gate = nn.Parameter(torch.zeros(shape))
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = llama_feed_forward(config)
        self.feed_forward_gate = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, cross: KeyValue, bias: Tensor, has_picture: Tensor) -> Tensor:
        """Adds attention to the pictures, then a feed-forward.

        Args:
            x: States ``[B, S, D]``.
            cross: Keys and values of the pictures, ``[B, H, E, d]`` each.
            bias: Added to the attention scores, ``[B, 1, S, E]``.
            has_picture: ``[B, S, 1]``, 0 where a token attends to no picture. The attention adds nothing to such a
                token; the feed-forward adds to every token.
        """
        attended = self.attention(self.attention_norm(x), cross, bias) * has_picture
        x = x + torch.tanh(self.attention_gate) * attended
        return x + torch.tanh(self.feed_forward_gate) * self.feed_forward(self.feed_forward_norm(x))

    def key_value(self, source: Tensor) -> KeyValue:
        """Computes keys and values ``[B, H, E, d]`` from the E embeddings of the pictures, ``source [B, E, Ds]``."""
        return self.attention.key_value(source)


class Flamingo(LlamaDecoder):
    """A Llama with gated cross-attention layers; the embeddings of added tokens are at the end of its token table."""

    config: FlamingoConfig

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        count = config.num_layers // config.cross_interval
        self.cross_layers = stack(GatedLayer(config) for _ in range(count))

    def cross_key_values(self, source: Tensor) -> list[KeyValue]:
        """Computes each gated layer's keys and values ``[B, H, E, d]`` from E picture embeddings ``[B, E, Ds]``."""
        return [layer.key_value(source) for layer in self.cross_layers]

    def start(
        self, x: Tensor, mask: Tensor, positions: Tensor, cross: Sequence[KeyValue], cross_mask: Tensor | None
    ) -> tuple[Tensor, LayerStep]:
        """Returns the first layer's input and a function that runs one layer (:meth:`DecoderModule.start`)."""
        if cross_mask is None:
            cross_mask = mask.new_ones(*x.shape[:2], cross[0][0].shape[2])
        attended = cross_mask.to(x.dtype)
        has_picture = attended.amax(dim=-1, keepdim=True)  # [B, S, 1]
        cross_bias = ((1 - attended) * MASKED)[:, None]  # [B, 1, S, E]
        x, llama = super().start(x, mask, positions)

        def step(index: int, x: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
            number, rest = divmod(index, self.config.cross_interval)
            if not rest:
                x = self.cross_layers[number](x, cross[number], cross_bias, has_picture)
            return llama(index, x, past)

        return x, step
