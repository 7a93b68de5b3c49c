"""The section of a recipe that names the trained parts of the model, or the sizes of a miniature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from blip2edge.errors import ConfigError
from blip2edge.training.fields import OBJECTS, POSITIVE, SHARE, SIZES, RecipeSection, at_least


@dataclass(frozen=True)
class BlockSizes(RecipeSection):
    """Sizes of one transformer of the model: widths, layers and heads."""

    hidden_size: Annotated[int, POSITIVE, SIZES] = 128
    """Width of the hidden states."""
    intermediate_size: Annotated[int, POSITIVE, SIZES] = 512
    """Width inside the feed-forward layers."""
    num_layers: Annotated[int, POSITIVE, OBJECTS] = 3
    """Number of layers."""
    num_heads: Annotated[int, POSITIVE, OBJECTS] = 4
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
    """Checkpoint (directory or hub name) to start from: a captioner, or a BLIP-2 for image-text retrieval. The bridge
    of a captioner is used if its kind is that of the key `bridge`, and if `vision_from`, `language_from` and
    `bridge_from` are not set; otherwise the bridge is new or from `bridge_from`. Stage 1 also needs the captioner's
    text head (`draft.json`). With a BLIP-2 for retrieval, set `language_from` too."""
    vision_from: str = ""
    """A checkpoint (directory or hub name) whose picture encoder and preprocessing are used: a captioner, or an encoder
    alone, such as a SigLIP or a DINO (`models.md`)."""
    language_from: str = ""
    """A language model or a captioner (directory or hub name) whose language model and tokenizer are used."""
    bridge_from: str = ""
    """A directory that stage 1 wrote: its Q-Former is used, and its text head if this run has a text head."""
    bert: str = ""
    """A BERT (directory or hub name) that initializes a new Q-Former, with its tokenizer."""
    patch_size: int = 8
    """Side of a patch in pixels; must divide 64."""
    num_query_tokens: Annotated[int, POSITIVE, SIZES] = 8
    """Visual tokens of a picture; at least seven in the miniature, whose captions have seven keywords."""
    max_positions: Annotated[int, at_least(40), SIZES] = 128
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
        """Returns whether the run trains the miniature: the recipe names no checkpoint, vision or language model."""
        return not (self.checkpoint or self.vision_from or self.language_from)
