"""The interfaces of the models that are evaluated: captioners and matchers.

A bundle runs in the runtime, without torch; a checkpoint runs in torch. Both have the same interface, so the scores
before and after an export, or at another precision, can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2edge.bundle.schema import BackendName
from blip2edge.errors import Blip2EdgeError, UsageError, option

JUDGES = {
    "clip": f"{option('clip')} BUNDLE, a bundle or checkpoint that compares pictures with texts (CLIP)",
    "reader": f"{option('reader')} BUNDLE, a bundle or checkpoint with a language model, on data with questions",
}
"""For each metric that needs no captions in the data: the option that selects the metric, with the option's value."""

Vectors = NDArray[np.float32]
Prompts = Sequence[str | None]


class CaptionModel(Protocol):
    """A model that generates texts about pictures."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Prompts | None = None) -> list[str]:
        """Generates one text for each picture, in order.

        Args:
            pictures: RGB pictures.
            prompts: One prompt, or None, for each picture; None for no prompts.
        """

    def question(self, text: str) -> str:
        """Returns the prompt for a question.

        Raises:
            UsageError: The model does not answer questions.
        """


class MatchModel(Protocol):
    """A model that scores how well pictures and texts match."""

    @property
    def has_head(self) -> bool:
        """Returns whether the model has a matching head (ITM) in addition to the vectors (ITC)."""

    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Computes unit vectors of pictures: float32 [N, F], or [N, K, F] if a picture has K vectors."""

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Computes unit vectors of texts: float32 [M, F]."""

    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]], *, logits: bool = False
    ) -> list[list[float]]:
        """Computes the match probability of each picture with each of its own texts, by the matching head.

        If `logits` is True, the head's logits of "match" are returned instead. A logit is the mean over the queries of
        the picture.
        """


@dataclass(frozen=True)
class ModelOptions:
    """The options with which a model is run.

    Attributes:
        backend: Name of a bundle's backend, or "auto"; for a checkpoint "auto", "cpu" or "cuda".
        threads: CPU threads; None for all cores.
        batch_size: Number of pictures, or of pairs of a picture and a text, in one batch.
        generation: Fields of `GenerationOptions`; `draft` and `abstain_below` need a bundle.
        require_signature: Public key; a bundle must have a signature that this key verifies. None: no signature is
            required.
    """

    backend: BackendName = "auto"
    threads: int | None = None
    batch_size: int = 16
    generation: dict[str, Any] = field(default_factory=dict)
    require_signature: str | Path | None = None


@dataclass(frozen=True)
class EvaluatedModel:
    """A loaded model: either a captioner or a matcher."""

    captioner: CaptionModel | None = None
    matcher: MatchModel | None = None


def without_captions(error: type[Blip2EdgeError], data: str, bare: int, total: int) -> Blip2EdgeError:
    """Returns the error for pictures without captions; its advice names the metrics that need no captions.

    Args:
        error: Class of the error.
        data: Name of the data.
        bare: Number of pictures without a caption.
        total: Number of all pictures.
    """
    return error(
        f"{data}: {bare} of the {total} pictures have no captions to compare with",
        "write the captions of dog.jpg to dog.txt, one a line; or score a captioner without them: "
        + ", or ".join(JUDGES.values()),
    )


def needs_picture(path: Path) -> UsageError:
    """Returns the error for the language model of ``path``, which cannot be run without a picture."""
    return UsageError(
        f"the language model of {path} attends to a picture in each layer, and cannot read a caption alone",
        f"give {option('reader')} a language model, or a captioner whose language model takes visual tokens (BLIP-2,"
        " InstructBLIP, LLaVA)",
    )


def compares_only(path: Path) -> UsageError:
    """Returns the error for a reader ``path`` that has no language model, because it compares pictures with texts."""
    return UsageError(
        f"expected {option('reader')} to have a language model, but {path} compares pictures with texts",
        f"give {option('reader')} a language model, or a captioner whose language model takes visual tokens (BLIP-2,"
        f" InstructBLIP, LLaVA); a model that compares is for {option('clip')}",
    )


def unsigned_checkpoint(path: Path) -> UsageError:
    """Returns the error for a checkpoint if a signature is required: only bundles can be signed."""
    return UsageError(
        f"{option('require_signature')} works with bundles only, but {path} is a checkpoint",
        "export the checkpoint, and sign the bundle",
    )
