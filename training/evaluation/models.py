"""Models as they are scored and used on data: something that answers, or something that compares.

A bundle runs in the runtime, where torch is not needed; a checkpoint runs in torch. Both look the same from here, so
that the loss of an export or of a precision is known in the figures of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Vectors = NDArray[np.float32]
Prompts = Sequence[str | None]


class CaptionModel(Protocol):
    """A model that writes texts about pictures."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Prompts | None = None) -> list[str]:
        """A text a picture, in order.

        Args:
            pictures: RGB.
            prompts: One a picture; None for none at all.
        """

    def question(self, text: str) -> str:
        """The prompt that asks a question.

        Raises:
            UsageError: The model answers none.
        """


class MatchModel(Protocol):
    """A model that tells how well pictures and texts go together."""

    @property
    def has_head(self) -> bool:
        """Whether it has a matching head (ITM) beside its vectors (ITC)."""

    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """float32 [N, F], or [N, K, F] where a picture has K of them; of length 1."""

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """float32 [M, F], of length 1."""

    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """What the matching head says of each picture with each of its own texts."""


@dataclass(frozen=True)
class ModelOptions:
    """How a model is run.

    Attributes:
        backend: Of a bundle: "auto", or one by name.
        threads: CPU threads; None for all cores.
        batch_size: Pictures, or pairs of a picture and a text, at once.
        generation: Fields of `GenerationOptions`; of a checkpoint only `max_new_tokens`.
    """

    backend: str = "auto"
    threads: int | None = None
    batch_size: int = 16
    generation: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluatedModel:
    """A loaded model: the one or the other."""

    captioner: CaptionModel | None = None
    matcher: MatchModel | None = None
