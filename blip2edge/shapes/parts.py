"""Computes the sizes of vision encoders and bridges from sections of a ``config.json``; defaults as in transformers.

A test compares the sizes with the parameters of this project's modules and of transformers' classes. So a config gives
the same sizes here and in ``model/families``, which builds the modules.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from blip2edge.bundle.schema import BRIDGE, VISION
from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.shapes.model_shape import AttentionProducts, ModelPart, WeightMatrix

MOST = 1 << 31
"""Sizes in a config must be smaller than this number."""

ROOT = ""
"""Name of the section that is the whole ``config.json``."""

LONGEST_SHOWN = 40  # characters of a value in an error

CONVOLUTIONAL = ("efficientnet_lite",)
"""Values of ``model_type`` of vision encoders that are no ViT."""

EVA = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16,
       "image_size": 224, "patch_size": 14}  # fmt: skip
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BLIP_VISION = {**BASE, "image_size": 384, "patch_size": 16}
CLIP_VISION = {**BASE, "image_size": 224, "patch_size": 32}
LLAVA_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                "image_size": 336, "patch_size": 14}  # fmt: skip
IDEFICS_VISION = {"hidden_size": 768, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16,
                  "image_size": 224, "patch_size": 14}  # fmt: skip
QFORMER = {**BASE, "cross_attention_frequency": 2, "vocab_size": 30522, "max_position_embeddings": 512}
PERCEIVER = {"resampler_n_latents": 64, "resampler_depth": 6, "resampler_n_heads": 16, "resampler_head_dim": 96}
POOL = {"hidden_size": 768, "num_attention_heads": 12, "num_query_tokens": 32}
TEXT_VOCABULARY = 30523  # BERT's words and [DEC], in BLIP-2's stage 1


class Sizes:
    """Reads the sizes in a section of a ``config.json``.

    Args:
        section: Name of the section, for errors; :data:`ROOT` for the whole file.
        values: Content of the section; None for an empty one.
        defaults: Values of missing keys.

    Raises:
        CheckpointError: The section is not an object.
    """

    def __init__(self, section: str, values: Any, defaults: Mapping[str, int]) -> None:
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"config.json: {section or 'the content'} must be an object, not {type(values).__name__}",
                "save the checkpoint again with transformers' save_pretrained",
            )
        self.section, self.values = section, values
        self._known = ChainMap(dict(values), dict(defaults))

    def __getitem__(self, key: str) -> int:
        return self.get(key, None)

    def get(self, key: str, default: int | None) -> int:
        """Reads a positive whole number.

        For a missing key, the value in ``defaults`` is used; if ``defaults`` has no such key either, ``default``.
        """
        value = self._known.get(key)
        if value is None:
            value = self._known.maps[1].get(key, default)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < MOST:
            raise self._wrong(key, f"must be a positive integer up to {MOST - 1}", value)
        return value

    def count(self, key: str) -> int:
        """Reads a whole number of at least 0; 0 for a missing key or null."""
        value = self.values.get(key)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MOST:
            raise self._wrong(key, f"must be an integer from 0 to {MOST - 1}", value)
        return value

    def _wrong(self, key: str, expected: str, value: Any) -> CheckpointError:
        place = f"{self.section}.{key}" if self.section else key
        shown = repr(value)
        if len(shown) > LONGEST_SHOWN:
            shown = f"{shown[:LONGEST_SHOWN]}… ({len(shown)} characters)"
        return CheckpointError(f"config.json: {place} {expected}, not {shown}")

    def flag(self, key: str, default: bool) -> bool:
        """Reads a key whose value is true or false; returns ``default`` if the key is missing."""
        value = self.values.get(key)
        return default if value is None else bool(value)


def attention(
    layers: int,
    width: int,
    inner: int,
    rows: str,
    *,
    keys: tuple[int, str] | None = None,
    kv: int | None = None,
    bias: bool = False,
    out_bias: bool | None = None,
) -> tuple[WeightMatrix, ...]:
    """Returns the four matrices of an attention, for all layers.

    Args:
        layers: Number of layers.
        width: Width of the states that attend.
        inner: Heads times width of a head.
        rows: Name of the tokens that attend.
        keys: Width and name of the tokens that are attended to; None if they are the tokens that attend.
        kv: Width of the keys over all heads, which is also the width of the values; None for ``inner``.
        bias: Whether queries, keys and values have biases.
        out_bias: Whether the output matrix has a bias; None for ``bias``.
    """
    context, context_rows = keys or (width, rows)
    out_bias = bias if out_bias is None else out_bias
    return (
        WeightMatrix("queries", width, inner, rows, layers, bias),
        WeightMatrix("keys and values", context, kv or inner, context_rows, 2 * layers, bias),
        WeightMatrix("attention output", inner, width, rows, layers, out_bias),
    )


def feed_forward(
    layers: int, width: int, inner: int, rows: str, *, gated: bool = False, bias: bool = False
) -> tuple[WeightMatrix, ...]:
    """Returns the two matrices of a feed-forward, or three if it is gated, for all layers."""
    return (
        WeightMatrix("gate and up" if gated else "up", width, inner, rows, (1 + gated) * layers, bias),
        WeightMatrix("down", inner, width, rows, layers, bias),
    )


def vit(values: Any, defaults: Mapping[str, int], *, clip: bool = False, post_norm: bool = True) -> ModelPart:
    """Returns the sizes of a vision encoder's graph.

    If ``clip`` is true, the encoder is built like CLIP's: the patch embedding has no bias, and a norm comes before the
    layers.

    Raises:
        UnsupportedModelError: The encoder is no ViT.
    """
    if isinstance(values, Mapping) and values.get("model_type") in CONVOLUTIONAL:
        raise UnsupportedModelError(
            f"the vision encoder is of type {values['model_type']!r}, whose size is not computed from config.json",
            "measure a bundle of this model instead: blip2edge bench BUNDLE",
        )
    f = Sizes("vision_config", values, defaults)
    width, layers, patch = f["hidden_size"], f["num_hidden_layers"], f["patch_size"]
    if patch > f["image_size"] or width % f["num_attention_heads"]:
        raise CheckpointError("config.json: vision_config: patch_size exceeds image_size, or the heads do not divide "
                              "the width")  # fmt: skip
    positions = (f["image_size"] // patch) ** 2 + 1
    bias = clip or f.flag("qkv_bias", True)
    return ModelPart(
        VISION,
        (
            WeightMatrix("patch embedding", 3 * patch * patch, width, "grid", 1, not clip),
            *attention(layers, width, width, "patches", bias=bias, out_bias=True),
            *feed_forward(layers, width, f["intermediate_size"], "patches", bias=True),
        ),
        (AttentionProducts(width, f["num_attention_heads"], "patches", "patches", layers),),
        width + positions * width + 2 * width * (2 * layers + clip + post_norm),
    )


def qformer(values: Any, encoder: int, queries: int, output: int, *, instructed: bool = False) -> ModelPart:
    """Returns the matrices of a Q-Former, and of the linear projection after it to ``output`` channels.

    ``encoder``: number of channels of the picture encoder's embeddings.
    """
    f = Sizes("qformer_config", values, QFORMER)
    width, inner, layers = f["hidden_size"], f["intermediate_size"], f["num_hidden_layers"]
    heads, crossing = f["num_attention_heads"], -(-layers // f["cross_attention_frequency"])
    own = "queries+instruction" if instructed else "queries"
    text = feed_forward(layers, width, inner, "instruction", bias=True) if instructed else ()
    tables = (f["vocab_size"] + f["max_position_embeddings"]) * width if instructed else 0
    norms = 2 * width * (1 + 2 * layers + crossing + (layers if instructed else 0))
    return ModelPart(
        BRIDGE,
        (
            *attention(layers, width, width, own, bias=True),
            *attention(crossing, width, width, "queries", keys=(encoder, "embeds"), bias=True),
            *feed_forward(layers, width, inner, "queries", bias=True),
            *text,
            WeightMatrix("projection", width, output, "queries", 1, True),
        ),
        (
            AttentionProducts(width, heads, own, own, layers),
            AttentionProducts(width, heads, "queries", "embeds", crossing),
        ),
        queries * width + tables + norms,
    )


def text_side(values: Any) -> int:
    """Returns the number of parameters of a Q-Former's text side.

    They are the token embedding and position tables, and a second feed-forward in each layer.
    """
    f = Sizes("qformer_config", values, {**QFORMER, "vocab_size": TEXT_VOCABULARY})
    width, inner, layers = f["hidden_size"], f["intermediate_size"], f["num_hidden_layers"]
    forward = sum(matrix.parameters for matrix in feed_forward(layers, width, inner, "", bias=True))
    return forward + 2 * width * layers + (f["vocab_size"] + f["max_position_embeddings"]) * width


def mlp(encoder: int, output: int, *, bias: bool = True) -> ModelPart:
    """Returns the sizes of LLaVA's bridge: two linear layers, applied to every embedding."""
    sizes = ((encoder, output), (output, output))
    return ModelPart(BRIDGE, tuple(WeightMatrix("layer", one, other, "embeds", 1, bias) for one, other in sizes))


def perceiver(values: Any, width: int, output: int = 0) -> ModelPart:
    """Returns the sizes of a perceiver resampler for embeddings of ``width`` channels.

    ``output``: output channels of the projection after the resampler; 0 for no projection.
    """
    f = Sizes("perceiver_config", values, PERCEIVER)
    latents, layers, heads, head = (f[key] for key in PERCEIVER)
    norms = 2 * width * (3 * layers + 1) + (4 * head * layers if f.flag("qk_layer_norms_perceiver", False) else 0)
    projection = (WeightMatrix("projection", width, output, "queries", 1, True),) if output else ()
    inner = heads * head
    return ModelPart(
        BRIDGE,
        (
            *attention(layers, width, inner, "queries", keys=(width, "embeds+queries")),
            *feed_forward(layers, width, 4 * width, "queries"),
            *projection,
        ),
        (AttentionProducts(inner, heads, "queries", "embeds+queries", layers),),
        latents * width + norms,
        operators=5,
    )


def pool(values: Any, encoder: int, output: int) -> ModelPart:
    """Returns the sizes of an attention pool: one attention of learned queries to the embeddings, and a projection."""
    f = Sizes("bridge_config", values, POOL)
    width = f["hidden_size"]
    return ModelPart(
        BRIDGE,
        (
            *attention(1, width, width, "queries", keys=(encoder, "embeds"), bias=True),
            WeightMatrix("projection", width, output, "queries", 1, True),
        ),
        (AttentionProducts(width, f["num_attention_heads"], "queries", "embeds", 1),),
        f["num_query_tokens"] * width + 2 * (width + encoder),
    )
