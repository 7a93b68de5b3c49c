"""Data that fits in a list: an endless, shuffled, resumable stream of its entries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from blip2edge.errors import DataError
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.entries import BrokenSamples, Entry, RejectingSource
from blip2edge.training.data.sources import Sample

_ORDER, _TEXT = 1, 2  # streams of chance


def sample_of(entry: Entry, config: DataConfig, rng: np.random.Generator) -> Sample:
    """What is learned of an entry.

    Args:
        entry: A caption or a question.
        config: Prompts for captions, the template for questions.
        rng: Chooses the prompt, or one of the answers: each as often as people gave it.

    Returns:
        The sample.
    """
    picture, identity = entry.picture, entry.picture.identity
    if entry.question:
        text = entry.answers[int(rng.integers(len(entry.answers)))].strip()
        return Sample(
            entry.sample_id, identity, picture.open, text, config.question.replace("{}", entry.question)
        )
    prompt = ""
    if rng.random() < config.prompt_share:
        prompt = config.prompts[int(rng.integers(len(config.prompts)))]
    return Sample(entry.sample_id, identity, picture.open, entry.text, prompt)


class ListSource(RejectingSource):
    """Entries pass after pass, each pass in an order of its own.

    Args:
        entries: All of them.
        broken: What was left out when they were read.
        name: The file or folder.
        config: Prompts and template.
        seed: Of the orders, prompts and answers.
    """

    def __init__(
        self, entries: Sequence[Entry], broken: BrokenSamples, name: str, config: DataConfig, seed: int
    ) -> None:
        self._entries = entries
        super().__init__(broken)
        self._name = name
        self._config = config
        self._seed = seed
        self._position = 0
        self._order: tuple[int, list[int]] = (-1, [])  # of the pass that was asked for last
        ids = "\n".join(entry.sample_id for entry in entries)
        self._digest = hashlib.sha256(ids.encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        """The file or folder."""
        return self._name

    def __iter__(self) -> Iterator[Sample]:
        """Samples from where the source stands, without end."""
        while True:
            position = self._position
            self._position += 1
            rng = np.random.default_rng([_TEXT, self._seed, position])
            yield sample_of(self._entry(position), self._config, rng)

    def _entry(self, position: int) -> Entry:
        number, rest = divmod(position, len(self._entries))
        if self._order[0] != number:
            rng = np.random.default_rng([_ORDER, self._seed, number])
            self._order = (number, rng.permutation(len(self._entries)).tolist())
        return self._entries[self._order[1][rest]]

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, what was rejected, and which data it is."""
        return {
            "position": self._position,
            "samples": len(self._entries),
            "digest": self._digest,
            "broken": dict(self._broken.problems),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position.

        Raises:
            DataError: It is a position in other data.
        """
        if (state["samples"], state["digest"]) != (len(self._entries), self._digest):
            raise DataError(
                f"{self._name}: the run was started on {state['samples']} samples and there are"
                f" {len(self._entries)} now, or others",
                "resume with the data that it was started with",
            )
        self._position = int(state["position"])
        self._broken.problems |= state["broken"]
