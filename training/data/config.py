"""The section `[data]` of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from blip2edge.errors import ConfigError
from blip2edge.training.fields import NOT_NEGATIVE, POSITIVE, SHARE, RecipeSection, one_of

DATA_KINDS = ("scenes", "coco-captions", "coco-vqa", "folder", "shards")


@dataclass(frozen=True)
class DataConfig(RecipeSection):
    """The training data."""

    kind: Annotated[str, one_of(*DATA_KINDS)] = "scenes"
    """"scenes": generated scenes; "coco-captions" and "coco-vqa": COCO's JSON files; "folder": pictures, each with a
    text file of the same name; "shards": WebDataset's tar files."""
    path: str = ""
    """The JSON file (for VQA, of the questions), the folder, or the shards: `part-*.tar`, `part-{000..127}.tar` or a
    directory of them. Relative to the recipe."""
    images: str = ""
    """Directory of a JSON file's pictures; empty: the directory of the file, or COCO's layout next to it."""
    annotations: str = ""
    """File of the answers to VQA's questions; empty: the file in the directory of `path` with VQA's name."""
    question: str = "Question: {} Short answer:"
    """Template of a question; the braces are replaced by the question."""
    max_broken: Annotated[int, NOT_NEGATIVE] = 100
    """Largest number of samples with a missing or broken picture or text. They are skipped and reported; one more is
    an error."""
    shuffle_buffer: Annotated[int, POSITIVE] = 1000
    """Samples in a block of shards that are shuffled together."""
    count: Annotated[int, NOT_NEGATIVE] = 0
    """Number of generated scenes, shown pass after pass, so that features can be cached; 0: every scene is new."""
    series: Annotated[int, NOT_NEGATIVE] = 0
    """Seed of those `count` scenes. With `count = 0`, the recipe's seed and the phase decide instead."""
    prompts: tuple[str, ...] = ("a photo of", "a picture of")
    """Short prompts; some captions are trained as their continuation."""
    prompt_share: Annotated[float, SHARE] = 0.2
    """Share of captions that follow one of the prompts; the others follow the empty prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind != "scenes" and not self.path:
            raise ConfigError(
                f"[{self.section}] kind = {self.kind!r} expects a path, got none", f'add path = "…" to [{self.section}]'
            )
        if self.question.count("{}") != 1:
            raise ConfigError(
                f"[{self.section}] question must contain {{}} once, in the place of the question, not {self.question!r}"
            )
        if self.prompt_share > 0 and not self.prompts:
            raise ConfigError(
                f"[{self.section}] prompts is empty, but prompt_share is above 0",
                "set prompts, or set prompt_share to 0",
            )
