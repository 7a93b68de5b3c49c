"""LLaVA: reads and writes its ``config.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blip2edge.errors import CheckpointError, UnsupportedModelError
from blip2edge.model.bridges.mlp import MLPConfig
from blip2edge.model.config import CaptionerConfig, VisionConfig
from blip2edge.model.config_json import Fields, layered
from blip2edge.model.families.tokens import read_tokens, write_tokens
from blip2edge.model.language.registry import bridged_language

LLAVA_VISION_DEFAULTS: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""CLIP ViT-L/14 at 336, for configs without a vision tower."""

LLAVA_RENAMED = (
    (r"model\.(vision_tower|multi_modal_projector)\.", r"\1."),
    (r"model\.language_model\.", "language_model.model."),
    (r"lm_head\.", "language_model.lm_head."),
    (r"vision_tower\.vision_model\.", "vision_tower."),
)
"""Names that other versions of transformers write, and their replacements."""

LLAVA_LEFT_OUT = (
    r"vision_tower\.post_layernorm\..*",
    r"vision_tower\.encoder\.layers\.\d+\..*",
)
"""Parts of the tower after the layer whose output is used."""


def read_llava(f: Fields) -> CaptionerConfig:
    """Reads the config of ``LlavaForConditionalGeneration``.

    Raises:
        UnsupportedModelError: The vision tower is not a CLIP, or the bridge reads features of several layers.
    """
    vision = Fields("vision_config", f.values.get("vision_config") or LLAVA_VISION_DEFAULTS)
    if vision.values.get("model_type") != LLAVA_VISION_DEFAULTS["model_type"]:
        raise UnsupportedModelError(
            f"the vision tower is of type {vision.values.get('model_type')!r}, which is not supported",
            f"supported in a LLaVA: {LLAVA_VISION_DEFAULTS['model_type']}",
        )
    strategy = f.values.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(f"config.json: vision_feature_select_strategy must be default or full, not {strategy!r}")
    tower = VisionConfig.from_clip(vision.values)
    layers = _layers(f.values.get("vision_feature_layer", -2), tower.num_layers)
    tower = replace(tower, num_layers=layers, keep_class=strategy == "full")
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


def _layers(feature_layer: Any, depth: int) -> int:
    """How many blocks run before the features are taken; transformers counts the input of the first as layer 0."""
    if isinstance(feature_layer, (list, tuple)) and len(feature_layer) == 1:
        feature_layer = feature_layer[0]
    if isinstance(feature_layer, (list, tuple)):
        raise UnsupportedModelError(
            f"the features of {len(feature_layer)} vision layers are joined, which is not supported",
            "supported: one vision_feature_layer",
        )
    layers = feature_layer
    if isinstance(layers, int) and layers < 0:
        layers += depth + 1
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= depth:
        raise CheckpointError(
            f"config.json: vision_feature_layer must be from 1 to {depth}, or from -{depth} to -1 (counted from the "
            f"last layer), not {feature_layer!r}"
        )
    return layers


def write_llava(config: CaptionerConfig) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_llava` and transformers read; the tower ends at its feature layer."""
    whole = isinstance(config.vision, VisionConfig) and config.vision.keep_class
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": config.image_token_id,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full" if whole else "default",
        "tie_word_embeddings": config.language.tie_embeddings,
        "vision_config": config.vision.to_hf(),
        "text_config": config.language.to_hf() | write_tokens(config),
        **config.bridge.to_hf(),
    }
