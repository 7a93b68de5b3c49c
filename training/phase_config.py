"""Settings of each phase in a recipe: optimizer, losses, and what is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blip2edge.errors import ConfigError
from blip2edge.training.fields import (
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SIZES,
    RecipeSection,
    ValidValues,
    at_least,
    one_of,
)

_TARGET = ValidValues(lambda value: bool(value >= 2), "be at least 2, for one token of the text and the end token")
LAYER_DECAY = ValidValues(lambda value: bool(0 < value <= 1), "be greater than 0 and at most 1")


@dataclass(frozen=True)
class OptimizerConfig(RecipeSection):
    """Optimizer settings of one phase (AdamW, linear warm-up, then half a cosine)."""

    steps: Annotated[int, at_least(1)] = 1000
    """Optimizer steps."""
    batch_size: Annotated[int, POSITIVE, SIZES] = 32
    """Samples of one forward pass on one process; a step uses batch_size × accumulate × processes samples."""
    accumulate: Annotated[int, POSITIVE, SIZES] = 1
    """Forward passes whose gradients are accumulated for one step. In stage 1, negatives are drawn within one pass."""
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
    """Weight of the loss for the shape of the object that covers a patch. A single patch does not show the whole
    object, so the shape is learned last."""


@dataclass(frozen=True)
class LanguagePhase(OptimizerConfig):
    """Pretraining of the miniature's language model on captions that follow embeddings of their keywords, or noise.

    Keywords are the caption's sizes, colours, shapes and relation. Their embeddings replace the visual tokens, so that
    the language model learns to use visual tokens later.
    """

    prefix_share: Annotated[float, SHARE] = 0.75
    """Share of captions that follow embeddings of their keywords; the others follow noise."""
    prefix_noise: Annotated[float, NOT_NEGATIVE] = 0.3
    """Standard deviation of the noise that is added to the embeddings of the keywords, relative to the root mean square
    of the embeddings. Visual tokens are not exactly equal to embeddings of words, so the language model must work
    without exact embeddings."""


@dataclass(frozen=True)
class BridgePhase(OptimizerConfig):
    """A phase that trains the bridge. The picture encoder is frozen, unless `unfreeze_vision` is true."""

    unfreeze_vision: bool = False
    """Train the picture encoder too, in float32. Its output is then not cached: a picture is encoded in every step that
    uses it."""
    layer_decay: Annotated[float, LAYER_DECAY] = 1.0
    """Layer-wise decay of the learning rate in a trained picture encoder, for example 0.9: the rate of a layer is that
    of the next higher layer times this factor. 1: all layers have the same rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer_decay != 1.0 and not self.unfreeze_vision:
            raise ConfigError(
                f"[{self.section}] layer_decay is {self.layer_decay}, but the picture encoder is frozen",
                "set unfreeze_vision to true, or leave layer_decay out",
            )


@dataclass(frozen=True)
class Stage1Phase(BridgePhase):
    """Representation learning: trains the Q-Former and its text side."""

    steps: Annotated[int, NOT_NEGATIVE] = 0
    """Optimizer steps; with 0, `train stage2` starts with a new bridge."""
    embed_dim: Annotated[int, POSITIVE, SIZES] = 256
    """Dimension of the vectors in which pictures and texts are compared."""
    max_tokens: Annotated[int, at_least(3), SIZES] = 32
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
class Stage2Phase(BridgePhase):
    """Generative learning: trains the bridge through the frozen language model."""

    max_tokens: Annotated[int, _TARGET, SIZES] = 64
    """Longest target text in tokens, the end token included; longer texts are cut."""
    itg_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    """Weight of the captioning loss (ITG) of the Q-Former's own text head, which can then serve as draft model; 0: the
    text head is not trained."""
    elastic: bool = False
    """Train each step with only the first m of the M queries; m is drawn for each step, small numbers more often. The
    checkpoint then works with any number of visual tokens from elastic_min to M: `--queries m`."""
    elastic_min: Annotated[int, POSITIVE] = 1
    """Smallest m that is drawn; the largest is M, the number of all queries."""
    unfreeze_language: bool = False
    """Train the language model too, to compare with a run in which it is frozen."""
    lora_rank: Annotated[int, NOT_NEGATIVE, SIZES] = 0
    """Rank of the low-rank matrices (LoRA) that are trained in the frozen language model and then added to its weights;
    0: none. Needs the package peft."""
    lora_alpha: Annotated[float, POSITIVE] = 16.0
    """Factor on the product of LoRA's two matrices, before the division by the rank."""
    lora_targets: Annotated[str, one_of("attention", "all")] = "attention"
    """Linear layers that get LoRA: "attention" (in attention layers), or "all" (also in feed-forward layers)."""

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
