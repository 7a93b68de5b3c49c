"""The training recipe: one TOML or JSON file, checked before training starts.

Every key is a field of a frozen dataclass, with its meaning and default: here, or in `phase_config`, `loop_config`,
`model_config` and `data/config`. For an unknown key the error suggests the nearest known one; for a value outside its
range the error says what was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tomllib

from blip2edge.errors import CheckpointError, ConfigError, DataError, one_line
from blip2edge.reading import parse_json, read_text, reading
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import NOT_NEGATIVE, OBJECTS, POSITIVE, RecipeSection, one_of, read_section, up_to
from blip2edge.training.key_rules import QFORMER_BRIDGES, keys_without_effect
from blip2edge.training.loop_config import VALIDATION_METRICS, LoopConfig, ValidationConfig
from blip2edge.training.model_config import BlockSizes, ModelConfig
from blip2edge.training.phase_config import (
    InstructPhase,
    LanguagePhase,
    OptimizerConfig,
    Stage1Phase,
    Stage2Phase,
    VisionPhase,
)

__all__ = [
    "RECORD_FILE",
    "VALIDATION_METRICS",
    "BlockSizes",
    "InstructPhase",
    "LanguagePhase",
    "LoopConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Stage1Phase",
    "Stage2Phase",
    "TrainingConfig",
    "ValidationConfig",
    "VisionPhase",
    "config_hash",
    "given_values",
    "in_recipe",
    "load_config",
    "parse_config",
]

_MOST_SEED = up_to(1 << 48)  # torch takes 64 bits, and each phase and process makes its own seed from it
RECORD_FILE = "training.json"
"""Record of a training, in its checkpoint. `train --force` replaces only a directory that contains this file."""

_SECTIONS_OF_MODEL = {"model", "vision", "language", "stage1", "stage2", "instruct"}
"""Sections of which a recipe needs at least one: the model, or a phase of its training."""

_BRIDGES = ("qformer", "projection", "mlp", "perceiver", "pool", "flamingo")


@dataclass(frozen=True)
class TrainingConfig(RecipeSection):
    """The whole recipe: the contents of a training configuration file."""

    seed: Annotated[int, NOT_NEGATIVE, _MOST_SEED] = 0
    """Seed of the initial weights, the order of the data and all random draws."""
    threads: Annotated[int, POSITIVE, OBJECTS] = 1
    """CPU threads of a process; only the same number reproduces the same weights."""
    weights_dtype: Annotated[str, one_of("float16", "bfloat16", "float32")] = "float16"
    """Type of the tensors in the checkpoint: "float16", "bfloat16" or "float32". The output of stage 1, from which
    stage 2 starts, is always in float32."""
    bridge: Annotated[str, one_of(*_BRIDGES)] = "qformer"
    """What is trained between the frozen parts: "qformer" (BLIP-2), "projection" (after a frozen Q-Former: MiniGPT-4),
    "mlp" (LLaVA), "perceiver", "pool" (attention pool), or "flamingo" (perceiver and gated cross-attention)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    vision: VisionPhase = field(default_factory=VisionPhase)
    language: LanguagePhase = field(default_factory=LanguagePhase)
    stage1: Stage1Phase = field(default_factory=Stage1Phase)
    stage2: Stage2Phase = field(default_factory=Stage2Phase)
    instruct: InstructPhase = field(default_factory=InstructPhase)

    section = ""

    def runs_stage1(self, stage: str) -> bool:
        """Returns whether `blip2edge train STAGE` runs stage 1; false if the recipe names the output of a stage 1."""
        return self.stage1.steps > 0 and (stage == "stage1" or not self.model.bridge_from)

    def __post_init__(self) -> None:
        super().__post_init__()
        for problem, fix in (*_conflicts(self), *keys_without_effect(self)):
            raise ConfigError(problem, fix)


class _Conflict(NamedTuple):
    """Two values of a recipe that do not work together, and how to correct the recipe."""

    problem: str
    fix: str


def _conflicts(config: TrainingConfig) -> Iterator[_Conflict]:
    """Yields the conflicts in a recipe: values that do not work together.

    Args:
        config: The recipe; each section is valid on its own.

    Yields:
        The problem and the correction of each conflict.
    """
    yield from _loop_conflicts(config)
    for section, data in (("data", config.data), ("validation", config.validation)):
        if data.most_shots and config.bridge != "flamingo":
            yield _Conflict(
                f"[{section}] shots = {data.most_shots} does not work with bridge = {config.bridge!r}, whose model"
                " reads one picture in a text",
                "leave shots out, or set bridge = 'flamingo'",
            )
    if config.stage1.steps and config.bridge not in QFORMER_BRIDGES:
        yield _Conflict(
            f"[stage1] steps is {config.stage1.steps}, but stage 1 trains a Q-Former, and bridge = {config.bridge!r}",
            "set bridge to 'qformer', or leave [stage1] out",
        )
    if config.model.is_miniature and not config.data.only_scenes:
        yield _Conflict(
            "[model] names no trained parts, so the recipe trains the miniature model, which supports the data kind"
            f" 'scenes' only, not {config.data.kind!r}",
            "set checkpoint, or vision_from and language_from, in [model]",
        )


def _loop_conflicts(config: TrainingConfig) -> Iterator[_Conflict]:
    loop, validation = config.loop, config.validation
    if config.bridge == "flamingo" and loop.frozen_dtype != "float32":
        yield _Conflict(
            f"[loop] frozen_dtype = {loop.frozen_dtype!r} does not work with bridge = 'flamingo', which trains"
            " layers inside the language model",
            "leave frozen_dtype out; autocast = 'bfloat16' saves time, and recompute_activations saves memory",
        )
    if (loop.frozen_dtype, loop.autocast) == ("float16", "bfloat16"):
        yield _Conflict(
            "[loop] frozen_dtype = 'float16' does not work with autocast = 'bfloat16': an operator would get values of"
            " both types",
            "set frozen_dtype to 'bfloat16', or autocast to 'float16' or 'float32'",
        )
    if loop.cache_features and config.data.augments:
        yield _Conflict(
            "[loop] cache_features does not work with crop or flip in [data], which change each picture every time",
            "set cache_features to false, or leave crop and flip out",
        )
    if loop.fsdp and loop.autocast == "float16":
        yield _Conflict(
            "[loop] fsdp does not work with autocast = 'float16', whose losses are scaled",
            "set autocast to 'bfloat16' or 'float32'",
        )
    for phase in (config.stage1, config.stage2, config.instruct):
        if phase.unfreeze_vision and loop.cache_features:
            yield _Conflict(
                f"[{phase.section}] unfreeze_vision does not work with [loop] cache_features: the features of a picture"
                " change in every step",
                "set cache_features to false, or unfreeze_vision to false",
            )
    if loop.ema_weights != "everywhere" and not loop.ema_decay:
        yield _Conflict(
            f"[loop] ema_weights = {loop.ema_weights!r}, but ema_decay is 0: there are no averaged weights",
            "set ema_decay, for example to 0.999, or leave ema_weights out",
        )
    elif loop.ema_weights != "everywhere" and validation.every and validation.keep_best:
        yield _Conflict(
            f"[loop] ema_weights = {loop.ema_weights!r} does not work with keep_best in [validation]: the phase ends"
            " with the weights that were scored best",
            "set [validation] keep_best to false, or leave ema_weights out",
        )


def parse_config(text: str, *, is_json: bool = False) -> TrainingConfig:
    """Parses the text of a recipe and checks it.

    Args:
        text: TOML, or JSON with the same keys.
        is_json: Whether the text is JSON.

    Returns:
        The recipe; missing keys get the defaults of the dataclasses.

    Raises:
        ConfigError: The text cannot be parsed, a key is unknown, or a value has the wrong type or range.
    """

    def explain(error: Exception) -> ConfigError:
        return ConfigError(f"expected {'JSON' if is_json else 'TOML'}: {one_line(error)}")

    with reading("the recipe", "a recipe", ConfigError, explain=explain):
        table = parse_json(text, strict=True) if is_json else tomllib.loads(text)
    if not isinstance(table, dict):
        raise ConfigError(f"expected a JSON object, not {type(table).__name__}")
    return read_section("", TrainingConfig, table)


def load_config(path: str | Path) -> TrainingConfig:
    """Reads a recipe from a file.

    Args:
        path: A JSON file if it ends in `.json`, else a TOML file.

    Returns:
        The recipe.

    Raises:
        ConfigError: The file cannot be read, or its contents are wrong (see `parse_config`); the error names the file.
    """
    text = read_text(Path(path), ConfigError)
    with in_recipe(path):
        config = parse_config(text, is_json=Path(path).suffix == ".json")
        if not _SECTIONS_OF_MODEL & set(config.written):
            found = f"has only {', '.join(config.written)}" if config.written else "is empty"
            raise ConfigError(
                f"the recipe {found}, so it would train the miniature with default values",
                "name the trained parts in [model], or write at least the section of a phase, such as [stage2]",
            )
    return config


@contextmanager
def in_recipe(path: str | Path) -> Iterator[None]:
    """Adds the path of a recipe to the errors about its keys, data and checkpoints that a ``with`` block raises."""
    try:
        yield
    except (ConfigError, DataError, CheckpointError) as error:
        raise error.with_problem(lambda problem: f"{path}: {problem}") from error


def given_values(config: Any) -> dict[str, Any]:
    """Returns the values of a recipe section that differ from the defaults, subsections included, by key."""
    given: dict[str, Any] = {}
    default = type(config)()
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if value != getattr(default, each.name):
            given[each.name] = _as_json(value)
    return given


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return given_values(value) if dataclasses.is_dataclass(value) else value


def config_hash(config: TrainingConfig) -> str:
    """Computes a hash of all values of a recipe that differ from the defaults.

    If a later version of blip2edge adds a key, the hash of a recipe without this key stays the same.

    Args:
        config: The recipe.

    Returns:
        64 hexadecimal digits: SHA-256 of the values as JSON with sorted keys.
    """
    return hashlib.sha256(json.dumps(given_values(config), sort_keys=True).encode()).hexdigest()
