"""BLIP: captions and answers from a decoder that attends to patches, or to the encoded states of a question.

Li et al., arXiv 2201.12086. There is no bridge: pictures add no tokens to the text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blip2edge.model.config import CaptionerConfig, NoBridge, VisionConfig
from blip2edge.model.config_json import Fields, layered
from blip2edge.model.language.bert import BertConfig

BLIP_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 384,
    "patch_size": 16,
    "layer_norm_eps": 1e-5,
}
"""Defaults of transformers' BlipVisionConfig."""

BLIP_TOKEN_DEFAULTS = {"bos_token_id": 30522, "sep_token_id": 102, "pad_token_id": 0}
"""Defaults of BlipTextConfig; the BOS is [DEC], the 30523rd token of BLIP's BERT."""


def read_vision(f: Fields) -> VisionConfig:
    """Reads the ``vision_config`` of a BLIP ``config.json``."""
    values = Fields("vision_config", f.values.get("vision_config", {})).values
    return VisionConfig.from_hf(layered(values, BLIP_VISION_DEFAULTS))


def read_text_config(f: Fields, vision: VisionConfig) -> tuple[BertConfig, dict[str, int | None]]:
    """Reads the ``text_config`` of a BLIP ``config.json``; returns the config and the ids of the special tokens."""
    text = Fields("text_config", f.values.get("text_config", {}))
    # As in transformers, encoder_hidden_size of text_config is ignored.
    # As in transformers, either tie_word_embeddings ties.
    tied = f.flag("tie_word_embeddings", True) or text.flag("tie_word_embeddings", True)
    own = {"encoder_hidden_size": vision.hidden_size, "tie_word_embeddings": tied}
    config = BertConfig.from_hf(layered(own, text.values))
    return config, {name: text.token_id(name, default) for name, default in BLIP_TOKEN_DEFAULTS.items()}


def read_blip(f: Fields, family: str = "blip", reads_question: bool = False) -> CaptionerConfig:
    """Reads the config of ``BlipForConditionalGeneration`` or ``BlipForQuestionAnswering``.

    A text ends with the separator token. ``reads_question``: whether an encoder reads a question first (VQA).
    """
    vision = read_vision(f)
    language, ids = read_text_config(f, vision)
    sep = ids["sep_token_id"]
    return CaptionerConfig(
        family=family,
        vision=vision,
        bridge=NoBridge(),
        language=replace(language, reads_question=reads_question),
        bos_token_id=ids["bos_token_id"],
        eos_token_ids=() if sep is None else (sep,),
        pad_token_id=ids["pad_token_id"],
        decoder_start_token_id=ids["bos_token_id"] if reads_question else None,
    )


def write_blip(config: CaptionerConfig, architecture: str = "BlipForConditionalGeneration") -> dict[str, Any]:
    """Makes the ``config.json`` that :func:`read_blip` and transformers read."""
    ids = {
        "bos_token_id": config.bos_token_id,
        "sep_token_id": config.eos_token_ids[0] if config.eos_token_ids else None,
        "pad_token_id": config.pad_token_id,
    }
    return {
        "model_type": "blip",
        "architectures": [architecture],
        "tie_word_embeddings": config.language.tie_embeddings,
        "vision_config": config.vision.to_hf() | {"model_type": "blip_vision_model"},
        "text_config": config.language.to_hf() | ids,
    }
