"""The interface of sources of training samples: endless, shuffled streams of captioned pictures that can be resumed.

Every process reads the texts of all samples. It opens only the pictures of its own rows, and of these only the pictures
whose features are not cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2edge.errors import Blip2EdgeError, DataError, ImageError, PromptError
from blip2edge.training.data.config import DataConfig

UNUSABLE = (ImageError, DataError, PromptError)
"""Errors of a single sample, which is then replaced by the next one."""

_ORDER = 1  # random stream of orders; sources draw prompts and answers from others


@dataclass(frozen=True)
class Sample:
    """One training sample: a picture with a target text and a prompt.

    Attributes:
        sample_id: Name of the sample in messages and logs; unique within its source, and equal in every run.
        image_id: Name of the picture. Samples of the same picture have the same name (COCO has five captions for each
            picture); different pictures have different names. Also the key of the picture's cached features.
        open_picture: Decodes the picture to RGB. Raises ImageError (or DataError) if the picture is broken; the loader
            then calls `SampleSource.reject` and uses the next sample.
        text: The target text: a caption or an answer, without surrounding space.
        prompt: The text before the target, without loss: a prompt, a question in its template, or an instruction.
        shots: Few-shot examples before the sample, each with picture, prompt and text; no loss is computed on them.
        features: Reads the picture encoder's output [P, D], if the data has it instead of a picture; else None. Raises
            DataError if the file is broken.
    """

    sample_id: str
    image_id: str
    open_picture: Callable[[], Image.Image]
    text: str
    prompt: str = ""
    shots: tuple[Sample, ...] = ()
    features: Callable[[], NDArray[np.float32]] | None = None

    @property
    def pictures(self) -> tuple[Sample, ...]:
        """Returns the samples whose pictures the model gets: first the few-shot examples, then the sample itself."""
        return (*self.shots, self)


def draw_prompt(config: DataConfig, rng: np.random.Generator) -> str:
    """Draws one of the recipe's prompts with probability `prompt_share`, else the empty prompt."""
    if rng.random() >= config.prompt_share:
        return ""
    return config.prompts[int(rng.integers(len(config.prompts)))]


class PassOrder:
    """Maps positions of an endless stream to indices of a list; each pass over the list has its own permutation.

    Args:
        count: Length of the list.
        seed: Seed of all permutations.
    """

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._pass, self._permutation = -1, list[int]()

    def __getitem__(self, position: int) -> int:
        """Returns the index, in the list, of the element at a position of the stream."""
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
        """Returns the name of the source's file, directory or shards, for messages."""

    def __iter__(self) -> Iterator[Sample]:
        """Yields the samples from the current position on, pass after pass, without end."""

    @property
    def broken(self) -> Mapping[str, str]:
        """Returns, by sample id, why a sample was skipped or rejected."""

    def accept(self, sample: Sample) -> None:
        """Notes that a sample was used. `accept` and `reject` are called in the order of the samples."""

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Adds a sample that could not be used to the broken samples.

        Raises:
            DataError: More samples are broken than allowed, or a whole pass over the data had no usable sample. The
                error names their number and the first three.
        """

    def check_usable(self, use: Callable[[Sample], object]) -> None:
        """Checks that at least one sample can be used; in a mixture, one sample of each set. The position stays.

        A short run draws few samples, so the rule of :meth:`reject` would not find a set without a usable sample.

        Args:
            use: Raises one of :data:`UNUSABLE` if a sample cannot be used.

        Raises:
            DataError: More samples than allowed are broken before the first usable one, or there is none in a pass.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next sample and the rejected samples, as JSON values.

        If a new source with the same configuration loads this state, it continues with the same next sample.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues at the position that `state_dict` returned.

        Raises:
            DataError: The position was saved with other data (another number of samples, other shards).
        """
