"""The training recipe: one TOML or JSON file, checked before training starts.

Every key is a field of a frozen dataclass below, with its meaning and default. For an unknown key the error suggests
the nearest known one; for a value outside its range the error says what was expected.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tomllib

from blip2edge.errors import ConfigError, one_line
from blip2edge.reading import parse_json, read_text, reading
from blip2edge.training.data.config import DataConfig
from blip2edge.training.fields import NOT_NEGATIVE, POSITIVE, SHARE, RecipeSection, at_least, one_of, read_section

VALIDATION_METRICS = ("exact_match", "cider_d", "bleu_4", "rouge_l", "vqa_accuracy")


@dataclass(frozen=True)
class OptimizerConfig(RecipeSection):
    """Optimizer settings of one phase (AdamW, linear warm-up, then half a cosine)."""

    steps: Annotated[int, at_least(1)] = 1000
    """Optimizer steps."""
    batch_size: Annotated[int, POSITIVE] = 32
    """Samples of one forward pass on one process; a step uses batch_size × accumulate × processes samples."""
    accumulate: Annotated[int, POSITIVE] = 1
    """Forward passes whose gradients are accumulated for one step. In stage 1, negatives come from one pass alone."""
    learning_rate: Annotated[float, POSITIVE] = 1e-3
    """Peak learning rate, reached after the warm-up."""
    min_learning_rate: float = 1e-5
    """Lowest learning rate, reached at the last step."""
    warmup_steps: Annotated[int, NOT_NEGATIVE] = 50
    """Steps of the linear warm-up."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    """Weight decay, applied to matrices only."""
    beta1: Annotated[float, SHARE] = 0.9
    """Decay rate of AdamW's first moment."""
    beta2: Annotated[float, SHARE] = 0.98
    """Decay rate of AdamW's second moment; the value of the BLIP-2 paper."""
    clip_norm: Annotated[float, POSITIVE] = 1.0
    """Gradients are clipped to this norm over all trained parameters."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.min_learning_rate <= self.learning_rate:
            raise ConfigError(
                f"[{self.section}] min_learning_rate must lie between 0 and learning_rate ({self.learning_rate}),"
                f" not {self.min_learning_rate}"
            )


@dataclass(frozen=True)
class VisionPhase(OptimizerConfig):
    """Pretraining of the miniature's picture encoder: each patch predicts the object that covers it."""

    shape_weight: Annotated[float, POSITIVE] = 1.0
    """Weight of the shape's loss. A single patch does not show the shape, so the shape is learned last."""


@dataclass(frozen=True)
class LanguagePhase(OptimizerConfig):
    """Pretraining of the miniature's language model on captions that follow embeddings of their keywords, or noise.

    Keywords are the caption's sizes, colours, shapes and relation. Their embeddings replace the visual tokens, so that
    the language model learns to use visual tokens later.
    """

    prefix_share: Annotated[float, SHARE] = 0.75
    """Share of captions that follow embeddings of their keywords; the others follow noise."""
    prefix_noise: Annotated[float, NOT_NEGATIVE] = 0.3
    """Noise added to those embeddings, relative to their size, because visual tokens never equal words exactly."""


@dataclass(frozen=True)
class Stage1Phase(OptimizerConfig):
    """Representation learning: trains the Q-Former and its text side. The picture encoder is frozen."""

    steps: Annotated[int, NOT_NEGATIVE] = 0
    """Optimizer steps; with 0, `train stage2` starts with a new bridge."""
    embed_dim: Annotated[int, POSITIVE] = 256
    """Dimension of the vectors in which pictures and texts are compared."""
    max_tokens: Annotated[int, at_least(3)] = 32
    """Longest text in tokens; longer texts are cut."""
    itc_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the contrastive loss (ITC)."""
    itm_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the matching loss (ITM)."""
    itg_weight: Annotated[float, NOT_NEGATIVE] = 1.0
    """Weight of the captioning loss (ITG) of the Q-Former's own text head."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.itc_weight or self.itm_weight or self.itg_weight):
            raise ConfigError("[stage1] itc_weight, itm_weight and itg_weight must not all be 0")


@dataclass(frozen=True)
class Stage2Phase(OptimizerConfig):
    """Generative learning: trains the bridge through the frozen language model."""

    max_tokens: Annotated[int, POSITIVE] = 64
    """Longest target text in tokens, the end token included; longer texts are cut."""
    itg_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the captioning loss (ITG) of the Q-Former's own text head, which can then serve as draft model; 0: the
    text head is not trained."""
    elastic: bool = False
    """Train with the first m of the M queries, with m drawn anew for each step, small ones more often. One checkpoint
    then works with any such number of visual tokens: `--queries m`."""
    elastic_min: Annotated[int, POSITIVE] = 1
    """Smallest m that is drawn; the largest is M, the number of all queries."""
    unfreeze_language: bool = False
    """Train the language model too, as a baseline."""
    lora_rank: Annotated[int, NOT_NEGATIVE] = 0
    """Rank of the low-rank matrices (LoRA) that are trained in the frozen language model and then added to its weights;
    0: none. Needs the package peft."""
    lora_alpha: Annotated[float, POSITIVE] = 16.0
    """Scale of LoRA's product, divided by the rank."""
    lora_targets: Annotated[str, one_of("attention", "all")] = "attention"
    """Linear layers that get LoRA: those of the attentions, or "all", those of the feed-forward layers too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_rank and self.unfreeze_language:
            raise ConfigError(
                f"[{self.section}] lora_rank is above 0 and unfreeze_language is true",
                "set one of them: LoRA trains a frozen language model",
            )


@dataclass(frozen=True)
class InstructPhase(Stage2Phase):
    """Stage 2 in which the Q-Former reads the prompt too (InstructBLIP)."""


@dataclass(frozen=True)
class LoopConfig(RecipeSection):
    """Settings of the training loop, shared by all phases."""

    autocast: Annotated[str, one_of("float32", "bfloat16", "float16")] = "float32"
    """Arithmetic of the forward pass: "float32", "bfloat16" or "float16" (with loss scaling)."""
    frozen_dtype: Annotated[str, one_of("float32", "bfloat16", "float16")] = "float32"
    """Type in which the frozen picture encoder and the frozen language model are held and computed. The checkpoint
    holds their rounded weights, because the bridge was trained with them."""
    recompute_activations: bool = False
    """Save memory (activation checkpointing): the backward pass runs each layer of the language model again, instead of
    keeping what the forward pass computed. Losses and gradients stay the same."""
    snapshot_every: Annotated[int, POSITIVE] = 500
    """Steps between two snapshots. An interrupted run resumes from the newest."""
    log_every: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between two lines of the log; 0: about 200 lines for each phase."""
    cache_features: bool = False
    """Cache the frozen picture encoder's output on disk. Each picture is then encoded once, for all runs."""
    features_dtype: Annotated[str, one_of("float32", "float16")] = "float32"
    """Type of the cached output: "float32" or "float16"."""
    workers: Annotated[int, NOT_NEGATIVE] = 0
    """Threads that open the pictures of the next batch during the current step; 0: none."""
    data_streams: Annotated[int, POSITIVE] = 1
    """Parts that the data is split into, each for an equal share of a batch's rows. A process reads only the parts of
    its own rows: set it to the number of processes, or a multiple of it. 1: every process reads all texts."""
    tensorboard: bool = False
    """Also write event files of TensorBoard; needs the package tensorboard."""


@dataclass(frozen=True)
class ValidationConfig(DataConfig):
    """Validation while `stage2` or `instruct` trains: captions of held-out pictures are scored.

    The keys of `[data]` name the pictures. With `kind = "scenes"` they are scenes with pairs of objects that training
    never shows.
    """

    every: Annotated[int, NOT_NEGATIVE] = 0
    """Steps between two validations; the last step is validated too. 0: no validation."""
    pictures: Annotated[int, at_least(2)] = 200
    """Largest number of pictures, taken from the beginning of the data."""
    metric: Annotated[str, one_of("", *VALIDATION_METRICS)] = ""
    """The score that decides which weights are best: "exact_match" (scenes), "cider_d", "bleu_4", "rouge_l" (captions)
    or "vqa_accuracy" (questions). Empty: exact_match, cider_d or vqa_accuracy, by the data."""
    keep_best: bool = True
    """Whether the phase ends with the weights of its best validation, instead of those of its last step."""
    patience: Annotated[int, NOT_NEGATIVE] = 0
    """Stop the phase after this many validations in a row without a better score; 0: never."""
    batch_size: Annotated[int, POSITIVE] = 16
    """Pictures that are captioned together."""
    max_new_tokens: Annotated[int, POSITIVE] = 30
    """Longest generated text in tokens."""


@dataclass(frozen=True)
class BlockSizes(RecipeSection):
    """Sizes of one transformer of the model: widths, layers and heads."""

    hidden_size: Annotated[int, POSITIVE] = 128
    """Width of the hidden states."""
    intermediate_size: Annotated[int, POSITIVE] = 512
    """Width inside the feed-forward layers."""
    num_layers: Annotated[int, POSITIVE] = 3
    """Number of layers."""
    num_heads: Annotated[int, POSITIVE] = 4
    """Attention heads; must divide hidden_size."""

    section = "model"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ConfigError(f"[model] num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}")


@dataclass(frozen=True)
class ModelConfig(RecipeSection):
    """The trained parts of the model, by name. If none is named, the run trains the "miniature" from scratch.

    The miniature is a small BLIP-2 with an OPT language model, for pictures of 64 × 64 pixels. Its sizes are the
    defaults.
    """

    checkpoint: str = ""
    """A captioner (directory or hub name) to start from; its bridge is used if it is of the kind `bridge`."""
    vision_from: str = ""
    """A checkpoint (directory or hub name) whose picture encoder and preprocessing are used."""
    language_from: str = ""
    """A language model or a captioner (directory or hub name) whose language model and tokenizer are used."""
    bridge_from: str = ""
    """The output of stage 1: its Q-Former is used, and its text head if this run has one."""
    bert: str = ""
    """A BERT (directory or hub name) that initializes a new Q-Former, with its tokenizer."""
    patch_size: int = 8
    """Side of a patch in pixels; must divide 64."""
    num_query_tokens: Annotated[int, POSITIVE] = 8
    """Visual tokens of a picture; at least seven in the miniature, whose captions have seven keywords."""
    max_positions: Annotated[int, at_least(40)] = 128
    """Context length of the miniature's language model: visual tokens, prompt and caption."""
    dropout: Annotated[float, SHARE] = 0.1
    """Dropout of a new Q-Former. The miniature has no dropout, because its data never repeats."""
    vision: BlockSizes = field(default_factory=BlockSizes)
    """Sizes of the miniature's picture encoder."""
    qformer: BlockSizes = field(default_factory=lambda: BlockSizes(num_layers=4))
    """Sizes of a new bridge: of the Q-Former, or the layers and heads of a perceiver or attention pool."""
    language: BlockSizes = field(default_factory=lambda: BlockSizes(num_layers=4))
    """Sizes of the miniature's language model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size < 1 or 64 % self.patch_size:
            raise ConfigError(f"[model] patch_size must divide the picture's 64 pixels, not {self.patch_size}")
        if self.is_miniature and self.num_query_tokens < 7:
            raise ConfigError(f"[model] num_query_tokens must be at least 7, not {self.num_query_tokens}")
        if not self.checkpoint and bool(self.vision_from) != bool(self.language_from):
            raise ConfigError(
                "[model] expected both vision_from and language_from, got only one",
                "set the other one too, or set checkpoint to a captioner with the missing part",
            )

    @property
    def is_miniature(self) -> bool:
        """Whether the run trains the miniature: picture encoder and language model are initialized and pretrained."""
        return not (self.checkpoint or self.vision_from or self.language_from)


_BRIDGES = ("qformer", "projection", "mlp", "perceiver", "pool", "flamingo")


@dataclass(frozen=True)
class TrainingConfig(RecipeSection):
    """The whole recipe: the contents of a training configuration file."""

    seed: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of the initial weights, the order of the data and all random draws."""
    threads: Annotated[int, POSITIVE] = 1
    """CPU threads of a process; only the same number reproduces the same weights."""
    weights_dtype: Annotated[str, one_of("float16", "bfloat16", "float32")] = "float16"
    """Type of the tensors in the checkpoint: "float16", "bfloat16" or "float32"."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bridge == "flamingo" and self.loop.frozen_dtype != "float32":
            raise ConfigError(
                f"[loop] frozen_dtype = {self.loop.frozen_dtype!r} does not work with bridge = 'flamingo', which trains"
                " layers inside the language model",
                "leave frozen_dtype out; autocast = 'bfloat16' saves time, and recompute_activations saves memory",
            )
        if self.loop.cache_features and self.data.augments:
            raise ConfigError(
                "[loop] cache_features does not work with crop or flip in [data], which change each picture every time",
                "set cache_features to false, or leave crop and flip out",
            )
        if self.model.is_miniature and not self.data.only_scenes:
            raise ConfigError(
                "[model] names no trained parts, so the recipe trains the miniature model, which supports the data kind"
                f" 'scenes' only, not {self.data.kind!r}",
                "set checkpoint, or vision_from and language_from, in [model]",
            )


def parse_config(text: str, *, is_json: bool = False) -> TrainingConfig:
    """Reads a recipe.

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
    try:
        return parse_config(text, is_json=Path(path).suffix == ".json")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.problem}", error.fix) from error


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

    A key that a later version adds does not change the hash of a recipe that does not use it.

    Args:
        config: The recipe.

    Returns:
        64 hexadecimal digits: SHA-256 of the values as JSON with sorted keys.
    """
    return hashlib.sha256(json.dumps(given_values(config), sort_keys=True).encode()).hexdigest()
