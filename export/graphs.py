"""The graphs of a captioner: their tensors as data, and a thin torch module for each.

A wrapper's attributes carry the names they have in ``CaptionerModel``, so that an initializer of the graph is
called as the parameter of the checkpoint that fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from blip2edge.contract import BRIDGE, DECODER, VISION, Axis, CacheSpec, GraphSpec, TensorSpec
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig

MAX_BATCH = 8
MAX_ASKED = 16  # slots that get logits at once: drafts of up to 15 tokens


class VisionGraph(nn.Module):
    """pixel_values → image_embeds."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, P, Dv]``."""
        return self.vision(pixel_values)  # type: ignore[no-any-return]


class BridgeGraph(nn.Module):
    """image_embeds → visual_tokens."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.bridge = model.bridge

    def forward(self, image_embeds: Tensor) -> Tensor:
        """``[B, P, Dv]`` to ``[B, Q, D]``."""
        return self.bridge(image_embeds)  # type: ignore[no-any-return]


class DecoderGraph(nn.Module):
    """The decoder contract, the cache as a flat list of tensors."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.language = model.language

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor,
        *past: Tensor,
    ) -> tuple[Tensor, ...]:
        """See the contract: logits first, then keys and values layer by layer."""
        pairs = list(zip(past[::2], past[1::2], strict=True))
        logits, presents = self.language(inputs_embeds, attention_mask, position_ids, logits_indices, pairs)
        return (logits, *(tensor for pair in presents for tensor in pair))


@dataclass(frozen=True)
class GraphDefinition:
    """A graph: the module that computes it and the tensors it takes and gives."""

    wrap: Callable[[CaptionerModel], nn.Module]
    spec: Callable[[CaptionerConfig], GraphSpec]


def batch_axis() -> Axis:
    """Pictures at once."""
    return Axis("batch", 1, 1, MAX_BATCH)


def cache_of(config: CaptionerConfig) -> CacheSpec:
    """The cache of a captioner's language model."""
    language = config.language
    return CacheSpec(language.num_layers, language.num_kv_heads, language.head_dim)


def vision_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of the vision encoder."""
    vision, batch = config.vision, batch_axis()
    pixels = TensorSpec("pixel_values", "float32", (batch, 3, vision.image_size, vision.image_size))
    return GraphSpec(VISION, (pixels,), (image_embeds(config),))


def image_embeds(config: CaptionerConfig) -> TensorSpec:
    """What the vision encoder hands to the bridge."""
    return TensorSpec("image_embeds", "float32", (batch_axis(), config.vision.num_positions, config.vision.hidden_size))


def bridge_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of the bridge."""
    dims = (batch_axis(), config.bridge.num_visual_tokens, config.language.embed_dim)
    return GraphSpec(BRIDGE, (image_embeds(config),), (TensorSpec("visual_tokens", "float32", dims),))


def decoder_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of the decoder, prefill and decode alike."""
    language, cache, longest = config.language, cache_of(config), config.language.max_positions
    batch, asked = batch_axis(), Axis("asked", 1, 1, MAX_ASKED)
    past = Axis("past", 0, min(64, longest - 1), longest - 1)
    steps = Axis("steps", 1, 1, longest)
    total = past + steps
    heads = cache.num_heads, cache.head_dim
    inputs = [
        TensorSpec("inputs_embeds", "float32", (batch, steps, language.embed_dim)),
        TensorSpec("attention_mask", "int64", (batch, total)),
        TensorSpec("position_ids", "int64", (batch, steps)),
        TensorSpec("logits_indices", "int64", (batch, asked)),
    ]
    inputs += [TensorSpec(name, "float32", (batch, heads[0], past, heads[1])) for name in cache.past_names()]
    outputs = [TensorSpec("logits", "float32", (batch, asked, language.vocab_size))]
    outputs += [TensorSpec(name, "float32", (batch, heads[0], total, heads[1])) for name in cache.present_names()]
    return GraphSpec(DECODER, tuple(inputs), tuple(outputs))


GRAPHS: dict[str, GraphDefinition] = {
    VISION: GraphDefinition(VisionGraph, vision_spec),
    BRIDGE: GraphDefinition(BridgeGraph, bridge_spec),
    DECODER: GraphDefinition(DecoderGraph, decoder_spec),
}
