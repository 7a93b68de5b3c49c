"""Models as they are scored and used on data: something that answers, or something that compares.

A bundle runs in the runtime, where torch is not needed; a checkpoint runs in torch. Both look the same from here, so
that the loss of an export or of a precision is known in the figures of a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2edge.bundle.manifest import MANIFEST, Bundle
from blip2edge.bundle.schema import BackendName
from blip2edge.errors import BundleError, UsageError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher

Vectors = NDArray[np.float32]
Texts = Sequence[str | None]


class Answerer(Protocol):
    """A model that writes texts about pictures."""

    def __call__(self, pictures: Sequence[Image.Image], prompts: Texts | None = None) -> list[str]:
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


class Comparer(Protocol):
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
class JudgeOptions:
    """How a model is run.

    Attributes:
        backend: Of a bundle: "auto", or one by name.
        threads: CPU threads; None for all cores.
        batch_size: Pictures, or pairs of a picture and a text, at once.
        generation: Fields of `GenerationOptions`; of a checkpoint only `max_new_tokens`.
    """

    backend: BackendName = "auto"
    threads: int | None = None
    batch_size: int = 16
    generation: dict[str, Any] = field(default_factory=dict)


class BundleAnswerer:
    """A bundle that captions."""

    def __init__(self, captioner: Captioner, options: JudgeOptions) -> None:
        captioner.options(**options.generation)  # refuses what is wrong before any picture is read
        self._captioner = captioner
        self._options = options

    def __call__(self, pictures: Sequence[Image.Image], prompts: Texts | None = None) -> list[str]:
        """A text a picture."""
        results = self._captioner.caption_many(
            list(pictures), prompts=prompts, batch_size=self._options.batch_size, **self._options.generation
        )
        return [result.text for result in results]

    def question(self, text: str) -> str:
        """The prompt that asks a question."""
        return self._captioner.prompter.question(text)


class BundleComparer:
    """A bundle that compares."""

    def __init__(self, matcher: Matcher, options: JudgeOptions) -> None:
        self._matcher = matcher
        self._batch_size = options.batch_size

    @property
    def has_head(self) -> bool:
        """Whether it has a matching head."""
        return self._matcher.head is not None

    def image_vectors(self, pictures: Sequence[Image.Image]) -> Vectors:
        """Vectors of pictures."""
        return self._matcher.embed_images(list(pictures), batch_size=self._batch_size)

    def text_vectors(self, texts: Sequence[str]) -> Vectors:
        """Vectors of texts."""
        return self._matcher.embed_texts(texts, batch_size=self._batch_size)

    def probabilities(
        self, pictures: Sequence[Image.Image], texts: Sequence[Sequence[str]]
    ) -> list[list[float]]:
        """What the matching head says."""
        return self._matcher.probabilities(list(pictures), texts, batch_size=self._batch_size)


@dataclass(frozen=True)
class Judge:
    """A loaded model: the one or the other."""

    answerer: Answerer | None = None
    comparer: Comparer | None = None


def open_judge(model: Path, options: JudgeOptions) -> Judge:
    """Loads a model for what it does.

    Args:
        model: A bundle, or a checkpoint directory.
        options: How it is run.

    Raises:
        BundleError: The directory is neither.
        BackendError: The backend is not there.
        CheckpointError: The checkpoint cannot be read.
        UsageError: An option that the model does not take.
    """
    if (model / MANIFEST).is_file():
        if Bundle.open(model).manifest.prompt is None:
            matcher = Matcher.load(model, backend=options.backend, threads=options.threads)
            return Judge(comparer=BundleComparer(matcher, options))
        captioner = Captioner.load(model, backend=options.backend, threads=options.threads)
        return Judge(answerer=BundleAnswerer(captioner, options))
    if (model / "config.json").is_file():
        # A checkpoint needs torch, which a machine that only runs bundles does not have.
        from blip2edge.training.evaluation.checkpoint_judges import open_checkpoint

        return open_checkpoint(model, options)
    raise BundleError(
        f"{model} is neither a bundle (no {MANIFEST}) nor a checkpoint (no config.json)",
        "make a bundle with: blip2edge export CHECKPOINT -o BUNDLE",
    )


def open_answerer(model: Path, options: JudgeOptions) -> Answerer:
    """The same of a model that has to caption.

    Raises:
        UsageError: It compares.
    """
    answerer = open_judge(model, options).answerer
    if answerer is None:
        raise UsageError(f"{model} compares pictures with texts and captions none", "give a captioner")
    return answerer


def open_comparer(model: Path, options: JudgeOptions) -> Comparer:
    """The same of a model that has to match: with a matching head.

    Raises:
        UsageError: It captions, or has vectors alone.
    """
    comparer = open_judge(model, options).comparer
    if comparer is None or not comparer.has_head:
        raise UsageError(
            f"{model} has no matching head",
            "give what train stage1 wrote, or a checkpoint of BLIP or BLIP-2 for ITM",
        )
    return comparer
