"""Prepares the validation during training: reads and checks the held-out data, and makes the function that scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blip2edge.errors import ConfigError, ImageError
from blip2edge.training.data.entries import BrokenSamples, Entry, by_picture
from blip2edge.training.data.registry import read_entries
from blip2edge.training.evaluation.few_shots import Examples
from blip2edge.training.evaluation.models import CaptionModel, EvaluatedModel
from blip2edge.training.evaluation.scoring import Figures, ScoringOptions, score_entries, score_scenes
from blip2edge.training.key_rules import choice
from blip2edge.training.loop_config import ValidationConfig

METRICS = {
    "scenes": ("exact_match", "cider_d", "bleu_4", "rouge_l"),
    "questions": ("vqa_accuracy",),
    "captions": ("cider_d", "bleu_4", "rouge_l"),
}
"""Names of the scores that can be computed, by the kind of the data; the first score is the default."""


@dataclass(frozen=True)
class ValidationData:
    """The held-out data of a validation, read and checked.

    Attributes:
        config: Section ``[validation]`` of the recipe.
        metric: Name of the score to maximise.
        entries: The captions or questions; empty for generated scenes.
        broken: The broken samples of the data.
    """

    config: ValidationConfig
    metric: str
    entries: Sequence[Entry] = ()
    broken: BrokenSamples | None = None


def open_validation(
    config: ValidationConfig, base: Path, log: Callable[[str], None] = lambda line: None
) -> ValidationData:
    """Reads the data of a validation, and opens each picture once, before the training begins.

    Args:
        config: Section ``[validation]`` of the recipe.
        base: Directory that the recipe's relative paths start from.
        log: Receives a line with the number of broken samples, if there are any.

    Raises:
        ConfigError: The metric of the recipe cannot be computed on the data.
        DataError: The data cannot be read, no picture opens, or more samples are broken than allowed.
    """
    if config.kind == "scenes":
        return ValidationData(config, _metric("scenes", config))
    found, broken = read_entries(config, base=base)
    shown = by_picture(list(found))[: config.pictures]
    if not shown:
        raise broken.none_usable("sample to validate with")
    asks = bool(shown[0].entries[0].question)
    metric = _metric("questions" if asks else "captions", config)
    usable = 0
    for each in shown:
        try:
            each.picture.open()
            usable += 1
        except ImageError as error:
            for name in [entry.sample_id for entry in each.entries] if asks else [each.image_id]:
                broken.add(name, error.problem)  # counted once: the validations skip it by the same name
    if not usable:
        raise broken.none_usable("picture to validate with")
    if broken.problems:
        log(f"validation: {broken.count} broken and left out: {broken.named()}")
    return ValidationData(config, metric, [entry for each in shown for entry in each.entries], broken)


def validation_scores(data: ValidationData, captioner: CaptionModel) -> Callable[[], Figures]:
    """Returns a function that scores a captioner on the data of a validation.

    Args:
        data: The data.
        captioner: The captioner. Its weights change between two validations; each validation uses the current weights.
    """
    model, config, broken = EvaluatedModel(captioner=captioner), data.config, data.broken
    if broken is None:
        wanted = ScoringOptions(metrics=("exact",) if data.metric == "exact_match" else ("exact", "captions"))
        return lambda: score_scenes(model, config.pictures, "heldout", wanted)
    examples = Examples(data.entries, config.shots) if config.shots else None
    return lambda: score_entries(model, data.entries, broken, ScoringOptions(examples=examples))


def _metric(data: str, config: ValidationConfig) -> str:
    """Returns the name of the score that training maximises: the recipe's, or the default of the data."""
    possible = METRICS[data]
    if config.metric and config.metric not in possible:
        raise ConfigError(
            f"[validation] metric = {config.metric!r} cannot be computed on {data}",
            f"set metric to {choice(possible)}",
        )
    return config.metric or possible[0]
