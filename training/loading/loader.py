"""Batches of a source: every process takes its rows of each, broken samples are replaced, and all can be resumed.

All processes read the same stream of samples and open only the pictures of their own rows. One that cannot be
opened, or whose text does not fit the model, is told to all of them, rejected by the source, and replaced by the
next sample of the stream: two processes at B rows train on the very samples that one at 2B would.
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
"""What is wrong with one sample, and no reason to stop."""


class PictureBatch(NamedTuple):
    """Pictures and their texts, as far as a phase reads them.

    Attributes:
        sample_ids: B names.
        image_embeds: float32 [B, P, Dv], the frozen picture encoder's output.
        weight: Tokens to be learned, or rows.
        captions: For the language model.
        texts: For the Q-Former's own text side.
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
    """What makes the texts of a batch; None where a phase does not read them."""

    captions: Callable[[Sequence[Sample]], CaptionBatch] | None = None
    own: Callable[[Sequence[str], Sequence[int]], TextBatch] | None = None
    instruction: Callable[[Sequence[Sample]], tuple[Tensor, Tensor]] | None = None

    def check(self, sample: Sample) -> None:
        """Raises PromptError or DataError where a sample's prompt or text does not fit the model."""
        if self.captions is not None:
            self.captions([sample])
        if self.instruction is not None:
            self.instruction([sample])

    def batch(self, samples: Sequence[Sample], image_embeds: Tensor) -> PictureBatch:
        """Texts beside embeddings."""
        captions = None if self.captions is None else self.captions(samples)
        own = None
        if self.own is not None:
            own = self.own(
                [sample.text for sample in samples], [picture_number(sample.image_id) for sample in samples]
            )
        return PictureBatch(
            tuple(sample.sample_id for sample in samples),
            image_embeds,
            len(samples) if captions is None else captions.tokens,
            captions,
            own,
            None if self.instruction is None else self.instruction(samples),
        )


def picture_number(image_id: str) -> int:
    """A whole number below 2⁶³ for a picture's name: equal names give equal ones, others hardly ever."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") >> 1


class _Ahead(NamedTuple):
    """A batch that is being opened in threads."""

    samples: list[Sample]
    opened: list[Future[Pixels | Blip2EdgeError]]
    state: dict[str, Any]


class Loader:
    """Batches of captioned pictures.

    Args:
        source: Where samples come from.
        rows: Samples a batch on one process.
        encoder: Opens and encodes their pictures.
        texts: Makes their texts.
        accelerator: This process among the others.
        workers: Threads that open the next batch's pictures; 0: none.
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
        self._ahead: _Ahead | None = None
        self._state = source.state_dict()

    def __next__(self) -> PictureBatch:
        """This process' rows of the next batch."""
        rank, size = self._accelerator.process_index, self._accelerator.num_processes
        own = slice(rank * self._rows, (rank + 1) * self._rows)
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            samples, futures, self._state = ahead
            opened = [future.result() for future in futures]
        else:
            samples = self._take(self._rows * size)
            opened = [self._opened(sample) for sample in samples[own]]
        samples, pixels = self._mended(samples, opened, own)
        if self._pool is not None:
            following = self._read(self._rows * size)
            futures = [self._pool.submit(self._opened, sample) for sample in following[own]]
            self._ahead = _Ahead(following, futures, self._source.state_dict())
        batch = self._texts.batch(samples[own], self._encoder.encode(samples[own], pixels))
        moved: PictureBatch = send_to_device(batch, self._accelerator.device)
        return moved

    def _read(self, count: int) -> list[Sample]:
        return [next(self._stream) for _ in range(count)]

    def _take(self, count: int) -> list[Sample]:
        """Samples that are consumed: the state stands behind them."""
        samples = self._read(count)
        self._state = self._source.state_dict()
        return samples

    def _opened(self, sample: Sample) -> Pixels | Blip2EdgeError:
        try:
            self._texts.check(sample)
            return self._encoder.open(sample)
        except BROKEN as error:
            return error

    def _mended(
        self, samples: list[Sample], opened: list[Pixels | Blip2EdgeError], own: slice
    ) -> tuple[list[Sample], list[Pixels]]:
        """Replaces what could not be opened, on all processes alike."""
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
        """Where the next batch begins."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes there."""
        self._source.load_state_dict(dict(state))
        self._stream = iter(self._source)
        self._ahead = None
        self._state = self._source.state_dict()

    @property
    def broken(self) -> Mapping[str, str]:
        """Samples that could not be used, and why."""
        return self._source.broken

    def close(self) -> None:
        """Ends its threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
