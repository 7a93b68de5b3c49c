"""Plans a run before its model is built: configs, memory and data are read and checked, so that errors come early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from accelerate import Accelerator

from blip2edge.training.config import TrainingConfig
from blip2edge.training.evaluation.validation import ValidationData, open_validation
from blip2edge.training.inputs import check_recipe_files
from blip2edge.training.loading.run_data import check_data, of_data
from blip2edge.training.setup.build import PlannedParts, plan_parts
from blip2edge.training.setup.checks import check_phases
from blip2edge.training.setup.memory import announce


class PlannedRun(NamedTuple):
    """A run whose recipe has been checked.

    Attributes:
        parts: The planned model.
        validation: The held-out data; None without validation.
    """

    parts: PlannedParts
    validation: ValidationData | None


def plan_training(
    stage: str,
    config: TrainingConfig,
    base: Path,
    accelerator: Accelerator,
    phases: list[str],
    log: Callable[[str], None],
) -> PlannedRun:
    """Makes all checks of a recipe that need no weights.

    Args:
        stage: "stage1", "stage2" or "instruct".
        config: The recipe.
        base: Directory of the recipe; its relative paths start there.
        accelerator: Device and processes.
        phases: Names of the phases of the run.
        log: Receives status lines: where the parts come from, the predicted memory, broken samples of the validation.

    Raises:
        ConfigError: The parts do not fit together, a phase cannot train them, or the memory is too small.
        CheckpointError: A checkpoint cannot be read.
        DataError: Data cannot be read, or no sample of a data set can be used.
    """
    check_recipe_files(config, base, stage)
    parts = plan_parts(stage, config, base)
    check_phases(config, parts.config, phases)
    announce(parts.config, config, stage, accelerator, log, new_bridge=parts.new_bridge)
    if config.model.is_miniature:
        log("[model] names no trained parts: the miniature is trained from scratch, on generated scenes")
    if parts.bridge:
        log(f"bridge ({config.bridge}): {parts.bridge}")
    if config.stage1.steps and not config.runs_stage1(stage):
        log(f"stage1 does not run: bridge_from ({config.model.bridge_from}) is its output")
    vision = parts.config.vision
    check_data(config, base, accelerator, phases, (vision.num_embeds, vision.hidden_size))
    if not config.validation.every:
        return PlannedRun(parts, None)
    if stage == "stage1":
        log("stage1: [validation] is not used: stage 1 generates no captions")
        return PlannedRun(parts, None)
    with of_data("[validation]", config.validation):
        return PlannedRun(parts, open_validation(config.validation, base, log))
