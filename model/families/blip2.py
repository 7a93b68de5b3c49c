"""BLIP-2 and the families with the same ``config.json``: InstructBLIP, InstructBlipVideo, MiniGPT-4."""

from __future__ import annotations

from typing import Any

from blip2edge.model.config import CaptionerConfig, QFormerConfig, VisionConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.families.tokens import read_tokens, write_tokens
from blip2edge.model.language.registry import bridged_language

VIDEO_FRAMES = 4
"""Number of frames of a video; transformers' InstructBlipVideoProcessor always makes visual tokens for four frames."""


def read_blip2(
    f: Fields,
    family: str = "blip-2",
    bridge_config: type[QFormerConfig] = QFormerConfig,
    slot: str = "image_token",
    frames: int = 1,
) -> CaptionerConfig:
    """Reads the config of ``Blip2ForConditionalGeneration`` and of the families derived from it.

    Args:
        f: Values of the checkpoint's ``config.json``.
        family: Name of the family, a key in ``families/registry.py``.
        bridge_config: Class that reads ``qformer_config``.
        slot: First part of the key with the id of a visual token: ``image_token`` for ``image_token_id``, or
            ``video_token`` for ``video_token_id``.
        frames: Number of frames in one video if ``config.json`` has no ``num_frames``; 1 for a model of single
            pictures.
    """
    vision = VisionConfig.from_hf(f.values.get("vision_config", {}))
    bridge = bridge_config.from_hf(
        f.values.get("qformer_config", {}),
        num_query_tokens=f.integer("num_query_tokens", 32),
        encoder_hidden_size=vision.hidden_size,
    )
    text = Fields("text_config", f.values.get("text_config", {}))
    return CaptionerConfig(
        family=family,
        frames=f.integer("num_frames", frames) if frames > 1 else 1,
        vision=vision,
        bridge=bridge,
        language=bridged_language(text.values.get("model_type", "opt")).read_config(text.values),
        image_token_id=f.token_id(f"{slot}_id", f.token_id(f"{slot}_index", None)),
        **read_tokens(text),
    )


def write_blip2(
    config: CaptionerConfig, architecture: str = "Blip2", slot: str = "image_token", part: str = "blip_2"
) -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_blip2` and transformers read.

    ``architecture`` is the first part of transformers' class name. ``slot`` is the first part of the key with the id of
    a visual token. ``part`` is the first part of the ``model_type`` in the sections for vision encoder and Q-Former.
    """
    return {
        "model_type": config.family,
        "architectures": [f"{architecture}ForConditionalGeneration"],
        "num_query_tokens": config.bridge.num_visual_tokens,
        f"{slot}_index": config.image_token_id,
        "tie_word_embeddings": config.language.tie_embeddings,
        "use_decoder_only_language_model": not config.language.is_encoder_decoder,
        "vision_config": config.vision.to_hf() | {"model_type": f"{part}_vision_model"},
        "qformer_config": config.bridge.to_hf() | {"model_type": f"{part}_qformer"},
        "text_config": config.language.to_hf() | write_tokens(config),
        **({"num_frames": config.frames} if config.frames not in (1, VIDEO_FRAMES) else {}),
    }
