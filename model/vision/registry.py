"""The supported vision encoders: one row per ``model_type`` of a ``vision_config``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import UnsupportedModelError
from blip2edge.model.config import BLIP2_VISION, CLIP_VISION, VisionConfig, VisionEncoderConfig
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from blip2edge.model.vision.vit import VisionTransformer
from blip2edge.model.weights import blip2 as weights
from blip2edge.model.weights.rules import Rule


@dataclass(frozen=True)
class VisionEncoder:
    """How a kind of vision encoder is read from a checkpoint and built.

    Attributes:
        title: Name of the encoder in tables and messages.
        read_config: Function that makes the config from a ``vision_config``.
        build: Function that makes the module from a config.
        rules: Function that returns, for a config, which tensors the parameters are read from, without a prefix.
        prefix: Prefix of the tensors in a checkpoint of the encoder alone, whose ``config.json`` is the
            ``vision_config``.
        left_out: Tensors of such a checkpoint that are not used (regular expressions).
        image_processor: Class of the preprocessing where its file names none, a key of ``CLASSES`` in
            ``checkpoint/image_processor.py``.
    """

    title: str
    read_config: Callable[[Any], VisionEncoderConfig]
    build: Callable[[Any], VisionModule]
    rules: Callable[[Any], tuple[Rule, ...]]
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    image_processor: str = "Blip"


VISION_ENCODERS: dict[str, VisionEncoder] = {
    BLIP2_VISION: VisionEncoder(
        "BLIP-2",
        VisionConfig.from_hf,
        VisionTransformer,
        lambda config: weights.BLIP2_VISION,
    ),
    CLIP_VISION: VisionEncoder(
        "CLIP",
        VisionConfig.from_clip,
        VisionTransformer,
        lambda config: weights.CLIP_VISION,
        prefix="vision_model.",
        left_out=(r"vision_model\.post_layernorm\..*",),
        image_processor="CLIP",
    ),
    EfficientNetLiteConfig.model_type: VisionEncoder(
        "EfficientNet-Lite",
        EfficientNetLiteConfig.from_hf,
        EfficientNetLite,
        lambda config: weights.EFFICIENTNET_LITE,
        image_processor="Bit",
    ),
}


def vision_encoder(model_type: Any) -> VisionEncoder:
    """Returns the registry's entry for the vision encoder whose ``vision_config`` has this ``model_type``.

    Raises:
        UnsupportedModelError: The ``model_type`` is not supported.
    """
    if not isinstance(model_type, str) or model_type not in VISION_ENCODERS:
        raise UnsupportedModelError(
            f"the vision encoder is of type {model_type!r}, which is not supported",
            f"supported: {', '.join(VISION_ENCODERS)}",
        )
    return VISION_ENCODERS[model_type]


def build_vision(config: VisionEncoderConfig) -> VisionModule:
    """Builds a vision encoder, a module that maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``."""
    return vision_encoder(config.kind).build(config)
