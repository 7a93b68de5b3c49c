"""Loads batches of samples, replaces broken samples, and saves and restores the position in the data.

All processes read the same stream of samples and open only the pictures of their own rows. If a picture cannot be
opened, or a text does not fit the model, all processes reject the sample and take the next one of the stream instead.
So two processes with B rows each train on the same samples as one process with 2 B rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from numpy.typing import NDArray
from torch import Tensor

from blip2edge.errors import Blip2EdgeError, DataError, ImageError, PromptError
from blip2edge.training.data.sources import Sample, SampleSource
from blip2edge.training.loading.batches import CaptionBatch, TextBatch
from blip2edge.training.loading.features import FrozenEncoder

Pixels = NDArray[np.float32] | None
BROKEN = (ImageError, DataError, PromptError)
"""Errors of a single sample, which is then replaced."""


class PictureBatch(NamedTuple):
    """Encoded pictures with the texts that a phase needs.

    Attributes:
        sample_ids: Names of the B samples.
        image_embeds: float32 [B, P, Dv], output of the frozen picture encoder.
        weight: Number of tokens that give loss; number of rows if there are no captions.
        captions: Texts for the language model.
        texts: Texts for the Q-Former's own text side.
        instruction: Ids and mask, int64 [B, T] each, for a Q-Former that reads the prompt.
    """

    sample_ids: tuple[str, ...]
    image_embeds: Tensor
    weight: int
    captions: CaptionBatch | None = None
    texts: TextBatch | None = None
    instruction: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class TextMakers:
    """Functions that make the texts of a batch; None for texts that a phase does not need.

    Attributes:
        captions: Makes texts for the language model.
        own: Makes texts for the Q-Former's own text side, from texts and picture numbers.
        instruction: Makes ids and mask of the prompts for the Q-Former.
    """

    captions: Callable[[Sequence[Sample]], CaptionBatch] | None = None
    own: Callable[[Sequence[str], Sequence[int]], TextBatch] | None = None
    instruction: Callable[[Sequence[Sample]], tuple[Tensor, Tensor]] | None = None

    def check(self, sample: Sample) -> None:
        """Raises PromptError or DataError if a sample's prompt or text does not fit the model."""
        if self.captions is not None:
            self.captions([sample])
        if self.instruction is not None:
            self.instruction([sample])

    def batch(self, samples: Sequence[Sample], image_embeds: Tensor) -> PictureBatch:
        """Makes a batch of the samples' texts and their pictures' embeddings, float32 [B, P, Dv]."""
        captions = None if self.captions is None else self.captions(samples)
        own = None
        if self.own is not None:
            own = self.own([sample.text for sample in samples], [picture_number(sample.image_id) for sample in samples])
        return PictureBatch(
            tuple(sample.sample_id for sample in samples),
            image_embeds,
            len(samples) if captions is None else captions.tokens,
            captions,
            own,
            None if self.instruction is None else self.instruction(samples),
        )


def picture_number(image_id: str) -> int:
    """Returns a hash of a picture's name, an integer below 2⁶³."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") >> 1


class _Prefetched(NamedTuple):
    """The next batch, whose pictures are being opened in threads."""

    samples: list[Sample]
    opened: list[Future[Pixels | Blip2EdgeError]]
    state: dict[str, Any]


class Loader:
    """Loads batches of encoded pictures with their texts, endlessly.

    Args:
        source: The samples.
        rows: Number of samples of a batch on one process.
        encoder: Opens and encodes the pictures.
        texts: Makes the texts.
        accelerator: Device, rank and number of processes.
        workers: Number of threads that open the next batch's pictures; 0 for none.
    """

    def __init__(
        self,
        source: SampleSource,
        rows: int,
        encoder: FrozenEncoder,
        texts: TextMakers,
        accelerator: Accelerator,
        workers: int = 0,
    ) -> None:
        self._source, self._rows = source, rows
        self._encoder, self._texts, self._accelerator = encoder, texts, accelerator
        self._stream: Iterator[Sample] = iter(source)
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._prefetched: _Prefetched | None = None
        self._state = source.state_dict()

    def __next__(self) -> PictureBatch:
        """This process' rows of the next batch."""
        rank, size = self._accelerator.process_index, self._accelerator.num_processes
        own = slice(rank * self._rows, (rank + 1) * self._rows)
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            samples, futures, self._state = prefetched
            opened = [future.result() for future in futures]
        else:
            samples = self._take(self._rows * size)
            opened = [self._opened(sample) for sample in samples[own]]
        samples, pixels = self._replace_broken(samples, opened, own)
        if self._pool is not None:
            following = self._read(self._rows * size)
            futures = [self._pool.submit(self._opened, sample) for sample in following[own]]
            self._prefetched = _Prefetched(following, futures, self._source.state_dict())
        batch = self._texts.batch(samples[own], self._encoder.encode(samples[own], pixels))
        moved: PictureBatch = send_to_device(batch, self._accelerator.device)
        return moved

    def _read(self, count: int) -> list[Sample]:
        return [next(self._stream) for _ in range(count)]

    def _take(self, count: int) -> list[Sample]:
        """Reads samples, and saves the position after them."""
        samples = self._read(count)
        self._state = self._source.state_dict()
        return samples

    def _opened(self, sample: Sample) -> Pixels | Blip2EdgeError:
        try:
            self._texts.check(sample)
            return self._encoder.open(sample)
        except BROKEN as error:
            return error

    def _replace_broken(
        self, samples: list[Sample], opened: list[Pixels | Blip2EdgeError], own: slice
    ) -> tuple[list[Sample], list[Pixels]]:
        """Replaces samples that could not be opened, in the same way on all processes."""
        while True:
            broken = {
                own.start + number: each.problem
                for number, each in enumerate(opened)
                if isinstance(each, Blip2EdgeError)
            }
            if self._accelerator.num_processes > 1:
                broken = {place: what for part in gather_object([broken]) for place, what in part.items()}
            if not broken:
                return samples, [each for each in opened if not isinstance(each, Blip2EdgeError)]
            for place, problem in sorted(broken.items()):
                self._source.reject(samples[place], ImageError(problem))
            samples = list(samples)
            for place, sample in zip(sorted(broken), self._take(len(broken)), strict=True):
                samples[place] = sample
                if own.start <= place < own.stop:
                    opened[place - own.start] = self._opened(sample)

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next batch."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the position that `state_dict` returned."""
        self._source.load_state_dict(dict(state))
        self._stream = iter(self._source)
        self._prefetched = None
        self._state = self._source.state_dict()

    @property
    def broken(self) -> Mapping[str, str]:
        """Why samples could not be used, by sample id."""
        return self._source.broken

    def close(self) -> None:
        """Stops the threads that open pictures."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
