"""Retrieval models: reads and writes their ``config.json``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blip2edge.errors import CheckpointError
from blip2edge.model.bridges.instruct import InstructedQFormerConfig
from blip2edge.model.config import VisionConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.families.blip import BLIP_TOKEN_DEFAULTS, read_text_config, read_vision
from blip2edge.model.families.native import read_any_vision
from blip2edge.model.language.clip_text import ClipTextConfig
from blip2edge.model.retrieval import RetrievalConfig


def read_blip_itm(f: Fields) -> RetrievalConfig:
    """Reads the config of ``BlipForImageTextRetrieval``."""
    vision = read_vision(f)
    text, _ = read_text_config(f, vision)
    return RetrievalConfig(
        family="blip-itm",
        vision=vision,
        text=text,
        embed_dim=f.integer("image_text_hidden_size", 256),
        max_positions=text.max_positions,
    )


def write_blip_itm(config: RetrievalConfig) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_blip_itm` and transformers read."""
    return {
        "model_type": "blip",
        "architectures": ["BlipForImageTextRetrieval"],
        "image_text_hidden_size": config.embed_dim,
        "vision_config": config.vision.to_hf() | {"model_type": "blip_vision_model"},
        "text_config": config.text.to_hf() | BLIP_TOKEN_DEFAULTS,
    }


def read_blip2_itm(f: Fields) -> RetrievalConfig:
    """Reads the config of ``Blip2ForImageTextRetrieval``.

    Raises:
        CheckpointError: The Q-Former does not read text.
    """
    vision = read_any_vision(f)
    values = f.values.get("qformer_config", {})
    text = InstructedQFormerConfig.from_hf(
        values, num_query_tokens=f.integer("num_query_tokens", 32), encoder_hidden_size=vision.hidden_size
    )
    if not Fields("qformer_config", values).flag("use_qformer_text_input", False):
        raise CheckpointError(
            "config.json: qformer_config.use_qformer_text_input is false, so the model does not encode texts",
            "give a checkpoint of BLIP-2's first stage, such as Salesforce/blip2-itm-vit-g",
        )
    return RetrievalConfig(
        family="blip-2-itm",
        vision=vision,
        text=text,
        embed_dim=f.integer("image_text_hidden_size", 256),
        max_positions=text.instruction_positions,
        num_features=text.num_query_tokens,
    )


def write_blip2_itm(config: RetrievalConfig) -> dict[str, Any]:
    """Makes the ``config.json`` for :func:`read_blip2_itm`; with BLIP-2's vision encoder, transformers reads it too."""
    qformer = config.text.to_hf() | {"model_type": "blip_2_qformer", "use_qformer_text_input": True}
    return {
        "model_type": "blip-2",
        "architectures": ["Blip2ForImageTextRetrieval"],
        "num_query_tokens": config.num_features,
        "image_text_hidden_size": config.embed_dim,
        "vision_config": config.vision.to_hf(),
        "qformer_config": qformer,
    }


def read_clip(f: Fields) -> RetrievalConfig:
    """Reads the config of ``CLIPModel``."""
    vision = VisionConfig.from_clip(f.values.get("vision_config", {}))
    text = ClipTextConfig.from_hf(f.values.get("text_config", {}))
    return RetrievalConfig(
        family="clip",
        vision=replace(vision, post_norm=True),
        text=text,
        embed_dim=f.integer("projection_dim", 512),
        max_positions=text.max_positions,
        has_match=False,
    )


def write_clip(config: RetrievalConfig) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_clip` and transformers read."""
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": config.embed_dim,
        "vision_config": config.vision.to_hf(),
        "text_config": config.text.to_hf(),
    }
