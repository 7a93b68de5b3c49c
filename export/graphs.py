"""The graphs of a captioner. Each graph has a spec of its inputs and outputs, and a torch module to trace.

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
    """The module that is traced for the vision encoder: maps ``pixel_values`` to ``image_embeds``."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, Dv]``."""
        return self.vision(pixel_values)


class BridgeGraph(nn.Module):
    """The module that is traced for the bridge: maps ``image_embeds`` to ``visual_tokens``.

    Some bridges have more inputs: the instruction (InstructBLIP), and the indices of the queries to use (an elastic
    bridge: it works with several numbers of queries). If the checkpoint has a draft model, the keys and values of the
    query tokens are more outputs.
    """

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.bridge = model.bridge
        self.has_draft = model.draft is not None
        self.elastic = model.config.elastic > 0

    def forward(self, image_embeds: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Maps ``image_embeds [B, P, Dv]`` to ``visual_tokens [B, Q, D]``.

        Args:
            image_embeds: ``[B, P, Dv]``.
            *rest: Token ids and mask of the instruction, int64 ``[B, T]`` each, if the bridge has an instruction; then
                ``query_ids``, int64 ``[B, Q]``, if the bridge works with several numbers of queries (elastic).
        """
        instruction, queries = (rest[:-1], {QUERY_IDS: rest[-1]}) if self.elastic else (rest, {})
        if not self.has_draft:
            return self.bridge(image_embeds, *instruction, **queries)
        bridge: Any = self.bridge
        states, key_values = bridge.qformer.read(image_embeds, **queries)
        return (bridge.projection(states), *(tensor for pair in key_values for tensor in pair))


class TextEncoderGraph(nn.Module):
    """The module that is traced for the text encoder: maps ``Language.encoder_inputs`` to ``encoder_states``."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.language = model.language

    def forward(self, *inputs: Tensor) -> Tensor:
        """Maps the encoder's inputs to ``encoder_states [B, E, D]``.

        The inputs are embeddings ``[B, E, D]`` or token ids int64 ``[B, E]``, then the mask int64 ``[B, E]``, then
        ``image_embeds`` for some models.
        """
        return self.language.encode(*inputs)


class CrossKeyValueGraph(nn.Module):
    """The module that is traced for ``cross_kv``: keys and values of the states that the decoder attends to."""

    def __init__(self, model: CaptionerModel) -> None:
        super().__init__()
        self.language = model.language

    def forward(self, source: Tensor) -> tuple[Tensor, ...]:
        """Maps ``source [B, E, Ds]`` to a key and a value ``[B, H, E, d]`` for each layer, key before value."""
        pairs = self.language.cross_key_values(source)
        return tuple(tensor for pair in pairs for tensor in pair)


class DecoderGraph(nn.Module):
    """The module that is traced for the decoder. The KV cache is a flat list of tensors."""

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
        """Returns the logits ``[B, K, V]``, then the extended cache: for each layer the key, then the value.

        Args:
            inputs_embeds: ``[B, S, D]``.
            attention_mask: int64 ``[B, P + S]``.
            position_ids: int64 ``[B, S]``.
            logits_indices: int64 ``[B, K]``.
            *rest: The KV cache. If the model has cross-attention, the keys and values of the cross-attention follow,
                and after them ``cross_attention_mask`` if the decoder has this input.
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
    """Describes how one graph of the bundle is made.

    Attributes:
        wrap: Function that takes a model and returns the module that is traced to this graph.
        spec: Function that takes a config and returns the spec of the graph's inputs and outputs.
        stacks: Possible paths of the list of repeated layers in that module; the first existing path is used.
        belongs: Function that returns whether a model with this config has the graph.
        of: The config class of the models that can have the graph.
    """

    wrap: Callable[[Any], nn.Module]
    spec: Callable[[Any], GraphSpec]
    stacks: tuple[str, ...]
    belongs: Callable[[Any], bool] = lambda config: True
    of: type | UnionType = CaptionerConfig


def cache_of(config: CaptionerConfig) -> CacheSpec:
    """Returns the sizes of the KV cache of a captioner's decoder."""
    language = config.language
    return CacheSpec(language.num_layers, language.num_kv_heads, language.head_dim)


def vision_spec(config: Config) -> GraphSpec:
    """Describes the inputs and outputs of the vision encoder's graph."""
    vision, batch = config.vision, pictures_axis(config)
    pixels = TensorSpec("pixel_values", "float32", (batch, 3, vision.image_size, vision.image_size))
    return GraphSpec(VISION, (pixels,), (image_embeds(config),))


def bridge_spec(config: CaptionerConfig) -> GraphSpec:
    """Describes the inputs and outputs of the bridge's graph."""
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
    """Returns the axis ``source`` of an encoder's states: the visual tokens and the tokens of the prompt."""
    visual, longest = config.frames * config.bridge.num_visual_tokens, config.language.max_positions
    return Axis("source", 1, min(visual + 8, longest), max(visual + 8, longest))


def source_dim(config: CaptionerConfig, cross: CrossSpec) -> Dim:
    """Returns the number of states that the decoder cross-attends to.

    It is an axis for several pictures (Flamingo) and for an encoder's states, and a fixed number for the patches of one
    picture (BLIP).
    """
    if cross.mask == "steps":
        each = config.bridge.num_visual_tokens or config.vision.num_embeds
        return Axis("source", config.elastic or each, each, each * MAX_PICTURES)
    return config.vision.num_embeds if cross.source == "image_embeds" else source_axis(config)


def text_encoder_spec(config: CaptionerConfig) -> GraphSpec:
    """Describes the inputs and outputs of the text encoder's graph in an encoder-decoder model."""
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
    """Describes the keys and values of the cross-attention, float32 ``[B, H, E, d]`` each."""
    dims = (batch_axis(), cross.num_heads, source_dim(config, cross), cross.head_dim)
    return [TensorSpec(name, "float32", dims) for name in cross.names()]


def cross_kv_spec(config: CaptionerConfig) -> GraphSpec:
    """Describes the inputs and outputs of ``cross_kv``, the graph of the cross-attention's keys and values."""
    cross = config.language.cross
    if cross is None:
        raise ValueError(f"a decoder of kind {config.language.kind} has no cross-attention")
    dims = (batch_axis(), source_dim(config, cross), cross.source_dim)
    source = TensorSpec(cross.source, "float32", dims)
    return GraphSpec(CROSS_KV, (source,), tuple(cross_tensors(config, cross)))


def decoder_spec(config: CaptionerConfig) -> GraphSpec:
    """Describes the inputs and outputs of the decoder's graph, which runs both prefill and decode steps."""
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
    """Returns the definition of each graph of a model by name, in the order in which the graphs run."""
    return {name: graph for name, graph in GRAPHS.items() if isinstance(config, graph.of) and graph.belongs(config)}
