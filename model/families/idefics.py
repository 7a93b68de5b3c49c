"""Idefics: transformers' Flamingo (Alayrac et al., arXiv 2204.14198)."""

from __future__ import annotations

from typing import Any

from blip2edge.model.bridges.perceiver import PerceiverConfig
from blip2edge.model.config import BridgeConfig, CaptionerConfig, NoBridge, VisionConfig
from blip2edge.model.config_json import Fields, layered
from blip2edge.model.families.tokens import read_tokens, write_tokens
from blip2edge.model.language.flamingo import FlamingoConfig
from blip2edge.model.weights.blip2 import CLIP_VISION
from blip2edge.model.weights.idefics import PERCEIVER
from blip2edge.model.weights.rules import under

IDEFICS_VISION_DEFAULTS = {
    "embed_dim": 768,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "hidden_act": "gelu",
}
"""Defaults of transformers' IdeficsVisionConfig."""

IDEFICS_TOKEN_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""Defaults of IdeficsConfig."""

IDEFICS_RULES = (
    *under("vision.", "model.vision_model.", CLIP_VISION),
    *under("bridge.", "model.perceiver_resampler.", PERCEIVER),
)

IDEFICS_LEFT_OUT = (r"model\.vision_model\.post_layernorm\.(weight|bias)",)
"""Tensors of a checkpoint that are not used (regular expressions): the norm after the pooled class token."""


def read_idefics(f: Fields) -> CaptionerConfig:
    """Reads the config of ``IdeficsForVisionText2Text``: sizes of the text model are at the top level."""
    section = Fields("vision_config", f.values.get("vision_config") or {}).values
    values = layered(section, IDEFICS_VISION_DEFAULTS)
    vision = VisionConfig.from_clip(layered({"hidden_size": values["embed_dim"]}, values))
    bridge: BridgeConfig = NoBridge()
    if f.flag("use_resampler", False):
        bridge = PerceiverConfig.from_hf(f.values.get("perceiver_config") or {}, width=vision.hidden_size)
    return CaptionerConfig(
        family="idefics",
        vision=vision,
        bridge=bridge,
        language=FlamingoConfig.from_hf(f.values),
        **read_tokens(Fields("config.json", layered(f.values, IDEFICS_TOKEN_DEFAULTS))),
    )


def write_idefics(config: CaptionerConfig) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_idefics` and transformers read."""
    vision = dict(config.vision.to_hf())
    vision |= {"model_type": "idefics_vision", "embed_dim": vision.pop("hidden_size")}
    return {
        "model_type": "idefics",
        "architectures": ["IdeficsForVisionText2Text"],
        **config.language.to_hf(),
        **write_tokens(config),
        "vision_config": vision,
        "perceiver_config": config.bridge.to_hf() or {"model_type": "idefics_perciever", "use_resampler": False},
    }
