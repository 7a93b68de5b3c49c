"""The section [data] of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from blip2edge.errors import ConfigError
from blip2edge.training.fields import at_least_zero, one_of, positive, unit_interval

DATA_KINDS = ("scenes", "coco-captions", "coco-vqa", "folder", "shards")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    kind: str = "scenes"
    """"scenes": generated as they are needed; "coco-captions" and "coco-vqa": COCO's JSON files; "folder": pictures
    with a text beside each; "shards": WebDataset's tar files."""
    path: str = ""
    """The JSON file (of VQA the questions), the folder, or the shards: `part-*.tar`, `part-{000..127}.tar` or a
    directory of them. Relative to the recipe."""
    images: str = ""
    """Where the pictures of a JSON file are; empty: beside the file, as COCO is laid out."""
    annotations: str = ""
    """The answers to VQA's questions; empty: the file beside `path` that is named as VQA names it."""
    question: str = "Question: {} Short answer:"
    """How a question is put: it stands where the braces do."""
    max_broken: int = 100
    """Samples that are counted, named and skipped because a picture or a text is missing or broken; one more is an
    error."""
    shuffle_buffer: int = 1000
    """Samples of shards that are mixed with each other."""
    count: int = 0
    """Generated scenes that are shown again and again, so that their features can be cached; 0: each is shown once."""
    series: int = 0
    """Which scenes those `count` are. Where each is shown once, the recipe's seed and the phase decide."""
    prompts: tuple[str, ...] = ("a photo of", "a picture of")
    """Short prompts that some captions continue."""
    prompt_share: float = 0.2
    """Share of captions behind one of the prompts; the others follow the empty prompt."""

    def __post_init__(self) -> None:
        one_of("data", "kind", self.kind, DATA_KINDS)
        at_least_zero("data", {"count": self.count, "series": self.series, "max_broken": self.max_broken})
        positive("data", {"shuffle_buffer": self.shuffle_buffer})
        if self.kind != "scenes" and not self.path:
            raise ConfigError(
                f"[data] kind = {self.kind!r} expects a path, got none", 'add path = "…" to [data]'
            )
        if self.question.count("{}") != 1:
            raise ConfigError(
                f"[data] question must hold {{}} once, where the question goes: {self.question!r}"
            )
        unit_interval("data", {"prompt_share": self.prompt_share})
        if self.prompt_share > 0 and not self.prompts:
            raise ConfigError("[data] prompts is empty and prompt_share is not 0")
