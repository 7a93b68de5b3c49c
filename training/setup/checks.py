"""Checks of a recipe that need the configs of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blip2edge.errors import ConfigError
from blip2edge.model.config import CLIP_VISION, CaptionerConfig, VisionEncoderConfig
from blip2edge.model.vision.registry import VISION_ENCODERS, vision_encoder
from blip2edge.training.config import TrainingConfig
from blip2edge.training.fields import RecipeSection
from blip2edge.training.phases.stage1_checkpoint import Stage1Source
from blip2edge.training.phases.stage2 import elastic_draw


def check_bridge_keys(
    config: TrainingConfig,
    planned: CaptionerConfig,
    kept: Stage1Source | None,
    *,
    text: bool,
    new: bool,
    tokenizer: str | None,
) -> None:
    """Raises ConfigError if the recipe has keys of a new bridge that this run would not use.

    Args:
        config: The recipe.
        planned: Config of the captioner of the run.
        kept: The model of stage 1 whose Q-Former the run uses; None if there is none.
        text: Whether the Q-Former has a text side in this run.
        new: Whether the bridge is new.
        tokenizer: The key of ``[model]`` whose checkpoint has the tokenizer of the Q-Former's text side; None if no
            checkpoint has it.
    """
    model = config.model
    if model.checkpoint and model.vision_from and model.language_from and not (text and tokenizer == "checkpoint"):
        if not text:
            reason = "the Q-Former has no text side in this run"
        elif tokenizer == "bridge_from":
            reason = "bridge_from has the tokenizer of the Q-Former's text side"
        else:
            reason = "the checkpoint has no tokenizer of a Q-Former's text side"
        raise ConfigError(
            "[model] checkpoint has no effect: the picture encoder comes from vision_from, the language model from"
            f" language_from, and {reason}",
            "leave checkpoint out, or leave vision_from or language_from out",
        )
    used = text and (new or tokenizer == "bert")
    if model.bert and not used and not (kept and not kept.has_draft):
        reason = "the Q-Former has no text side in this run" if new else "the Q-Former is not new"
        raise ConfigError(
            f"[model] bert has no effect: {reason}",
            "leave bert out" + (", or set [stage1] steps or [stage2] itg_weight" if new else ""),
        )
    sizes: list[tuple[str, RecipeSection, str]] = [
        *(("model", model, key) for key in ("num_query_tokens", "dropout")),
        *(("model.qformer", model.qformer, key) for key in model.qformer.key_names() if "qformer" in model.written),
    ]
    for title, section, key in () if new else sizes:
        name = "num_visual_tokens" if key == "num_query_tokens" else key
        value = getattr(section, key)
        theirs = getattr(planned.bridge, name, value)
        if key in section.written and theirs != value:
            raise ConfigError(
                f"[{title}] {key} = {value} has no effect: the bridge is that of a checkpoint, which has {theirs}",
                f"leave it out, or set it to {theirs}",
            )


def check_trained_vision(given: CaptionerConfig, config: TrainingConfig) -> None:
    """Raises ConfigError if the recipe trains a picture encoder whose training is not supported."""
    trained = [each.section for each in (config.stage1, config.stage2, config.instruct) if each.unfreeze_vision]
    if trained and not vision_encoder(given.vision.kind).trains:
        kinds = [name for name, row in VISION_ENCODERS.items() if row.trains]
        raise ConfigError(
            f"[{trained[0]}] unfreeze_vision trains picture encoders of the kinds {' and '.join(kinds)}, and this one"
            f" is of the kind {given.vision.kind!r}",
            "set unfreeze_vision to false, or give another encoder",
        )


def check_phases(config: TrainingConfig, planned: CaptionerConfig, phases: Sequence[str]) -> None:
    """Raises ConfigError if a phase of the run cannot train the captioner.

    Args:
        config: The recipe.
        planned: Config of the captioner of the run.
        phases: Names of the phases of the run.
    """
    for name in phases:
        if name == "stage1":
            check_stage1_vision(planned.vision)
        if name in ("stage2", "instruct"):
            elastic_draw(planned, getattr(config, name), seed=0)
    _check_frozen_keys(config, [name for name in phases if name in ("stage1", "stage2", "instruct")])


def _check_frozen_keys(config: TrainingConfig, phases: Sequence[str]) -> None:
    """Raises ConfigError if the recipe has keys for frozen parts, and these phases freeze no such part.

    Stage 1 does not run the language model.
    """
    sections = [getattr(config, name) for name in phases]
    if not all(each.unfreeze_vision for each in sections):
        return
    keys = {"encoder_autocast": "the picture encoder is trained"}
    if all(getattr(each, "unfreeze_language", True) for each in sections):
        keys["frozen_dtype"] = "no part of the model is frozen"
    for key, reason in keys.items():
        if key in config.loop.written:
            raise ConfigError(
                f"[loop] {key} has no effect in {' and '.join(phases)}: {reason}",
                f"leave {key} out, or set unfreeze_vision to false",
            )


def check_stage1_vision(vision: VisionEncoderConfig) -> None:
    """Raises ConfigError if stage 1 does not support a picture encoder."""
    if vision.kind == CLIP_VISION:
        raise ConfigError(
            "stage1 does not support the picture encoder of a CLIP, and model.vision_from is one",
            "set model.vision_from to another encoder, such as a BLIP-2's, or run stage2",
        )


def no_instruction_tokenizer() -> ConfigError:
    """Returns the error for a Q-Former that reads the prompt but has no tokenizer; the caller raises the error."""
    return ConfigError(
        "train instruct needs a tokenizer for the Q-Former, but found none",
        "in [model], set bert to a BERT (directory or hub name), or checkpoint to a model with qformer_tokenizer/",
    )


def check_bert_sizes(config: TrainingConfig, bert: Mapping[str, Any]) -> None:
    """Raises ConfigError if a new Q-Former has other sizes than the BERT that initializes it.

    Args:
        config: The recipe.
        bert: The values of the BERT's ``config.json``; keys that are missing are not compared.
    """
    sizes = config.model.qformer
    for key in ("hidden_size", "intermediate_size"):
        own = getattr(sizes, key)
        given = bert.get(key, own)
        if own != given:
            raise ConfigError(
                f"[model.qformer] {key} = {own}, but the BERT {config.model.bert} ([model] bert) has {given}",
                f"set {key} to {given}, or give another BERT",
            )
    layers = bert.get("num_hidden_layers", sizes.num_layers)
    if sizes.num_layers > layers:
        raise ConfigError(
            f"[model.qformer] num_layers = {sizes.num_layers}, but the BERT {config.model.bert} ([model] bert) has"
            f" {layers}",
            f"set num_layers to at most {layers}, or give another BERT",
        )
