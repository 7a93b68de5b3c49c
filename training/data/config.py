"""The section [data] of a recipe."""

from __future__ import annotations

from dataclasses import dataclass

from blip2edge.errors import ConfigError
from blip2edge.training.fields import at_least_zero, one_of, share

KINDS = ("scenes",)


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    kind: str = "scenes"
    """"scenes": generated as they are needed."""
    count: int = 0
    """Generated scenes that are shown again and again, so that their features can be cached; 0: each is shown once."""
    series: int = 0
    """Which scenes those `count` are. Where each is shown once, the recipe's seed and the phase decide."""
    prompts: tuple[str, ...] = ("a photo of", "a picture of")
    """Short prompts that some captions continue."""
    prompt_share: float = 0.2
    """Share of captions behind one of the prompts; the others follow the empty prompt."""

    def __post_init__(self) -> None:
        one_of("data", "kind", self.kind, KINDS)
        at_least_zero("data", {"count": self.count, "series": self.series})
        share("data", {"prompt_share": self.prompt_share})
        if self.prompt_share > 0 and not self.prompts:
            raise ConfigError("[data] prompts is empty and prompt_share is not 0")
