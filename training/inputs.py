"""Checks that the checkpoints and data files of a recipe exist, and that the output does not replace them.

It needs no torch, so an error comes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from blip2edge.bundle.outputs.publishing import check_not_source
from blip2edge.errors import CheckpointError, DataError
from blip2edge.model.checkpoint.stored.files import local_checkpoint
from blip2edge.picture_files import is_address
from blip2edge.training.config import TrainingConfig
from blip2edge.training.data.config import DataConfig

CHECKPOINTS = ("checkpoint", "vision_from", "language_from", "bridge_from", "bert")
"""Keys of ``[model]`` that name checkpoints."""

_PATTERN = "*?[{"  # characters of a pattern or a range of shards, whose files are found when they are opened


def check_recipe_files(config: TrainingConfig, base: Path, stage: str) -> None:
    """Checks the paths of a recipe. Names on the hub, addresses and patterns are not looked up.

    Args:
        config: The recipe.
        base: Directory of the recipe; relative paths start there.
        stage: "stage1", "stage2" or "instruct"; "stage1" does not use the data of the validation.

    Raises:
        CheckpointError: A checkpoint is neither on this machine nor a hub name.
        DataError: A file or folder of the data is missing.
    """
    for key in CHECKPOINTS:
        name = getattr(config.model, key)
        path = base / name
        try:
            if name:
                local_checkpoint(path if path.exists() else name)
        except CheckpointError as error:
            raise CheckpointError(
                f"[model] {key} = {name!r}: expected a checkpoint directory at {path.resolve()} (relative to the "
                "recipe), or a hub name as owner/name",
                "correct the path, or make that checkpoint first",
            ) from error
    for key, text in _places(config, stage):
        if not is_address(text) and not (base / text).exists() and not any(sign in text for sign in _PATTERN):
            raise DataError(
                f"{key} = {text!r}: there is no {(base / text).resolve()}",
                "correct the path; a relative path starts from the directory of the recipe",
            )


def check_output_apart(target: Path, config: TrainingConfig, base: Path, stage: str) -> None:
    """Checks that the output does not replace a checkpoint or the data of the recipe.

    Args:
        target: The output directory.
        config: The recipe.
        base: Directory of the recipe; relative paths start there.
        stage: "stage1", "stage2" or "instruct".

    Raises:
        OutputError: A checkpoint or data of the recipe is the output directory, or lies in it.
    """
    named = (getattr(config.model, key) for key in CHECKPOINTS)
    for name in named:
        if name and (base / name).exists():  # else a name on the hub
            check_not_source(target, base / name)
    for _, text in _places(config, stage):
        if not is_address(text):
            check_not_source(target, base / text)


def _places(config: TrainingConfig, stage: str) -> Iterator[tuple[str, str]]:
    """Yields (key, path) for each path in `[data]`, and in `[validation]` if the stage has a validation."""
    named: list[tuple[str, DataConfig]] = [("data", each) for each in config.data.parts]
    if config.validation.every and stage != "stage1":
        named.append(("validation", config.validation))
    for section, data in named:
        for key in ("path", "images", "annotations"):
            text = getattr(data, key)
            if text:
                yield f"[{section}] {key}", text
