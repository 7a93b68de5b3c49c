"""The training recipe: one TOML or JSON file, checked key by key before anything starts.

Every key has its place in a frozen dataclass below, with its meaning and default. A key that is not
there is refused with the nearest one that is, and a value outside its range with what was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tomllib

from blip2edge.errors import ConfigError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import at_least_zero, one_of, positive, read_section, unit_interval


@dataclass(frozen=True)
class OptimizerConfig:
    """How one phase is optimised (AdamW, warm-up, half a cosine)."""

    steps: int = 1000
    """Optimiser steps."""
    batch_size: int = 32
    """Samples of one forward pass on one process; a step takes batch_size × accumulate × processes."""
    accumulate: int = 1
    """Forward passes whose gradients are summed to one step."""
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

    least_steps: ClassVar[int] = 1

    def __post_init__(self) -> None:
        name = self._section
        if self.steps < self.least_steps:
            raise ConfigError(f"[{name}] steps must be at least {self.least_steps}, not {self.steps}")
        counts = {"batch_size": self.batch_size, "accumulate": self.accumulate, "clip_norm": self.clip_norm}
        positive(name, {**counts, "learning_rate": self.learning_rate})
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"[{name}] min_learning_rate must lie between 0 and learning_rate ({self.learning_rate}),"
                f" not {self.min_learning_rate}"
            )
        at_least_zero(name, {"warmup_steps": self.warmup_steps, "weight_decay": self.weight_decay})
        unit_interval(name, {"beta1": self.beta1, "beta2": self.beta2})

    @property
    def _section(self) -> str:
        """The recipe's section, by the name of the class."""
        return type(self).__name__.removesuffix("Phase").removesuffix("Config").lower()


@dataclass(frozen=True)
class VisionPhase(OptimizerConfig):
    """Pretraining of the miniature's picture encoder: every patch tells what covers it."""

    shape_weight: float = 1.0
    """Factor on the loss of the shape: the one label that a patch cannot tell alone, and the last to be learned."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self._section, {"shape_weight": self.shape_weight})


@dataclass(frozen=True)
class LanguagePhase(OptimizerConfig):
    """Pretraining of the miniature's language model: captions, mostly behind a prefix that hints at them."""

    prefix_share: float = 0.75
    """Share of captions behind keywords; the others stand behind noise."""
    prefix_noise: float = 0.3
    """Noise on the prefix, relative to the size of an embedding: the bridge will not hit words exactly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        unit_interval(self._section, {"prefix_share": self.prefix_share})
        at_least_zero(self._section, {"prefix_noise": self.prefix_noise})


@dataclass(frozen=True)
class Stage1Phase(OptimizerConfig):
    """Representation learning: the Q-Former with its text side, the picture encoder frozen, no language model."""

    steps: int = 0
    """Optimiser steps; with 0, `train stage2` begins with a fresh bridge."""
    embed_dim: int = 256
    """Width of the space in which pictures and texts are compared."""
    max_tokens: int = 32
    """Longest text; what is longer is cut."""
    itc_weight: float = 1.0
    """Factor on the contrastive loss."""
    itm_weight: float = 1.0
    """Factor on the matching loss."""
    itg_weight: float = 1.0
    """Factor on the captioning loss of the Q-Former's own text head."""

    least_steps: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self._section, {"embed_dim": self.embed_dim})
        if self.max_tokens < 3:
            raise ConfigError(f"[stage1] max_tokens must be at least 3, not {self.max_tokens}")
        weights = {
            "itc_weight": self.itc_weight,
            "itm_weight": self.itm_weight,
            "itg_weight": self.itg_weight,
        }
        at_least_zero(self._section, weights)
        if not any(weights.values()):
            raise ConfigError("[stage1] itc_weight, itm_weight and itg_weight must not all be 0")


@dataclass(frozen=True)
class Stage2Phase(OptimizerConfig):
    """The bridge learns to speak to the frozen language model."""

    max_tokens: int = 64
    """Longest text to be learned, the end token included; what is longer is cut."""
    itg_weight: float = 0.0
    """Factor on the captioning loss of the Q-Former's own text head, which keeps it fit for drafting; 0: it is left."""
    unfreeze_language: bool = False
    """Train the language model too: the baseline that a bridge is compared with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self._section, {"max_tokens": self.max_tokens})
        at_least_zero(self._section, {"itg_weight": self.itg_weight})


@dataclass(frozen=True)
class InstructPhase(Stage2Phase):
    """Stage 2 with the prompt also entering the Q-Former (InstructBLIP)."""


@dataclass(frozen=True)
class LoopConfig:
    """What all phases share."""

    autocast: str = "float32"
    """Arithmetic of the forward pass: "float32", "bfloat16" or "float16" (with a scaled loss)."""
    snapshot_every: int = 500
    """Steps between two snapshots, from which an interrupted run goes on."""
    log_every: int = 0
    """Steps between two lines of the log; 0: about 200 lines a phase."""
    cache_features: bool = False
    """Keep the frozen picture encoder's output on disk: a picture is encoded once, in whatever run."""
    features_dtype: str = "float32"
    """How it is kept: "float32" or "float16"."""
    workers: int = 0
    """Threads that open the pictures of the next batch while this one is computed; 0: none."""
    tensorboard: bool = False
    """Write TensorBoard's event files too; needs the package tensorboard."""

    def __post_init__(self) -> None:
        one_of("loop", "autocast", self.autocast, ("float32", "bfloat16", "float16"))
        one_of("loop", "features_dtype", self.features_dtype, ("float32", "float16"))
        positive("loop", {"snapshot_every": self.snapshot_every})
        at_least_zero("loop", {"workers": self.workers, "log_every": self.log_every})


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
class ModelConfig:
    """Where the parts come from: trained ones by name, or else the miniature, drawn and pretrained here.

    The sizes are the miniature's: a BLIP-2 with an OPT language model, on pictures of 64 pixels.
    """

    checkpoint: str = ""
    """A captioner (directory or hub name) to start from; its bridge is taken where it is of the kind asked for."""
    vision_from: str = ""
    """A checkpoint (directory or hub name) whose picture encoder and preprocessing are taken."""
    language_from: str = ""
    """A language model or a captioner (directory or hub name) whose language model and tokenizer are taken."""
    bridge_from: str = ""
    """What stage 1 wrote: its Q-Former is kept, and its text head where this run has one."""
    bert: str = ""
    """A BERT (directory or hub name) that a fresh Q-Former starts from, with its tokenizer."""
    patch_size: int = 8
    """Side of a patch in pixels; divides 64."""
    num_query_tokens: int = 8
    """Visual tokens a picture becomes; the miniature needs one a keyword, seven at least."""
    max_positions: int = 128
    """Longest context of the miniature's language model: visual tokens, prompt and caption."""
    dropout: float = 0.1
    """In a fresh Q-Former; the miniature's, whose data never repeats, has none."""
    vision: BlockSizes = field(default_factory=BlockSizes)
    """The miniature's picture encoder."""
    qformer: BlockSizes = field(default_factory=lambda: BlockSizes(num_layers=4))
    """A fresh bridge: the Q-Former, or the perceiver's or pool's layers and heads."""
    language: BlockSizes = field(default_factory=lambda: BlockSizes(num_layers=4))
    """The miniature's language model."""

    def __post_init__(self) -> None:
        if self.patch_size < 1 or 64 % self.patch_size:
            raise ConfigError(
                f"[model] patch_size must divide the picture's 64 pixels, not {self.patch_size}"
            )
        positive("model", {"num_query_tokens": self.num_query_tokens})
        unit_interval("model", {"dropout": self.dropout})
        if self.is_miniature and self.num_query_tokens < 7:
            raise ConfigError(f"[model] num_query_tokens must be at least 7, not {self.num_query_tokens}")
        if self.max_positions < 40:
            raise ConfigError(f"[model] max_positions must be at least 40, not {self.max_positions}")
        if not self.checkpoint and bool(self.vision_from) != bool(self.language_from):
            raise ConfigError(
                "[model] vision_from and language_from belong together",
                "give both, or a checkpoint that has the part that is missing",
            )

    @property
    def is_miniature(self) -> bool:
        """Whether picture encoder and language model are drawn and pretrained here."""
        return not (self.checkpoint or self.vision_from or self.language_from)


BRIDGES = ("qformer", "projection", "mlp", "perceiver", "pool", "flamingo")


@dataclass(frozen=True)
class TrainingConfig:
    """The whole recipe."""

    seed: int = 0
    """Of weights, order and chance."""
    threads: int = 1
    """CPU threads of a process; the same number gives the same weights again."""
    weights_dtype: str = "float16"
    """How the checkpoint stores its tensors: "float16", "bfloat16" or "float32"."""
    bridge: str = "qformer"
    """What is trained between the frozen parts: "qformer" (BLIP-2), "projection" (behind a frozen Q-Former: MiniGPT-4),
    "mlp" (LLaVA), "perceiver", "pool" (attention pool), or "flamingo" (perceiver and gated cross-attention)."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    vision: VisionPhase = field(default_factory=VisionPhase)
    language: LanguagePhase = field(default_factory=LanguagePhase)
    stage1: Stage1Phase = field(default_factory=Stage1Phase)
    stage2: Stage2Phase = field(default_factory=Stage2Phase)
    instruct: InstructPhase = field(default_factory=InstructPhase)

    def __post_init__(self) -> None:
        at_least_zero("", {"seed": self.seed})
        positive("", {"threads": self.threads})
        one_of("", "weights_dtype", self.weights_dtype, ("float16", "bfloat16", "float32"))
        one_of("", "bridge", self.bridge, BRIDGES)
        if self.model.is_miniature and self.data.kind != "scenes":
            raise ConfigError(
                "[model] names no parts, and the miniature is made for scenes alone",
                "give checkpoint, or vision_from and language_from",
            )


def parse_config(text: str, *, is_json: bool = False) -> TrainingConfig:
    """Reads a recipe.

    Args:
        text: TOML, or JSON with the same keys.
        is_json: Which.

    Returns:
        The recipe, with the defaults of the dataclasses where the text is silent.

    Raises:
        ConfigError: Neither, an unknown key, or a value of the wrong type or range.
    """
    try:
        table = json.loads(text) if is_json else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"expected {'JSON' if is_json else 'TOML'}: {error}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"expected a JSON object, not {type(table).__name__}")
    return read_section("", TrainingConfig, table)


def load_config(path: str | Path) -> TrainingConfig:
    """Reads a recipe from a file.

    Args:
        path: A TOML file, or a JSON file by its suffix.

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
        return parse_config(text, is_json=Path(path).suffix == ".json")
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
