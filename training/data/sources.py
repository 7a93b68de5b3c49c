"""The interface of sources: endless, shuffled, resumable streams of captioned pictures.

Every process reads the texts of all samples, and opens the pictures of its own rows only, unless their features are
cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from blip2edge.errors import Blip2EdgeError
from blip2edge.training.data.config import DataConfig

_ORDER = 1  # random stream of orders; sources draw prompts and answers from others


@dataclass(frozen=True)
class Sample:
    """One training sample: a picture with a target text and a prompt.

    Attributes:
        sample_id: Name of the sample in messages and logs: unique within its source, the same in every run.
        image_id: Name of the picture: equal for two samples of the same picture (COCO has five captions for each),
            unique otherwise. Key of cached features.
        open_picture: Decodes the picture to RGB. Raises ImageError (or DataError) if the picture is broken; the loader
            then calls `SampleSource.reject` and uses the next sample.
        text: The target text: a caption or an answer, without surrounding space.
        prompt: The text before the target, without loss: a prompt, a question in its template, or an instruction.
        shots: Examples that are shown before the sample, each with its picture, prompt and text; they give no loss.
    """

    sample_id: str
    image_id: str
    open_picture: Callable[[], Image.Image]
    text: str
    prompt: str = ""
    shots: tuple[Sample, ...] = ()

    @property
    def pictures(self) -> tuple[Sample, ...]:
        """The samples whose pictures are shown, in order: the examples, then the sample itself."""
        return (*self.shots, self)


def draw_prompt(config: DataConfig, rng: np.random.Generator) -> str:
    """Draws one of the recipe's prompts with probability `prompt_share`, else the empty prompt."""
    if rng.random() >= config.prompt_share:
        return ""
    return config.prompts[int(rng.integers(len(config.prompts)))]


class PassOrder:
    """The order of a list's elements in endless passes; each pass has its own permutation.

    Args:
        count: Length of the list.
        seed: Seed of all permutations.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._pass, self._permutation = -1, list[int]()

    def __getitem__(self, position: int) -> int:
        """Index in the list of the item at a position of the stream."""
        number, rest = divmod(position, self._count)
        if self._pass != number:
            rng = np.random.default_rng([_ORDER, self._seed, number])
            self._pass, self._permutation = number, rng.permutation(self._count).tolist()
        return self._permutation[rest]


class SampleSource(Protocol):
    """An endless stream of samples.

    Two sources with the same configuration and seed give the same samples in the same order on every machine. Each
    pass over the data is shuffled by (seed, number of the pass).
    """

    @property
    def name(self) -> str:
        """Name of the source's file, directory or shards, for messages."""

    def __iter__(self) -> Iterator[Sample]:
        """Samples from the current position, pass after pass, without end."""

    @property
    def broken(self) -> Mapping[str, str]:
        """Why samples were skipped or rejected, by sample id."""

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Adds a sample that could not be used to the broken samples.

        Raises:
            DataError: More samples are broken than allowed; the error names their number and the first three.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next sample and the rejected samples, as JSON values.

        A new source with the same configuration that loads this state continues with the same next sample.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that `state_dict` returned.

        Raises:
            DataError: The position was saved with other data (another number of samples, other shards).
        """
