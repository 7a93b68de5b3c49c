"""The training recipe: one TOML file, checked key by key before anything starts.

Every key has its place in a frozen dataclass below, with its meaning and default. A key that is not
there is refused with the nearest one that is, and a value outside its range with what was expected.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import tomllib

from blip2edge.errors import ConfigError

Section = TypeVar("Section")


def _positive(section: str, values: Mapping[str, float]) -> None:
    """Raises ConfigError unless all values exceed 0."""
    for key, value in values.items():
        if value <= 0:
            raise ConfigError(f"[{section}] {key} must be greater than 0, not {value}")


def _share(section: str, values: Mapping[str, float]) -> None:
    """Raises ConfigError unless all values lie between 0 and 1."""
    for key, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"[{section}] {key} must lie between 0 and 1, not {value}")


@dataclass(frozen=True)
class OptimizerConfig:
    """How one phase is optimised (AdamW, warm-up, half a cosine)."""

    steps: int = 1000
    """Optimiser steps, one batch each."""
    batch_size: int = 32
    """Pictures (or captions) a step."""
    learning_rate: float = 1e-3
    """Peak, reached after the warm-up."""
    min_learning_rate: float = 1e-5
    """Floor, reached at the last step."""
    warmup_steps: int = 50
    """Steps of the linear rise."""
    weight_decay: float = 0.05
    """On matrices only."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.98
    """AdamW's second moment; the paper's value."""
    clip_norm: float = 1.0
    """Largest norm of the gradient over all trained parameters."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Phase").lower() or "optimizer"
        _positive(name, {"steps": self.steps, "batch_size": self.batch_size, "clip_norm": self.clip_norm})
        _positive(name, {"learning_rate": self.learning_rate})
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"[{name}] min_learning_rate must lie between 0 and learning_rate ({self.learning_rate}),"
                f" not {self.min_learning_rate}"
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError(f"[{name}] warmup_steps and weight_decay must be at least 0")
        _share(name, {"beta1": self.beta1, "beta2": self.beta2})


@dataclass(frozen=True)
class VisionPhase(OptimizerConfig):
    """Pretraining of the picture encoder: every patch tells what covers it."""

    shape_weight: float = 1.0
    """Factor on the loss of the shape: the one label that a patch cannot tell alone, and the last to be learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _positive("vision", {"shape_weight": self.shape_weight})


@dataclass(frozen=True)
class LanguagePhase(OptimizerConfig):
    """Pretraining of the language model: captions, mostly behind a prefix that hints at them."""

    prefix_share: float = 0.75
    """Share of captions behind keywords; the others stand behind noise."""
    prefix_noise: float = 0.3
    """Noise on the prefix, relative to the size of an embedding: the bridge will not hit words exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _share("language", {"prefix_share": self.prefix_share})
        if self.prefix_noise < 0:
            raise ConfigError(f"[language] prefix_noise must be at least 0, not {self.prefix_noise}")


@dataclass(frozen=True)
class Stage2Phase(OptimizerConfig):
    """The bridge learns to speak to the frozen language model."""

    pretrained: str = ""
    """A checkpoint whose picture encoder and language model are taken; empty: pretrain both first."""


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    kind: str = "scenes"
    """Only "scenes", generated on the fly, in this version."""
    prompts: tuple[str, ...] = ("a photo of", "a picture of")
    """Short prompts that some captions continue."""
    prompt_share: float = 0.2
    """Share of captions behind one of the prompts; the others follow the empty prompt."""

    def __post_init__(self) -> None:
        if self.kind != "scenes":
            raise ConfigError(f"[data] kind must be 'scenes', not {self.kind!r}")
        _share("data", {"prompt_share": self.prompt_share})
        if self.prompt_share > 0 and not self.prompts:
            raise ConfigError("[data] prompts is empty and prompt_share is not 0")


@dataclass(frozen=True)
class BlockSizes:
    """Width, depth and heads of one part."""

    hidden_size: int = 128
    """Width."""
    intermediate_size: int = 512
    """Width inside the feed-forward."""
    num_layers: int = 3
    """Depth."""
    num_heads: int = 4
    """Attention heads; divides the width."""

    def __post_init__(self) -> None:
        _positive("model", dataclasses.asdict(self))
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"[model] num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )


@dataclass(frozen=True)
class ModelSizes:
    """The miniature's architecture: a BLIP-2 with an OPT language model."""

    patch_size: int = 8
    """Side of a patch in pixels; divides 64."""
    num_query_tokens: int = 8
    """Visual tokens a picture becomes; at least the seven keywords of a scene."""
    max_positions: int = 128
    """Longest context: visual tokens, prompt and caption."""
    vision: BlockSizes = field(default_factory=BlockSizes)
    """The picture encoder."""
    qformer: BlockSizes = field(default_factory=lambda: BlockSizes(num_layers=4))
    """The Q-Former, with attention to the picture in every second layer."""
    language: BlockSizes = field(default_factory=lambda: BlockSizes(num_layers=4))
    """The language model."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or 64 % self.patch_size:
            raise ConfigError(
                f"[model] patch_size must divide the picture's 64 pixels, not {self.patch_size}"
            )
        if self.num_query_tokens < 7:
            raise ConfigError(f"[model] num_query_tokens must be at least 7, not {self.num_query_tokens}")
        if self.max_positions < 40:
            raise ConfigError(f"[model] max_positions must be at least 40, not {self.max_positions}")


@dataclass(frozen=True)
class TrainingConfig:
    """The whole recipe."""

    seed: int = 0
    """Of weights, scenes and batches."""
    threads: int = 1
    """CPU threads; the same number gives the same weights again."""
    weights_dtype: str = "float16"
    """How the checkpoint stores its tensors: "float16" or "float32"."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSizes = field(default_factory=ModelSizes)
    vision: VisionPhase = field(default_factory=VisionPhase)
    language: LanguagePhase = field(default_factory=LanguagePhase)
    stage2: Stage2Phase = field(default_factory=Stage2Phase)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ConfigError(f"seed must be at least 0, not {self.seed}")
        if self.threads < 1:
            raise ConfigError(f"threads must be at least 1, not {self.threads}")
        if self.weights_dtype not in ("float16", "float32"):
            raise ConfigError(f"weights_dtype must be 'float16' or 'float32', not {self.weights_dtype!r}")


def _value(path: str, kind: Any, value: Any) -> Any:
    """One value in the type that its field declares."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a table [{path}], not {value!r}")
        return _section(path, kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{path} must be a list of strings, not {value!r}")
        return tuple(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{path} must be {names[kind]}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, not {value}")
    return value


def _section(path: str, kind: type[Section], table: Mapping[str, Any]) -> Section:
    """A table of the file as the dataclass that describes it."""
    types = typing.get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind)]  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}"
            raise ConfigError(f"unknown key {where!r}", hint)
        values[key] = _value(where, types[key], value)
    return kind(**values)


def parse_config(text: str) -> TrainingConfig:
    """Reads a recipe.

    Args:
        text: TOML.

    Returns:
        The recipe, with the defaults of the dataclasses where the text is silent.

    Raises:
        ConfigError: Not TOML, an unknown key, or a value of the wrong type or range.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"expected TOML: {error}") from error
    return _section("", TrainingConfig, table)


def load_config(path: str | Path) -> TrainingConfig:
    """Reads a recipe from a file.

    Args:
        path: A TOML file.

    Returns:
        The recipe.

    Raises:
        ConfigError: The file is missing or unreadable, or as for `parse_config`; the file is named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from error
    try:
        return parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", error.fix) from error


def config_hash(config: TrainingConfig) -> str:
    """A hash of all values, defaults included: what two runs with equal results share.

    Args:
        config: The recipe.

    Returns:
        64 hexadecimal digits of SHA-256 over the values' canonical text.
    """
    return hashlib.sha256(repr(config).encode()).hexdigest()
