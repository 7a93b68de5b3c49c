"""Loads batches of samples, replaces broken samples, and saves and restores the position in the data.

All processes read the same stream of samples, but each process opens only the pictures of its own rows. If a picture
cannot be opened, or a text does not fit the model, all processes reject the sample and use the next sample of the
stream instead. So two processes with B rows each train on the same samples as one process with 2 B rows.

Data can also be split into several streams (`data_streams`). Each stream gives an equal number of a batch's rows, and a
process reads only the streams of its own rows. The samples of a batch then depend on the number of streams, but not on
the number of processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from blip2edge.errors import Blip2EdgeError, DataError, ImageError
from blip2edge.training.data.sources import UNUSABLE, Sample, SampleSource
from blip2edge.training.loading.batches import CaptionBatch, TextBatch
from blip2edge.training.loading.features import FrozenEncoder, PictureReader

Pixels = NDArray[np.float32] | None
Opened = list[Pixels]
"""Pixels of the pictures of one sample."""


class PictureBatch(NamedTuple):
    """Encoded pictures with the texts that a phase needs.

    Attributes:
        sample_ids: Names of the B samples.
        image_embeds: float32 [B, P, Dv], output of the frozen picture encoder; pixel values [B, 3, H, W], if the phase
            trains the encoder.
        weight: Number of tokens on which the loss is computed; number of rows if there are no captions.
        captions: Texts for the language model.
        texts: Texts for the Q-Former's own text side.
        instruction: Token ids and mask of the prompts, int64 [B, T] each, for a Q-Former with text input.
        pictures: N, the number of pictures of each sample; `image_embeds` then has B * N rows, sample by sample.
    """

    sample_ids: tuple[str, ...]
    image_embeds: Tensor
    weight: int
    captions: CaptionBatch | None = None
    texts: TextBatch | None = None
    instruction: tuple[Tensor, Tensor] | None = None
    pictures: int = 1


@dataclass(frozen=True)
class TextMakers:
    """Functions that make the texts of a batch; a function is None if the phase does not need its texts.

    Attributes:
        captions: Makes texts for the language model.
        own: Makes texts for the Q-Former's own text side, from texts and picture numbers.
        instruction: Makes token ids and mask of the prompts, for a Q-Former with text input.
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
        """Makes a batch of the samples' texts and their pictures' embeddings, float32 [number of pictures, P, Dv]."""
        counts = [len(sample.pictures) for sample in samples]
        if min(counts) < max(
            counts
        ):  # sets of a mixture with other numbers of examples; no text attends to the padding
            image_embeds = pad_sequence(list(torch.split(image_embeds, counts)), batch_first=True).flatten(0, 1)
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
            max(counts),
        )


def picture_number(image_id: str) -> int:
    """Returns a hash of a picture's name, an integer below 2⁶³."""
    return int.from_bytes(hashlib.sha256(image_id.encode()).digest()[:8], "big") >> 1


class _Prefetched(NamedTuple):
    """The next batch, whose pictures are being opened in threads."""

    samples: list[Sample]
    opened: list[Future[Opened | Blip2EdgeError]]
    states: list[dict[str, Any]]


class Loader:
    """Loads batches of encoded pictures with their texts, endlessly.

    Args:
        source: The samples. If the data is split into streams: the sources of this process' streams; each source gives
            the same number of rows.
        rows: Number of samples of a batch on one process.
        encoder: Opens and encodes the pictures; only opens them, if the phase encodes them itself.
        texts: Makes the texts.
        accelerator: Device, rank and number of processes.
        workers: Number of threads that open the next batch's pictures; 0 for none.
    """

    def __init__(
        self,
        source: SampleSource | Sequence[SampleSource],
        rows: int,
        encoder: FrozenEncoder | PictureReader,
        texts: TextMakers,
        accelerator: Accelerator,
        workers: int = 0,
    ) -> None:
        self._split = isinstance(source, Sequence)
        self._sources = list(source) if isinstance(source, Sequence) else [source]
        rank, size = (0, 1) if self._split else (accelerator.process_index, accelerator.num_processes)
        self._own = slice(rank * rows, (rank + 1) * rows)  # this process' rows of what it reads
        self._count = rows * size // len(self._sources)  # samples of each source for a batch
        self._encoder, self._texts, self._accelerator = encoder, texts, accelerator
        self._streams: list[Iterator[Sample]] = [iter(each) for each in self._sources]
        self._pool = ThreadPoolExecutor(workers) if workers else None
        self._prefetched: _Prefetched | None = None
        self._states = self._positions()

    def __next__(self) -> PictureBatch:
        """Returns this process' rows of the next batch, on the device."""
        own = self._own
        prefetched, self._prefetched = self._prefetched, None
        if prefetched is not None:
            samples, futures, self._states = prefetched
            opened = [future.result() for future in futures]
        else:
            samples = self._read()
            self._states = self._positions()
            opened = [self._opened(sample) for sample in samples[own]]
        samples, pixels = self._replace_broken(samples, opened)
        if self._pool is not None:
            following = self._read()
            futures = [self._pool.submit(self._opened, sample) for sample in following[own]]
            self._prefetched = _Prefetched(following, futures, self._positions())
        shown = [picture for sample in samples[own] for picture in sample.pictures]
        batch = self._texts.batch(samples[own], self._encoder.encode(shown, pixels))
        moved: PictureBatch = send_to_device(batch, self._accelerator.device)
        return moved

    def _read(self) -> list[Sample]:
        return [next(stream) for stream in self._streams for _ in range(self._count)]

    def _positions(self) -> list[dict[str, Any]]:
        """Returns the position of each source (its `state_dict`)."""
        return [source.state_dict() for source in self._sources]

    def _opened(self, sample: Sample) -> Opened | Blip2EdgeError:
        """Returns the pixels of a sample's pictures; if the sample is broken, returns the error."""
        try:
            self._texts.check(sample)
            return [self._encoder.open(picture) for picture in sample.pictures]
        except UNUSABLE as error:
            return error

    def _replace_broken(
        self, samples: list[Sample], opened: list[Opened | Blip2EdgeError]
    ) -> tuple[list[Sample], list[Pixels]]:
        """Replaces broken samples by the next samples; all processes that read a stream do the same replacements."""
        own, fresh = self._own, list(range(len(samples)))
        while True:
            broken = {
                own.start + number: each.problem
                for number, each in enumerate(opened)
                if isinstance(each, Blip2EdgeError)
            }
            if not self._split and self._accelerator.num_processes > 1:
                broken = {place: what for part in gather_object([broken]) for place, what in part.items()}
            for place in fresh:
                source = self._sources[place // self._count]
                if place in broken:
                    source.reject(samples[place], ImageError(broken[place]))
                else:
                    source.accept(samples[place])
            if not broken:
                return samples, [one for each in opened if not isinstance(each, Blip2EdgeError) for one in each]
            samples, fresh = list(samples), sorted(broken)
            for place in fresh:
                samples[place] = next(self._streams[place // self._count])
            self._states = self._positions()
            for place in fresh:
                if own.start <= place < own.stop:
                    opened[place - own.start] = self._opened(samples[place])

    def state_dict(self) -> dict[str, Any]:
        """Returns the position of the next batch. Every process must call this function."""
        if not self._split:
            return dict(self._states[0])
        states = self._states
        if self._accelerator.num_processes > 1:
            states = gather_object(list(states))  # by process, and so by stream
        return {"streams": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the position that `state_dict` returned.

        Raises:
            DataError: The position was saved with other data, or another number of streams.
        """
        states, first = [state], 0
        if self._split:
            streams = len(self._sources) * self._accelerator.num_processes
            states = list(state.get("streams", ()))
            first = len(self._sources) * self._accelerator.process_index
            if len(states) != streams:
                raise DataError(
                    f"the run was started with {len(states) or 1} data streams, but now there are {streams}",
                    "resume with the same data_streams ([loop] in a recipe)",
                )
        elif "streams" in state:
            raise DataError(
                f"the run was started with {len(state['streams'])} data streams, but now there is one",
                "resume with the same data_streams ([loop] in a recipe)",
            )
        for source, own in zip(self._sources, states[first:], strict=False):
            source.load_state_dict(dict(own))
        self._streams = [iter(source) for source in self._sources]
        self._prefetched = None
        self._states = self._positions()

    @property
    def broken(self) -> Mapping[str, str]:
        """Returns, by sample id, why a sample could not be used. With several streams, call it in every process."""
        found = {name: problem for source in self._sources for name, problem in source.broken.items()}
        if not self._split or self._accelerator.num_processes == 1:
            return found
        return {name: problem for part in gather_object([found]) for name, problem in part.items()}

    def close(self) -> None:
        """Stops the threads that open pictures, and closes the cache of features."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._encoder.close()
