"""Reads and writes the special token ids of a ``config.json``."""

from __future__ import annotations

from typing import Any

from blip2edge.model.config import CaptionerConfig
from blip2edge.model.config_json import Fields

LANGUAGE_DEFAULTS: dict[str, dict[str, int]] = {
    "opt": {"bos": 2, "eos": 2, "pad": 1},
    "llama": {"bos": 1, "eos": 2},
    "mistral": {"bos": 1, "eos": 2},
    "t5": {"eos": 1, "pad": 0, "decoder_start": 0},
}
"""Default special token ids of transformers' configs, by ``model_type``."""


def read_tokens(text: Fields) -> dict[str, Any]:
    """Reads the special token ids of a ``text_config``; returns them as fields of :class:`CaptionerConfig`."""
    defaults = LANGUAGE_DEFAULTS.get(str(text.values.get("model_type", "opt")), {})
    return {
        "bos_token_id": text.token_id("bos_token_id", defaults.get("bos")),
        "eos_token_ids": text.token_ids("eos_token_id", defaults.get("eos")),
        "pad_token_id": text.token_id("pad_token_id", defaults.get("pad")),
        "decoder_start_token_id": text.token_id("decoder_start_token_id", defaults.get("decoder_start")),
    }


def write_tokens(config: CaptionerConfig) -> dict[str, Any]:
    """Returns the special token ids as keys of a ``text_config``."""
    eos: int | list[int] | None = list(config.eos_token_ids)
    if len(config.eos_token_ids) < 2:
        eos = config.eos_token_ids[0] if config.eos_token_ids else None
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": config.pad_token_id}
    if config.decoder_start_token_id is not None:
        ids["decoder_start_token_id"] = config.decoder_start_token_id
    return ids
