"""A source of samples from a list of entries: endless, shuffled and resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blip2edge.errors import DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.entries import BrokenSamples, Entry, FeatureFile, RejectingSource
from blip2edge.training.data.sources import PassOrder, Sample, draw_prompt
from blip2edge.training.data.streams.augmentation import changed, draw_change

_TEXT = 2  # random stream of prompts and answers
_SHOTS = 5  # random stream of examples


def sample_of(entry: Entry, config: DataConfig, rng: np.random.Generator) -> Sample:
    """Makes the training sample of an entry.

    Args:
        entry: A caption or a question.
        config: Section [data] of the recipe, with prompts for captions and templates for questions.
        rng: Random generator. For a caption it draws the prompt; for a question it draws the template and one of the
            answers (an answer that more people gave is more likely). It also draws how the picture is changed.

    Returns:
        The sample.
    """
    if entry.question or entry.history:
        text = entry.answers[int(rng.integers(len(entry.answers)))].strip()
        prompt = _asked(entry, config, rng)
    else:
        text, prompt = entry.text, draw_prompt(config, rng)
    change = draw_change(config, (prompt, text), rng)
    features = entry.picture.features if isinstance(entry.picture, FeatureFile) else None
    opened = changed(entry.picture.open, change)
    return Sample(entry.sample_id, entry.picture.identity, opened, text, prompt, features=features)


def _asked(entry: Entry, config: DataConfig, rng: np.random.Generator) -> str:
    """Returns the question of an entry, formatted with a drawn template.

    The earlier questions and answers of the dialogue come first, in the same template.
    """
    templates = config.questions
    template = templates[int(rng.integers(len(templates)))] if len(templates) > 1 else templates[0]
    earlier = [
        f"{template.replace('{}', question)} {answer}" if question else answer for question, answer in entry.history
    ]
    return " ".join([*earlier, template.replace("{}", entry.question)])


class ListSource(RejectingSource):
    """Yields the samples of a list of entries, pass after pass, without end. Each pass has its own order.

    Args:
        entries: All entries.
        broken: Samples that were skipped when the entries were read.
        name: The file or folder, for messages.
        config: Section [data] of the recipe, with prompts and question template.
        seed: Seed of the orders of the passes, and of the drawn prompts and answers.

    Raises:
        DataError: There is no entry, or there are too few pictures to draw the few-shot examples from.
    """

    def __init__(
        self, entries: Sequence[Entry], broken: BrokenSamples, name: str, config: DataConfig, seed: int
    ) -> None:
        if not entries:
            raise broken.none_usable("sample with its picture and text")
        self._entries = entries
        super().__init__(broken, len(entries))
        self._name = name
        self._config = config
        self._seed = seed
        self._position = 0
        self._order = PassOrder(len(entries), seed)
        ids = "\n".join(entry.sample_id for entry in entries)
        self._check_shots()
        self._check_features()
        self._digest = hashlib.sha256(ids.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """Returns the path of the file or folder, for messages."""
        return self._name

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples from the current position on, without end."""
        while True:
            position = self._position
            self._position += 1
            rng = np.random.default_rng([_TEXT, self._seed, position])
            entry = self._entries[self._order[position]]
            sample = sample_of(entry, self._config, rng)
            yield replace(sample, shots=self._shots(entry, sample.prompt, position)) if self._config.shots else sample

    def _check_shots(self) -> None:
        pictures = len({entry.picture.identity for entry in self._entries}) if self._config.shots else 1
        if pictures <= self._config.shots:
            raise DataError(
                f"{self._name}: expected more than {self._config.shots} pictures to draw {self._config.shots} few-shot"
                f" examples from, got {pictures}",
                "lower shots",
            )

    @property
    def stored_features(self) -> str | None:
        """Returns the id of the first sample that has features in place of a picture; None without such a sample."""
        return next((each.image_id for each in self._entries if isinstance(each.picture, FeatureFile)), None)

    def _check_features(self) -> None:
        if self._config.augments and self.stored_features is not None:
            raise DataError(
                f"{self._name}: crop and flip change pictures, and {self.stored_features} has features, not a picture",
                "set crop = 1 and flip = 0 for this data",
            )

    def _shots(self, entry: Entry, prompt: str, position: int) -> tuple[Sample, ...]:
        """Draws the few-shot examples before an entry. Each has a different picture, and none has the entry's picture.

        If the entry and the example are captions, the example gets the prompt of the entry.
        """
        rng = np.random.default_rng([_SHOTS, self._seed, position])
        shots: dict[str, Sample] = {}
        while len(shots) < self._config.shots:
            other = self._entries[int(rng.integers(len(self._entries)))]
            identity = other.picture.identity
            if identity != entry.picture.identity and identity not in shots:
                shot = sample_of(other, self._config, rng)
                shots[identity] = replace(shot, prompt=prompt) if entry.text and other.text else shot
        return tuple(shots.values())

    def state_dict(self) -> dict[str, Any]:
        """Returns the position in the stream, the rejected samples, and a fingerprint of the data."""
        return {
            "position": self._position,
            "samples": len(self._entries),
            "digest": self._digest,
            "broken": dict(self._broken.problems),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that :meth:`state_dict` returned.

        Raises:
            DataError: The position was saved with other data.
        """
        if (state["samples"], state["digest"]) != (len(self._entries), self._digest):
            raise DataError(
                f"{self._name}: the data has changed since the run was started: {state['samples']} samples then,"
                f" {len(self._entries)} now",
                "resume with the same data",
            )
        self._position = int(state["position"])
        self._broken.problems |= state["broken"]
