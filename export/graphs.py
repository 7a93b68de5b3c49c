"""The graphs of a captioner: for each, a spec of its tensors and a small torch module.

A module's attributes have the same names as in ``CaptionerModel``. So an initializer of the graph has the name of the
checkpoint's parameter that fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

from torch import Tensor, nn

from blip2edge.bundle.schema import (
    BRIDGE,
    CROSS_KV,
    DECODER,
    DRAFT,
    IMAGE_FEATURES,
    INSTRUCTION,
    MATCH,
    QUERY_IDS,
    TEXT_EMBEDS,
    TEXT_ENCODER,
    VISION,
    Axis,
    CacheSpec,
    CrossSpec,
    Dim,
    GraphSpec,
    TensorSpec,
)
from blip2edge.export import retrieval_graphs as retrieval
from blip2edge.export.axes import batch_axis, image_embeds, pictures_axis, queries_dim
from blip2edge.export.draft_graph import DraftGraph, draft_spec, query_outputs
from blip2edge.model.captioner import CaptionerModel
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.language.registry import language_of
from blip2edge.model.layers import KeyValue
from blip2edge.model.models import Config, Model
from blip2edge.model.retrieval import RetrievalConfig

MAX_PICTURES = 8  # in an interleaved prompt, where the decoder attends to them by cross-attention
MAX_ASKED = 16  # tokens that get logits in one run: drafts of up to 15 tokens


class VisionGraph(nn.Module):
    """pixel_values → image_embeds."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to ``[B, P, Dv]``."""
        return self.vision(pixel_values)


class BridgeGraph(nn.Module):
    """image_embeds (and the instruction, for a bridge that reads one) → visual_tokens.

    An elastic bridge has a further input, the numbers of the queries that enter it.
    With a draft model, the keys and values of the query tokens are further outputs.
    """

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.bridge = model.bridge
        self.has_draft = model.draft is not None
        self.elastic = model.config.elastic > 0

    def forward(self, image_embeds: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        """``[B, P, Dv]`` to ``[B, Q, D]``.

        Args:
            image_embeds: ``[B, P, Dv]``.
            *rest: The instruction's ids and mask, int64 ``[B, T]``, if the bridge reads one; then ``query_ids``, int64
                ``[B, Q]``, if it is elastic.
        """
        instruction, queries = (rest[:-1], {QUERY_IDS: rest[-1]}) if self.elastic else (rest, {})
        if not self.has_draft:
            return self.bridge(image_embeds, *instruction, **queries)
        bridge: Any = self.bridge
        states, key_values = bridge.qformer.read(image_embeds, **queries)
        return (bridge.projection(states), *(tensor for pair in key_values for tensor in pair))


class TextEncoderGraph(nn.Module):
    """The inputs of the text encoder (``Language.encoder_inputs``) → encoder_states."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.language = model.language

    def forward(self, *inputs: Tensor) -> Tensor:
        """``[B, E, D]`` or ids ``[B, E]``, their mask, and perhaps ``image_embeds``, to ``[B, E, D]``."""
        return self.language.encode(*inputs)


class CrossKeyValueGraph(nn.Module):
    """The source of the cross-attention → its keys and values, layer by layer."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.language = model.language

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        """``[B, E, Ds]`` to two of ``[B, H, E, d]`` a layer."""
        pairs = self.language.cross_key_values(source)
        return tuple(tensor for pair in pairs for tensor in pair)


class DecoderGraph(nn.Module):
    """The decoder, with its KV cache as a flat list of tensors."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.language = model.language
        self.cross = model.config.language.cross

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        logits_indices: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        """Logits, then keys and values layer by layer.

        Args:
            inputs_embeds: ``[B, S, D]``.
            attention_mask: int64 ``[B, P + S]``.
            position_ids: int64 ``[B, S]``.
            logits_indices: int64 ``[B, K]``.
            *rest: The KV cache; with cross-attention, then its keys and values, and its mask if it has one.
        """
        split = 2 * len(self.language.layers)
        past, more = _pairs(rest[:split]), rest[split:]
        extra: dict[str, Any] = {}
        if self.cross is not None and self.cross.mask != "none":
            extra["cross_attention_mask"], more = more[-1], more[:-1]
        if self.cross is not None:
            extra["cross"] = _pairs(more)
        logits, presents = self.language(inputs_embeds, attention_mask, position_ids, logits_indices, past, **extra)
        return (logits, *(tensor for pair in presents for tensor in pair))


def _pairs(tensors: Sequence[Tensor]) -> list[KeyValue]:
    return list(zip(tensors[::2], tensors[1::2], strict=True))


@dataclass(frozen=True)
class GraphDefinition:
    """A graph of the bundle.

    Attributes:
        wrap: Makes the module that computes the graph from a model.
        spec: Makes the spec of its tensors from a config.
        stacks: Possible paths of its repeated layers; the first that exists is used.
        belongs: Whether a model with this config has the graph.
        of: The config class of the models that can have the graph.
    """

    wrap: Callable[[Any], nn.Module]
    spec: Callable[[Any], GraphSpec]
    stacks: tuple[str, ...]
    belongs: Callable[[Any], bool] = lambda config: True
    of: type | UnionType = CaptionerConfig


def cache_of(config: CaptionerConfig) -> CacheSpec:
    """The KV cache of a captioner's decoder."""
    language = config.language
    return CacheSpec(language.num_layers, language.num_kv_heads, language.head_dim)


def vision_spec(config: Config) -> GraphSpec:
    """Tensors of the vision encoder."""
    vision, batch = config.vision, pictures_axis(config)
    pixels = TensorSpec("pixel_values", "float32", (batch, 3, vision.image_size, vision.image_size))
    return GraphSpec(VISION, (pixels,), (image_embeds(config),))


def bridge_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of the bridge."""
    batch, longest = pictures_axis(config), config.instruction_positions
    inputs = [image_embeds(config)]
    if longest:
        tokens = Axis("instruction", 1, min(16, longest), longest)
        inputs += [TensorSpec(name, "int64", (batch, tokens)) for name in INSTRUCTION]
    if config.elastic:
        inputs.append(TensorSpec(QUERY_IDS, "int64", (batch, queries_dim(config))))
    cross = config.language.cross
    width = cross.source_dim if cross is not None and cross.source == "visual_tokens" else config.language.embed_dim
    dims = (batch, queries_dim(config), width)
    outputs = [TensorSpec("visual_tokens", "float32", dims), *query_outputs(config)]
    return GraphSpec(BRIDGE, tuple(inputs), tuple(outputs))


def source_axis(config: CaptionerConfig) -> Axis:
    """Length of the cross-attention's source: visual tokens and prompt."""
    visual, longest = config.frames * config.bridge.num_visual_tokens, config.language.max_positions
    return Axis("source", 1, min(visual + 8, longest), max(visual + 8, longest))


def source_dim(config: CaptionerConfig, cross: CrossSpec) -> Dim:
    """The length of the source for every kind of cross-attention: of several pictures (Flamingo), of one (BLIP)."""
    if cross.mask == "steps":
        each = config.bridge.num_visual_tokens or config.vision.num_embeds
        return Axis("source", config.elastic or each, each, each * MAX_PICTURES)
    return config.vision.num_embeds if cross.source == "image_embeds" else source_axis(config)


def text_encoder_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of an encoder-decoder model's encoder."""
    batch, source = batch_axis(), source_axis(config)
    known = {
        "inputs_embeds": TensorSpec("inputs_embeds", "float32", (batch, source, config.language.embed_dim)),
        "input_ids": TensorSpec("input_ids", "int64", (batch, source)),
        "attention_mask": TensorSpec("attention_mask", "int64", (batch, source)),
        "image_embeds": image_embeds(config),
    }
    inputs = tuple(known[name] for name in language_of(config.language.kind).encoder_inputs)
    states = TensorSpec("encoder_states", "float32", (batch, source, config.language.hidden_size))
    return GraphSpec(TEXT_ENCODER, inputs, (states,))


def cross_tensors(config: CaptionerConfig, cross: CrossSpec) -> list[TensorSpec]:
    """Keys and values of the cross-attention."""
    dims = (batch_axis(), cross.num_heads, source_dim(config, cross), cross.head_dim)
    return [TensorSpec(name, "float32", dims) for name in cross.names()]


def cross_kv_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of the graph that computes the keys and values of the cross-attention."""
    cross = config.language.cross
    if cross is None:
        raise ValueError(f"a decoder of kind {config.language.kind} has no cross-attention")
    dims = (batch_axis(), source_dim(config, cross), cross.source_dim)
    source = TensorSpec(cross.source, "float32", dims)
    return GraphSpec(CROSS_KV, (source,), tuple(cross_tensors(config, cross)))


def decoder_spec(config: CaptionerConfig) -> GraphSpec:
    """Tensors of the decoder, the same for prefill and decode steps."""
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
    if language.cross is not None:
        inputs += cross_tensors(config, language.cross)
        source = source_dim(config, language.cross)
        masks: dict[str, tuple[Dim, ...]] = {"keys": (batch, source), "steps": (batch, steps, source)}
        dims = masks.get(language.cross.mask)
        if dims is not None:
            inputs.append(TensorSpec("cross_attention_mask", "int64", dims))
    outputs = [TensorSpec("logits", "float32", (batch, asked, language.vocab_size))]
    outputs += [TensorSpec(name, "float32", (batch, heads[0], total, heads[1])) for name in cache.present_names()]
    return GraphSpec(DECODER, tuple(inputs), tuple(outputs))


GRAPHS: dict[str, GraphDefinition] = {
    VISION: GraphDefinition(VisionGraph, vision_spec, ("vision.layers",), of=Config),
    BRIDGE: GraphDefinition(
        BridgeGraph,
        bridge_spec,
        ("bridge.qformer.layers", "bridge.layers"),
        lambda config: config.bridge.kind != "none",
    ),
    TEXT_ENCODER: GraphDefinition(
        TextEncoderGraph,
        text_encoder_spec,
        ("language.encoder.layers",),
        lambda config: config.language.is_encoder_decoder,
    ),
    CROSS_KV: GraphDefinition(
        CrossKeyValueGraph,
        cross_kv_spec,
        ("language.cross_layers", "language.layers"),
        lambda config: config.language.cross is not None,
    ),
    DECODER: GraphDefinition(DecoderGraph, decoder_spec, ("language.layers",)),
    DRAFT: GraphDefinition(DraftGraph, draft_spec, (), lambda config: config.draft is not None),
    IMAGE_FEATURES: GraphDefinition(
        retrieval.ImageFeaturesGraph,
        retrieval.image_features_spec,
        ("matcher.qformer.layers",),
        of=RetrievalConfig,
    ),
    TEXT_EMBEDS: GraphDefinition(
        retrieval.TextEmbedsGraph, retrieval.text_embeds_spec, retrieval.TEXT_STACKS, of=RetrievalConfig
    ),
    MATCH: GraphDefinition(
        retrieval.MatchGraph,
        retrieval.match_spec,
        retrieval.TEXT_STACKS,
        lambda config: config.has_match,
        of=RetrievalConfig,
    ),
}


def graphs_of(config: Config) -> dict[str, GraphDefinition]:
    """The graphs of a model, in the order in which they run."""
    return {name: graph for name, graph in GRAPHS.items() if isinstance(config, graph.of) and graph.belongs(config)}
