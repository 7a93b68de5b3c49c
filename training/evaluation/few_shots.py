"""Adds examples before each question or caption of an evaluation (few-shot), for models with several input pictures."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from blip2edge.errors import DataError, ImageError, UsageError, option
from blip2edge.runtime.text.prompt import PromptBuilder
from blip2edge.training.data.entries import Entry
from blip2edge.training.evaluation.models import CaptionModel, Prompts
from blip2edge.training.loading.few_shot import Shot, few_shot_prompt, is_interleaved

_SHOTS = 6  # random stream of examples


@runtime_checkable
class Prompted(Protocol):
    """Interface of a captioner that has a prompt builder."""

    @property
    def prompts(self) -> PromptBuilder:
        """Returns the prompt builder of the captioner's family."""


@dataclass(frozen=True)
class Examples:
    """The data from which few-shot examples are drawn.

    Attributes:
        entries: Captions, or questions with answers.
        count: Number of examples that the captioner gets before each entry.
    """

    entries: Sequence[Entry]
    count: int

    def check(self, captioner: CaptionModel, *, questions: bool) -> None:
        """Checks that a captioner can use the few-shot examples.

        Args:
            captioner: The captioner.
            questions: True if the captioner answers questions, False if it writes captions.

        Raises:
            UsageError: The model takes only one picture per text; or the captioner answers questions but the examples
                are captions, or the reverse.
            DataError: There are too few pictures.
        """
        _builder(captioner)
        if any(bool(entry.question) != questions for entry in self.entries):
            kinds = ("questions", "captions") if questions else ("captions", "questions")
            raise UsageError(f"expected few-shot examples with {kinds[0]}, got {kinds[1]}", f"give {kinds[0]}")
        pictures = len({entry.picture.identity for entry in self.entries})
        if pictures <= self.count:
            raise DataError(
                f"expected more than {self.count} pictures to draw {self.count} few-shot examples from, got {pictures}",
                f"lower {option('shots')}",
            )

    def ask(
        self, captioner: CaptionModel, asked: Sequence[Entry], images: Sequence[Image.Image], prompts: Prompts
    ) -> list[str]:
        """Generates a text for each entry with a captioner; the entry's examples come first in the prompt.

        Args:
            captioner: The captioner.
            asked: The entries. An entry's own picture is never one of its examples.
            images: The picture of each entry.
            prompts: The prompt of each entry; None for the default prompt.
        """
        items: list[Any] = []
        texts: list[str | None] = []
        for entry, image, prompt in zip(asked, images, prompts, strict=True):
            shots, shown = self._drawn(captioner, entry, prompt)
            items.append([*shown, image])
            texts.append(few_shot_prompt(_builder(captioner), shots, prompt))
        return captioner(items, texts)

    def _drawn(self, captioner: CaptionModel, entry: Entry, prompt: str | None) -> tuple[list[Shot], list[Image.Image]]:
        """Draws the few-shot examples of an entry, and their pictures; the draw depends on the entry's id.

        Pictures that cannot be opened are left out.
        """
        rng = np.random.default_rng([_SHOTS, zlib.crc32(entry.sample_id.encode())])
        shots: list[Shot] = []
        images: list[Image.Image] = []
        used = {entry.picture.identity}
        for number in rng.permutation(len(self.entries)):
            other = self.entries[int(number)]
            if other.picture.identity in used:
                continue
            used.add(other.picture.identity)
            try:
                image = other.picture.open()
            except ImageError:
                continue  # it is counted as broken where it is asked
            images.append(image)
            asks = captioner.question(other.question) if other.question else prompt or ""
            shots.append(Shot(asks, _answer(other)))
            if len(shots) == self.count:
                return shots, images
        raise DataError(
            f"expected {self.count} readable pictures for the examples of sample {entry.sample_id}, got {len(shots)}",
            f"repair the pictures, or lower {option('shots')}",
        )


def generate_texts(
    captioner: CaptionModel,
    asked: Sequence[Entry],
    images: Sequence[Image.Image],
    prompts: Prompts,
    examples: Examples | None,
) -> list[str]:
    """Generates a text for each entry with a captioner, after few-shot examples if `examples` is not None.

    `asked` are the entries, `images` their pictures, and `prompts` their prompts (None for the default prompt).
    """
    return captioner(images, prompts) if examples is None else examples.ask(captioner, asked, images, prompts)


def no_examples(what: str) -> UsageError:
    """Returns the error for an evaluation that does not support few-shot examples."""
    return UsageError(f"{option('shots')} does not work with {what}", f"leave {option('shots')} out")


def _builder(captioner: CaptionModel) -> PromptBuilder:
    """Returns the prompt builder of a captioner that takes several pictures per text.

    Raises:
        UsageError: The captioner takes only one picture per text.
    """
    if not isinstance(captioner, Prompted) or not is_interleaved(captioner.prompts):
        raise UsageError(
            f"{option('shots')}: this model reads one picture in a text, and cannot use few-shot examples",
            f"leave {option('shots')} out, or give a model that reads several pictures (Flamingo, Idefics)",
        )
    return captioner.prompts


def _answer(entry: Entry) -> str:
    """Returns the text of a few-shot example: its caption, or the answer that most people gave."""
    return entry.text or Counter(entry.answers).most_common(1)[0][0]
