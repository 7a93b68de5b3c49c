"""Checks of a recipe that need the configs of its checkpoints."""

from __future__ import annotations

from blip2edge.errors import ConfigError
from blip2edge.model.config import CaptionerConfig
from blip2edge.model.vision.registry import VISION_ENCODERS, vision_encoder
from blip2edge.training.config import TrainingConfig
from blip2edge.training.fields import RecipeSection
from blip2edge.training.phases.stage1_checkpoint import Stage1Source


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
            reason = "it has no tokenizer of a Q-Former's text side"
        raise ConfigError(
            f"[model] checkpoint has no effect: vision_from and language_from name both of its parts, and {reason}",
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
