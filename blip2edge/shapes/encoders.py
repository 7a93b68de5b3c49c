"""Computes the sizes of vision encoders from their config, by ``model_type``; defaults as in transformers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from blip2edge.bundle.schema import VISION
from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.shapes.efficientnet_lite import convolutions, feature_side
from blip2edge.shapes.features import FULL, LAYER, STRATEGY, feature_blocks, is_full
from blip2edge.shapes.model_shape import AttentionProducts, ModelPart, WeightMatrix
from blip2edge.shapes.parts import BASE, CLIP_VISION, EVA, Sizes, attention, feed_forward, vit

SIGLIP = {**BASE, "image_size": 224, "patch_size": 16}
DINOV2 = {**BASE, "image_size": 224, "patch_size": 14, "mlp_ratio": 4}
DINOV2_WITH_REGISTERS = {**DINOV2, "patch_size": 16, "num_register_tokens": 4}
EFFICIENTNET_LITE = {"image_size": 224, "hidden_dim": 1280}
DINOV3 = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
          "image_size": 224, "patch_size": 16}  # fmt: skip


@dataclass(frozen=True)
class EncoderShape:
    """The sizes of a vision encoder.

    Attributes:
        part: The encoder's matrices and attentions.
        image_size, patch_size: Sides of picture and patch in pixels.
        width: Channels of an embedding.
        prefix: Number of embeddings before the patches: class token and registers.
        keep_prefix: Whether the embeddings before the patches are in the output.
        cells: Number of embeddings of a picture if it does not follow from the sizes; else 0.
    """

    part: ModelPart
    image_size: int
    patch_size: int
    width: int
    prefix: int
    keep_prefix: bool
    cells: int = 0


def encoder_shape(values: Mapping[str, Any], kinds: Collection[str] | None = None) -> EncoderShape:
    """Reads the sizes of the encoder from a ``vision_config``; without a ``model_type``, it is BLIP-2's encoder.

    Args:
        values: Content of the section ``vision_config``.
        kinds: The allowed values of ``model_type``; None for all keys of :data:`READERS`.

    Raises:
        UnsupportedModelError: The encoder is of another type.
        CheckpointError: A key has a wrong value.
    """
    kind, kinds = values.get("model_type", BLIP2), READERS if kinds is None else kinds
    if not isinstance(kind, str) or kind not in kinds:
        raise UnsupportedModelError(
            f"the vision encoder is of type {kind!r}, which is not supported", f"supported: {', '.join(kinds)}"
        )
    return READERS[kind](values)


def _depth(f: Sizes) -> tuple[int, bool]:
    """Reads ``vision_feature_layer``, the layer whose output is used.

    Returns the number of layers up to this layer, and whether the final norm follows. The final norm follows only if
    the key is missing.
    """
    depth, layer = f["num_hidden_layers"], f.values.get(LAYER)
    if layer is None:
        return depth, True
    return feature_blocks(layer, depth), False


def _encoder(f: Sizes, matrices: tuple[WeightMatrix, ...], layers: int, prefix: int, vectors: int) -> EncoderShape:
    width, patch, image = f["hidden_size"], f["patch_size"], f["image_size"]
    if patch > image or width % f["num_attention_heads"]:
        raise CheckpointError(
            "config.json: vision_config: patch_size exceeds image_size, or the heads do not divide the width"
        )
    patches = WeightMatrix("patch embedding", 3 * patch * patch, width, "grid", 1, True)
    scores = AttentionProducts(width, f["num_attention_heads"], "patches", "patches", layers)
    part = ModelPart(VISION, (patches, *matrices), (scores,), vectors)
    keep = is_full(f.values.get(STRATEGY, FULL), f.section)
    return EncoderShape(part, image, patch, width, prefix, keep)


def siglip(values: Mapping[str, Any]) -> EncoderShape:
    """Returns the sizes of SigLIP's encoder without its pooling head.

    It has no class token, and a position embedding for each patch.
    """
    f = Sizes("vision_config", values, SIGLIP)
    (layers, norm), width = _depth(f), f["hidden_size"]
    matrices = (
        *attention(layers, width, width, "patches", bias=True),
        *feed_forward(layers, width, f["intermediate_size"], "patches", bias=True),
    )
    positions = (f["image_size"] // f["patch_size"]) ** 2
    shape = _encoder(f, matrices, layers, 0, positions * width + 2 * width * (2 * layers + norm))
    return replace(shape, keep_prefix=True)


def dinov2(values: Mapping[str, Any], defaults: Mapping[str, int] = DINOV2) -> EncoderShape:
    """Returns the sizes of a DINOv2 encoder: class token, position embeddings, two vectors of scales in each layer.

    ``defaults``: values of missing keys. The encoder has registers only if this mapping has the key
    ``num_register_tokens``.
    """
    f = Sizes("vision_config", values, defaults)
    (layers, norm), width = _depth(f), f["hidden_size"]
    registers = f["num_register_tokens"] if "num_register_tokens" in defaults else 0
    inner, gated = width * f["mlp_ratio"], f.flag("use_swiglu_ffn", False)
    if gated:
        inner = (int(inner * 2 / 3) + 7) // 8 * 8
    matrices = (
        *attention(layers, width, width, "patches", bias=f.flag("qkv_bias", True), out_bias=True),
        *feed_forward(layers, width, inner, "patches", gated=gated, bias=True),
    )
    tokens = 2 + registers + (f["image_size"] // f["patch_size"]) ** 2  # class token, its position, registers, patches
    return _encoder(f, matrices, layers, 1 + registers, tokens * width + 2 * width * (3 * layers + norm))


def dinov3(values: Mapping[str, Any]) -> EncoderShape:
    """Returns the sizes of DINOv3's ViT: like DINOv2, but with rotary positions, which have no parameters."""
    f = Sizes("vision_config", values, DINOV3)
    (layers, norm), width = _depth(f), f["hidden_size"]
    registers = f["num_register_tokens"] if values.get("num_register_tokens") else 0
    biases = {name: f.flag(f"{name}_bias", name != "key") for name in ("query", "key", "value", "proj")}
    names = {"query": "queries", "key": "keys", "value": "values", "proj": "attention output"}
    matrices = (
        *(WeightMatrix(text, width, width, "patches", layers, biases[name]) for name, text in names.items()),
        *feed_forward(
            layers, width, f["intermediate_size"], "patches", gated=f.flag("use_gated_mlp", False), bias=True
        ),
    )
    return _encoder(f, matrices, layers, 1 + registers, (1 + registers) * width + 2 * width * (3 * layers + norm))


def blip2(values: Mapping[str, Any]) -> EncoderShape:
    """Returns the sizes of BLIP-2's ViT: a class token, and a norm after the layers."""
    f = Sizes("vision_config", values, EVA)
    return EncoderShape(vit(values, EVA), f["image_size"], f["patch_size"], f["hidden_size"], 1, True)


def clip(values: Mapping[str, Any]) -> EncoderShape:
    """Returns the sizes of CLIP's ViT with all its layers, without the norm after the layers."""
    f, part = Sizes("vision_config", values, CLIP_VISION), vit(values, CLIP_VISION, clip=True, post_norm=False)
    return EncoderShape(part, f["image_size"], f["patch_size"], f["hidden_size"], 1, True)


def efficientnet_lite(values: Mapping[str, Any]) -> EncoderShape:
    """Returns the sizes of an EfficientNet-Lite, which has an embedding for each cell of its last feature map."""
    f = Sizes("vision_config", values, EFFICIENTNET_LITE)
    width, depth = (values.get(f"{name}_coefficient", 1.0) for name in ("width", "depth"))
    if not all(type(each) in (int, float) and 0 < each <= 10 for each in (width, depth)):
        raise CheckpointError(
            "config.json: vision_config: width_coefficient and depth_coefficient must be above 0 and at most 10, not "
            f"{width!r} and {depth!r}"
        )
    image, hidden = f["image_size"], f["hidden_dim"]
    side = feature_side(image)
    return EncoderShape(convolutions(image, width, depth, hidden), image, image // side, hidden, 0, True, side * side)


BLIP2 = "blip_2_vision_model"
CLIP = "clip_vision_model"
SIGLIP_MODEL = "siglip_vision_model"

READERS: Mapping[str, Callable[[Mapping[str, Any]], EncoderShape]] = {
    BLIP2: blip2,
    CLIP: clip,
    "efficientnet_lite": efficientnet_lite,
    SIGLIP_MODEL: siglip,
    "dinov2": dinov2,
    "dinov2_with_registers": lambda values: dinov2(values, DINOV2_WITH_REGISTERS),
    "dinov3_vit": dinov3,
}
"""Function that reads the sizes from a ``vision_config``, by its ``model_type``.

The types are the same as in ``model/vision/registry.py``.
"""
