"""What every source of samples is: an endless, shuffled, resumable stream of captioned pictures.

The loop asks nothing else of a source. It reads every sample's texts on every process, and opens a picture only
on the process that computes with it, and not at all where the picture's features are cached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from blip2edge.errors import Blip2EdgeError


@dataclass(frozen=True)
class Sample:
    """One text about one picture.

    Attributes:
        sample_id: Names the sample in messages and logs: unique within its source, and the same in every run.
        image_id: Names the picture: equal for two samples that show the same one (COCO has five captions a
            picture), unique otherwise. Cached features are filed under it.
        open_picture: Decodes the picture to RGB. Raises ImageError (or DataError) where it is broken; the loop
            then calls `SampleSource.reject` and takes the next sample.
        text: What is learned: a caption or an answer, without surrounding space.
        prompt: What stands before it and is not learned: a prompt, a question in its template, an instruction.
    """

    sample_id: str
    image_id: str
    open_picture: Callable[[], Image.Image]
    text: str
    prompt: str = ""


class SampleSource(Protocol):
    """An endless stream of samples.

    Two sources made of the same configuration and seed give the same samples in the same order, whatever the
    machine. A pass over the data is shuffled by (seed, number of the pass).
    """

    @property
    def name(self) -> str:
        """For messages: the file, directory or shards that it reads."""

    def __iter__(self) -> Iterator[Sample]:
        """Samples from where the source stands, pass after pass, without end."""

    @property
    def broken(self) -> Mapping[str, str]:
        """Samples that were left out or rejected, and why."""

    def reject(self, sample: Sample, error: Blip2EdgeError) -> None:
        """Counts a sample that the loop could not use.

        Raises:
            DataError: More samples are broken than the configuration allows; how many, and the first three.
        """

    def state_dict(self) -> dict[str, Any]:
        """Where the next sample comes from, and what was rejected, in JSON's types.

        Taken between two samples: a fresh source of the same configuration that loads it goes on with the very
        sample that this one would have given next.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the place of `state_dict`.

        Raises:
            DataError: It belongs to other data (another number of samples, other shards).
        """
