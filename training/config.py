"""The training recipe: one TOML file, checked key by key before anything starts.

Every key has its place in a frozen dataclass below, with its meaning and default. A key that is not
there is refused with the nearest one that is, and a value outside its range with what was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomllib

from blip2edge.errors import ConfigError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import positive, read_section, share


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
        positive(name, {"steps": self.steps, "batch_size": self.batch_size, "clip_norm": self.clip_norm})
        positive(name, {"learning_rate": self.learning_rate})
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"[{name}] min_learning_rate must lie between 0 and learning_rate ({self.learning_rate}),"
                f" not {self.min_learning_rate}"
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ConfigError(f"[{name}] warmup_steps and weight_decay must be at least 0")
        share(name, {"beta1": self.beta1, "beta2": self.beta2})


@dataclass(frozen=True)
class VisionPhase(OptimizerConfig):
    """Pretraining of the picture encoder: every patch tells what covers it."""

    shape_weight: float = 1.0
    """Factor on the loss of the shape: the one label that a patch cannot tell alone, and the last to be learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("vision", {"shape_weight": self.shape_weight})


@dataclass(frozen=True)
class LanguagePhase(OptimizerConfig):
    """Pretraining of the language model: captions, mostly behind a prefix that hints at them."""

    prefix_share: float = 0.75
    """Share of captions behind keywords; the others stand behind noise."""
    prefix_noise: float = 0.3
    """Noise on the prefix, relative to the size of an embedding: the bridge will not hit words exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        share("language", {"prefix_share": self.prefix_share})
        if self.prefix_noise < 0:
            raise ConfigError(f"[language] prefix_noise must be at least 0, not {self.prefix_noise}")


@dataclass(frozen=True)
class Stage2Phase(OptimizerConfig):
    """The bridge learns to speak to the frozen language model."""

    pretrained: str = ""
    """A checkpoint whose picture encoder and language model are taken; empty: pretrain both first."""


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
        positive("model", dataclasses.asdict(self))
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
    return read_section("", TrainingConfig, table)


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


def given_values(config: Any) -> dict[str, Any]:
    """The values of a section that differ from its defaults, sections within it included."""
    given: dict[str, Any] = {}
    default = type(config)()
    for each in dataclasses.fields(config):
        value = getattr(config, each.name)
        if value != getattr(default, each.name):
            given[each.name] = given_values(value) if dataclasses.is_dataclass(value) else value
    return given


def config_hash(config: TrainingConfig) -> str:
    """A hash of all values that are not the defaults: what two runs with equal results share.

    A key that a later version adds does not change the hash of a recipe that does not use it.

    Args:
        config: The recipe.

    Returns:
        64 hexadecimal digits of SHA-256 over the values' canonical text.
    """
    return hashlib.sha256(json.dumps(given_values(config), sort_keys=True).encode()).hexdigest()
