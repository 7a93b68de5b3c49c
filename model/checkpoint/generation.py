"""Reads the generation defaults of a bundle.

They are from ``generation_config.json`` for the families that use this file in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2edge.errors import CheckpointError, UsageError
from blip2edge.model.checkpoint.side_keys import GENERATION, check_keys
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.config_json import Fields
from blip2edge.model.families.registry import FAMILIES
from blip2edge.runtime.decoding.options import GenerationOptions

MAX_NEW_TOKENS = 30
"""Default of the largest number of new tokens: the limit in BLIP-2's evaluation on COCO."""

FILE = "generation_config.json"

SAMPLING: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Keys that have an effect only if ``do_sample`` is true, and their defaults in transformers."""

NO_EFFECT: Mapping[str, Any] = {
    "min_new_tokens": 0,
    "min_length": 0,
    "remove_invalid_values": False,
    "num_beams": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "renormalize_logits": False,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""For some keys of ``generation_config.json``: the value that has no effect.

A key with this value is not written to the bundle's manifest.
"""

TRANSFORMERS_LENGTH = 20
"""transformers' default of ``max_length``."""


def end_tokens(directory: Path, config: CaptionerConfig) -> tuple[int, ...]:
    """Returns the end tokens in ``generation_config.json``; empty if the family does not use this file."""
    path = directory / FILE
    if not FAMILIES[config.family].generation or not path.is_file():
        return ()
    return Fields(str(path), read_checkpoint_json(path)).token_ids("eos_token_id", None)


def read_generation(directory: Path, config: CaptionerConfig) -> tuple[dict[str, Any], list[str]]:
    """Returns the value of ``generation`` for the manifest, and warnings.

    As in transformers, only LLaVA and Idefics use ``generation_config.json``. For all other families, the end tokens
    are from ``config.json``, and the other defaults do not depend on the checkpoint.

    Raises:
        CheckpointError: A key has a value that is not supported.
    """
    family = FAMILIES[config.family]
    generation: dict[str, Any] = {
        "eos_token_ids": list(config.eos_token_ids),
        "stop": list(family.stop),
        "pad_token_id": config.pad_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    path = directory / FILE
    if not path.is_file():
        return generation, []
    values = {key: value for key, value in read_checkpoint_json(path).items() if value is not None}
    if not family.generation:
        defaults = {"do_sample": False, **SAMPLING, **NO_EFFECT}
        changed = [
            key
            for key, value in values.items()
            if GENERATION.effect(key) != "neutral"
            and not (key == "eos_token_id" and _as_list(value) == list(config.eos_token_ids))
            and value not in (defaults.get(key), generation.get(key), *GENERATION.checked.get(key, ()))
        ]
        warning = f"{path}: not used for {family.title}, as in transformers: {', '.join(changed)}"
        return generation, [warning] if changed else []
    warnings = check_keys(GENERATION, values, str(path))
    if "max_new_tokens" not in values and values.get("max_length", TRANSFORMERS_LENGTH) != TRANSFORMERS_LENGTH:
        warnings.append(f"{path}: max_length is not used; texts have at most {MAX_NEW_TOKENS} new tokens by default")
    generation["eos_token_ids"] = list(end_tokens(directory, config) or config.eos_token_ids)
    return generation | _options(values, generation["eos_token_ids"], path), warnings


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list) else [value]


def _options(values: Mapping[str, Any], eos: list[Any], path: Path) -> dict[str, Any]:
    """Returns the generation options for the manifest, without options whose value has no effect.

    Args:
        values: Content of ``generation_config.json``.
        eos: End tokens, only for the check of the values.
        path: The file, for errors.

    Raises:
        CheckpointError: A value is outside its range.
    """
    sampled = values.get("do_sample", False)
    found = {
        key: values[key]
        for key in GENERATION.honoured
        if key in values and key not in ("do_sample", "eos_token_id") and (sampled or key not in SAMPLING)
    }
    if sampled:
        found = {**{key: SAMPLING[key] for key in ("temperature", "top_k", "top_p")}, **found}
    found = {key: value for key, value in found.items() if key not in NO_EFFECT or value != NO_EFFECT[key]}
    try:
        GenerationOptions(**{"max_new_tokens": MAX_NEW_TOKENS, "eos_token_ids": eos, **found})
    except UsageError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return found
