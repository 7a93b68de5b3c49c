"""LLaVA: reads and writes its ``config.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from blip2edge.errors import UnsupportedModelError
from blip2edge.model.bridges.mlp import MLPConfig
from blip2edge.model.config import CLIP_VISION, CaptionerConfig, VisionConfig, VisionEncoderConfig
from blip2edge.model.config_json import Fields, layered
from blip2edge.model.families.tokens import read_tokens, write_tokens
from blip2edge.model.language.registry import bridged_language
from blip2edge.model.vision.siglip import SiglipConfig
from blip2edge.shapes.features import FULL, LAYER, PATCHES, STRATEGY, feature_blocks, is_full

LLAVA_VISION_DEFAULTS: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""The ``vision_config`` of CLIP ViT-L/14 for pictures of 336 pixels; used if a config has no ``vision_config``."""

LLAVA_RENAMED = (
    (r"model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"vision_tower\.vision_model\.", "vision_tower."),
)
"""Tensor names that other versions of transformers write (regular expressions), and their replacements."""

LLAVA_LEFT_OUT = (
    r"vision_tower\.post_layernorm\..*",
    r"vision_tower\.encoder\.layers\.\d+\..*",
    r"vision_tower\.head\..*",
)
"""Tensors of a checkpoint that are not used (regular expressions).

They belong to the layers of the vision tower after the layer whose output is used, and to SigLIP's pooling head.
"""


def read_llava(f: Fields) -> CaptionerConfig:
    """Reads the config of ``LlavaForConditionalGeneration``.

    Raises:
        UnsupportedModelError: The vision tower is neither a CLIP nor a SigLIP.
        CheckpointError: A key has a wrong value, or the bridge reads features of several layers.
    """
    vision = Fields("vision_config", f.values.get("vision_config") or LLAVA_VISION_DEFAULTS)
    row = TOWERS.get(str(vision.values.get("model_type")))
    if row is None:
        raise UnsupportedModelError(
            f"the vision tower is of type {vision.values.get('model_type')!r}, which is not supported",
            f"supported in a LLaVA: {', '.join(TOWERS)}",
        )
    tower = row.read(vision.values, f.values.get(LAYER, -2), full=is_full(f.values.get(STRATEGY, PATCHES)))
    text = Fields("text_config", f.values.get("text_config", {}))
    tied = f.flag("tie_word_embeddings", False) or text.flag("tie_word_embeddings", False)
    own = {"tie_word_embeddings": tied}  # as in transformers, either key ties
    language = bridged_language(text.values.get("model_type", "llama")).read_config(layered(own, text.values))
    bridge = MLPConfig(
        input_size=tower.hidden_size,
        hidden_size=language.hidden_size,
        num_patches=tower.num_embeds,
        activation=f.activation("projector_hidden_act", "gelu"),
        bias=f.flag("multimodal_projector_bias", True),
    )
    return CaptionerConfig(
        family="llava",
        vision=tower,
        bridge=bridge,
        language=language,
        image_token_id=f.token_id("image_token_index", f.token_id("image_token_id", 32000)),
        **read_tokens(text),
    )


def _clip_tower(values: Any, layer: Any, *, full: bool) -> VisionEncoderConfig:
    tower = VisionConfig.from_clip(values)
    return replace(tower, num_layers=feature_blocks(layer, tower.num_layers), keep_class=full)


def _siglip_tower(values: Any, layer: Any, *, full: bool) -> VisionEncoderConfig:
    """Makes the config of a SigLIP encoder in a LLaVA.

    If ``full`` is false, transformers drops the first embedding. In SigLIP, this is a patch, not a class token.
    """
    tower = SiglipConfig.from_hf(values)
    return replace(tower, num_layers=feature_blocks(layer, tower.num_layers), post_norm=False, keep_first=full)


@dataclass(frozen=True)
class Tower:
    """How a kind of vision tower is written in the ``config.json`` of a LLaVA.

    Attributes:
        read: Function that reads its ``vision_config``.
        full: Function that returns whether a tower returns all embeddings (the strategy ``full``).
        fixed: Values of its ``vision_config`` that are always the same.
    """

    read: Callable[..., VisionEncoderConfig]
    full: Callable[[Any], bool]
    fixed: Mapping[str, Any] = field(default_factory=dict)


TOWERS = {
    CLIP_VISION: Tower(_clip_tower, lambda vision: vision.keep_class),
    SiglipConfig.model_type: Tower(_siglip_tower, lambda vision: vision.keep_first, {"vision_use_head": False}),
}
"""The supported vision towers, by ``model_type``."""


def write_llava(config: CaptionerConfig) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_llava` and transformers read.

    A vision encoder of this project ends at the layer whose output is used, so ``vision_feature_layer`` is -1.
    """
    vision = {key: value for key, value in config.vision.to_hf().items() if key not in (LAYER, STRATEGY)}
    row = TOWERS[config.vision.kind]
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        LAYER: -1,
        STRATEGY: FULL if row.full(config.vision) else "default",
        "tie_word_embeddings": config.language.tie_embeddings,
        "vision_config": vision | dict(row.fixed),
        "text_config": config.language.to_hf() | write_tokens(config),
        **config.bridge.to_hf(),
    }
