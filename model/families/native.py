"""blip2edge's native checkpoints: any bridge between any vision encoder and any language model.

A directory with ``model.safetensors``, the processor's files and this ``config.json``::

    {
      "model_type": "blip2edge",
      "image_token_index": 50265,
      "vision_config": {…},     of any encoder in vision/registry.py; if it has no model_type, it is read as BLIP-2's
      "bridge_config": {
        "kind": "pool",         a key of BRIDGE_CONFIGS; it decides the other keys
        "num_query_tokens": 32, "hidden_size": 768, "num_attention_heads": 12, "layer_norm_eps": 1e-6
      },
      "text_config": {…}        the config of any language model, with its model_type
    }

Names of the tensors: ``vision_model.`` and the names in the encoder's weight table, ``bridge.`` and the parameter names
of this project's bridge, ``language_model.`` and the names in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from blip2edge.errors import UnsupportedModelError
from blip2edge.model.bridges.mlp import MLPConfig
from blip2edge.model.bridges.perceiver import PerceiverConfig
from blip2edge.model.bridges.pool import AttentionPoolConfig
from blip2edge.model.config import (
    BLIP2_VISION,
    BridgeConfig,
    CaptionerConfig,
    LanguageConfig,
    QFormerConfig,
    VisionEncoderConfig,
)
from blip2edge.model.config_json import Fields
from blip2edge.model.families.tokens import read_tokens, write_tokens
from blip2edge.model.language.registry import bridged_language
from blip2edge.model.vision.registry import vision_encoder
from blip2edge.model.weights.rules import Rule


def _mlp(f: Fields, vision: VisionEncoderConfig, language: LanguageConfig) -> MLPConfig:
    return MLPConfig(
        input_size=vision.hidden_size,
        hidden_size=language.embed_dim,
        num_patches=vision.num_embeds,
        activation=f.activation("projector_hidden_act", "gelu"),
        bias=f.flag("multimodal_projector_bias", True),
    )


def _perceiver(f: Fields, vision: VisionEncoderConfig, language: LanguageConfig) -> PerceiverConfig:
    plain = PerceiverConfig.from_hf(f.values, width=vision.hidden_size)
    return replace(plain, output_size=language.embed_dim)


def _pool(f: Fields, vision: VisionEncoderConfig, _: LanguageConfig) -> AttentionPoolConfig:
    return AttentionPoolConfig.from_hf(f.values, encoder_hidden_size=vision.hidden_size)


def _qformer(f: Fields, vision: VisionEncoderConfig, _: LanguageConfig) -> QFormerConfig:
    queries = f.integer(QUERIES, 32)
    return QFormerConfig.from_hf(f.values, num_query_tokens=queries, encoder_hidden_size=vision.hidden_size)


QUERIES = "num_query_tokens"

BRIDGE_CONFIGS: dict[str, Callable[[Fields, VisionEncoderConfig, LanguageConfig], BridgeConfig]] = {
    "pool": _pool,
    "mlp": _mlp,
    "perceiver": _perceiver,
    "qformer": _qformer,
}
"""Functions that read ``bridge_config``, by the kind of the bridge."""

NATIVE_RULES = (Rule("bridge", "bridge"),)


def read_any_vision(f: Fields) -> VisionEncoderConfig:
    """Reads the ``vision_config`` of any vision encoder; if it has no ``model_type``, it is read as BLIP-2's.

    Raises:
        UnsupportedModelError: The vision encoder is not supported.
        CheckpointError: A key has a wrong value.
    """
    section = Fields("vision_config", f.values.get("vision_config", {}))
    return vision_encoder(section.values.get("model_type", BLIP2_VISION)).read_config(section.values)


def read_native(f: Fields) -> CaptionerConfig:
    """Reads this project's own ``config.json``; the docstring of this module describes its keys.

    Raises:
        UnsupportedModelError: The vision encoder, the bridge or the language model is not supported.
        CheckpointError: A key is missing or has a wrong value.
    """
    vision = read_any_vision(f)
    section = Fields("bridge_config", f.values.get("bridge_config", {}))
    kind = section.values.get("kind")
    if not isinstance(kind, str) or kind not in BRIDGE_CONFIGS:
        raise UnsupportedModelError(
            f"the bridge is of kind {kind!r}, expected one of {', '.join(BRIDGE_CONFIGS)}",
            "use a checkpoint that this version of blip2edge supports, or a newer version",
        )
    text = Fields("text_config", f.values.get("text_config", {}))
    language = bridged_language(text.values.get("model_type", "opt")).read_config(text.values)
    return CaptionerConfig(
        family="blip2edge",
        vision=vision,
        bridge=BRIDGE_CONFIGS[kind](section, vision, language),
        language=language,
        image_token_id=f.token_id("image_token_id", f.token_id("image_token_index", None)),
        **read_tokens(text),
    )


def write_native(config: CaptionerConfig) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_native` reads."""
    bridge = {QUERIES: config.bridge.num_visual_tokens} if isinstance(config.bridge, QFormerConfig) else {}
    return {
        "model_type": config.family,
        "image_token_index": config.image_token_id,
        "tie_word_embeddings": config.language.tie_embeddings,
        "vision_config": config.vision.to_hf(),
        "bridge_config": config.bridge.to_hf() | bridge | {"kind": config.bridge.kind},
        "text_config": config.language.to_hf() | write_tokens(config),
    }
