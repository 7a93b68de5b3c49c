"""Prepares the validation during training: reads the held-out data once, and makes the function that scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blip2edge.errors import ConfigError
from blip2edge.training.data.entries import by_picture
from blip2edge.training.data.registry import read_entries
from blip2edge.training.evaluation.few_shots import Examples
from blip2edge.training.evaluation.models import CaptionModel, EvaluatedModel
from blip2edge.training.evaluation.scoring import Figures, ScoringOptions, score_entries, score_scenes
from blip2edge.training.loop_config import ValidationConfig

METRICS = {
    "scenes": ("exact_match", "cider_d", "bleu_4", "rouge_l"),
    "questions": ("vqa_accuracy",),
    "captions": ("cider_d", "bleu_4", "rouge_l"),
}
"""Names of the scores that can be computed, by the kind of the data; the first score is the default."""


def validation_scores(
    config: ValidationConfig, base: Path, captioner: CaptionModel
) -> tuple[Callable[[], Figures], str]:
    """Prepares a validation.

    Args:
        config: Section ``[validation]`` of the recipe.
        base: Directory that the recipe's relative paths start from.
        captioner: The captioner; each validation uses the weights that it has at that time.

    Returns:
        A function that scores the captioner, and the name of the score to maximise.

    Raises:
        ConfigError: The metric of the recipe cannot be computed on the data.
        DataError: The data cannot be read.
    """
    model = EvaluatedModel(captioner=captioner)
    if config.kind == "scenes":
        metric = _metric("scenes", config)
        wanted = ScoringOptions(metrics=("exact",) if metric == "exact_match" else ("exact", "captions"))
        return lambda: score_scenes(model, config.pictures, "heldout", wanted), metric
    found, broken = read_entries(config, base=base)
    entries = [entry for shown in by_picture(list(found))[: config.pictures] for entry in shown.entries]
    if not entries:
        raise broken.none_usable("sample to validate with")
    metric = _metric("questions" if entries[0].question else "captions", config)
    examples = Examples(entries, config.shots) if config.shots else None
    return lambda: score_entries(model, entries, broken, ScoringOptions(examples=examples)), metric


def _metric(data: str, config: ValidationConfig) -> str:
    """Returns the name of the score that training maximises: the recipe's, or the default of the data."""
    possible = METRICS[data]
    if config.metric and config.metric not in possible:
        raise ConfigError(
            f"[validation] metric = {config.metric!r} cannot be computed on {data}",
            f"set one of {', '.join(possible)}",
        )
    return config.metric or possible[0]
