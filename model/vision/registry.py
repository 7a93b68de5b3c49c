"""The supported vision encoders: one row per ``model_type`` of a ``vision_config``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import UnsupportedModelError
from blip2edge.model.config import BLIP2_VISION, CLIP_VISION, VisionConfig, VisionEncoderConfig
from blip2edge.model.interfaces import VisionModule
from blip2edge.model.vision.dinov2 import PLAIN, WITH_REGISTERS, Dinov2Config, Dinov2Vision, resized_dinov2
from blip2edge.model.vision.dinov3 import Dinov3Config, Dinov3Vision, resized_dinov3
from blip2edge.model.vision.efficientnet_lite import EfficientNetLite, EfficientNetLiteConfig
from blip2edge.model.vision.siglip import SiglipConfig, SiglipVision
from blip2edge.model.vision.vit import VisionTransformer
from blip2edge.model.weights import blip2 as weights
from blip2edge.model.weights.dino import dinov2_rules, dinov3_rules
from blip2edge.model.weights.rules import Rule
from blip2edge.model.weights.siglip import SIGLIP_VISION


@dataclass(frozen=True)
class VisionEncoder:
    """One row of the table of vision encoders: how a kind of encoder is read from a checkpoint and built.

    Attributes:
        title: Name of the encoder in tables and messages.
        embeds: Description of the output embeddings, for tables.
        read_config: Function that makes the config from a ``vision_config``.
        build: Function that makes the module from a config.
        rules: Function that returns, for a config, the names of the tensors for the parameters, without a prefix.
        prefix: Prefix of the tensors in a checkpoint of the encoder alone, whose ``config.json`` is the
            ``vision_config``. Some versions of transformers write the tensors without this prefix.
        left_out: Tensors of such a checkpoint that are not used (regular expressions).
        cut: Tensors that are not used if the features are those of an earlier block (regular expressions).
        within: The ``model_type`` of whole models that have this encoder, in the section ``vision_config``.
        resized: Function that makes an encoder for pictures of another size in pixels; None if this encoder cannot be
            resized.
        merges: Whether its layers can merge patches (``token_merging.py``).
        trains: Whether training can change its weights, with a learning rate of its own for each layer.
        image_processor: Class of the preprocessing if its file names no class, a key of ``CLASSES`` in
            ``checkpoint/image_processor.py``.
    """

    title: str
    embeds: str
    read_config: Callable[[Any], VisionEncoderConfig]
    build: Callable[[Any], VisionModule]
    rules: Callable[[Any], tuple[Rule, ...]]
    prefix: str = ""
    left_out: tuple[str, ...] = ()
    cut: tuple[str, ...] = ()
    within: tuple[str, ...] = ()
    resized: Callable[[VisionModule, int], VisionModule] | None = None
    merges: bool = False
    trains: bool = False
    image_processor: str = "Blip"


VISION_ENCODERS: dict[str, VisionEncoder] = {
    BLIP2_VISION: VisionEncoder(
        "BLIP-2 (EVA-CLIP)",
        "class token and patches, after the final norm",
        VisionConfig.from_hf,
        VisionTransformer,
        lambda config: weights.BLIP2_VISION,
        merges=True,
        trains=True,
    ),
    CLIP_VISION: VisionEncoder(
        "CLIP",
        "class token and patches of the last block, without the final norm",
        VisionConfig.from_clip,
        VisionTransformer,
        lambda config: weights.CLIP_VISION,
        prefix="vision_model.",
        left_out=(r"vision_model\.post_layernorm\..*",),
        merges=True,
        trains=True,
        image_processor="CLIP",
    ),
    EfficientNetLiteConfig.model_type: VisionEncoder(
        "EfficientNet-Lite",
        "the cells of the last feature map",
        EfficientNetLiteConfig.from_hf,
        EfficientNetLite,
        lambda config: weights.EFFICIENTNET_LITE,
        image_processor="Bit",
    ),
    SiglipConfig.model_type: VisionEncoder(
        "SigLIP, SigLIP 2 (fixed resolution)",
        "patches, after the final norm; there is no class token",
        SiglipConfig.from_hf,
        SiglipVision,
        lambda config: SIGLIP_VISION,
        prefix="vision_model.",
        left_out=(r"(vision_model\.)?head\..*", r"text_model\..*", r"logit_(scale|bias)"),
        cut=(r"(vision_model\.)?(post_layernorm|encoder\.layers)\..*",),
        within=("siglip",),
        image_processor="Siglip",
    ),
    PLAIN: VisionEncoder(
        "DINOv2",
        "class token and patches, after the final norm",
        Dinov2Config.from_hf,
        Dinov2Vision,
        dinov2_rules,
        prefix="dinov2.",
        left_out=(r"(dinov2\.)?embeddings\.mask_token", r"classifier\..*"),
        cut=(r"(dinov2\.)?(layernorm|encoder\.layer)\..*",),
        resized=resized_dinov2,
        image_processor="Bit",
    ),
    WITH_REGISTERS: VisionEncoder(
        "DINOv2 with registers",
        "class token, registers and patches, after the final norm",
        Dinov2Config.with_registers,
        Dinov2Vision,
        dinov2_rules,
        prefix="dinov2_with_registers.",
        left_out=(r"(dinov2_with_registers\.)?embeddings\.mask_token", r"classifier\..*"),
        cut=(r"(dinov2_with_registers\.)?(layernorm|encoder\.layer)\..*",),
        resized=resized_dinov2,
        image_processor="Bit",
    ),
    Dinov3Config.model_type: VisionEncoder(
        "DINOv3 (ViT)",
        "class token, registers and patches, after the final norm",
        Dinov3Config.from_hf,
        Dinov3Vision,
        dinov3_rules,
        left_out=(r"embeddings\.mask_token",),
        cut=(r"(norm|layer)\..*",),
        resized=resized_dinov3,
        image_processor="DINOv3ViT",
    ),
}

NAFLEX = (
    "SigLIP 2 NaFlex reads a varying number of patches of pictures of any proportions, which is not supported",
    "use a SigLIP 2 of a fixed resolution, such as google/siglip2-base-patch16-256",
)
REFUSED = {"siglip2_vision_model": NAFLEX, "siglip2": NAFLEX}
"""The error (problem and correction) for encoders that are not supported.

The key is the ``model_type`` of the encoder, or of a whole model with this encoder.
"""

WHOLE_MODELS = {model: name for name, row in VISION_ENCODERS.items() for model in row.within}
"""For the ``model_type`` of a whole model: the ``model_type`` of its vision encoder."""


def vision_encoder(model_type: Any) -> VisionEncoder:
    """Returns the registry's entry for the vision encoder whose ``vision_config`` has this ``model_type``.

    Raises:
        UnsupportedModelError: The ``model_type`` is not supported.
    """
    if isinstance(model_type, str) and model_type in REFUSED:
        raise UnsupportedModelError(*REFUSED[model_type])
    if not isinstance(model_type, str) or model_type not in VISION_ENCODERS:
        raise UnsupportedModelError(
            f"the vision encoder is of type {model_type!r}, which is not supported",
            f"supported: {', '.join(VISION_ENCODERS)}",
        )
    return VISION_ENCODERS[model_type]


def build_vision(config: VisionEncoderConfig) -> VisionModule:
    """Builds a vision encoder, a module that maps ``pixel_values [B, 3, H, W]`` to ``image_embeds [B, P, D]``."""
    return vision_encoder(config.kind).build(config)
