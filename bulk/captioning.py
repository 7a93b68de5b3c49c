"""Captions the pictures of one part of the output. A part is a fixed number of pictures of the source, in their order.

The result depends only on the pictures of the part, not on time, on other parts or on the machine's load. Batches are
made of the decodable pictures of the part, in their order. The random numbers for a sampled caption are seeded with the
picture's name. So a part has the same bytes if a later run or another machine of the same kind computes the part again.
Exception: if duplicates are searched, the result also depends on the embeddings of the earlier parts.

    threads: bytes --> picture --> pixel values  ──┐
    this thread:                                   └─> batch --> vision, bridge --> duplicates --> captions
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bulk.duplicates import Embedder, Embeddings
from blip2edge.bulk.listed import ListedPicture
from blip2edge.bulk.options import DEFAULT_SEED, BulkOptions, check_captions
from blip2edge.bulk.rows import DIGITS, Original, Row
from blip2edge.bulk.run_files import Chunk
from blip2edge.errors import ImageError, UsageError
from blip2edge.picture_files import printable
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import EncodedBatch, StageClock
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import warn_of_unused
from blip2edge.runtime.images.preprocess import DeferredImage, load_image

DECODED_BATCHES = 3  # batches of pictures that are decoded while others are captioned

Find = Callable[[Sequence[int], Embeddings], "list[Original | None]"]
"""Type of a function that returns, for each picture of a batch, the earlier picture that it duplicates, or None.

Its arguments are the pictures' numbers in the source and their embeddings.
"""


@dataclass(frozen=True)
class DecodedPicture:
    """A picture after reading, decoding and preprocessing.

    Attributes:
        number: Number of the picture in the source.
        item: The picture.
        pixels: Preprocessed pixels, float32 ``[3, H, W]``; None if the picture is broken.
        content: Bytes of the picture file if the output contains the pictures, else empty.
        error: Why the picture is broken; empty if the picture is usable.
    """

    number: int
    item: ListedPicture
    pixels: NDArray[np.float32] | None
    content: bytes = b""
    error: str = ""


@dataclass(frozen=True)
class ChunkResult:
    """The captions of one part of the output, and the duplicates in this part.

    Attributes:
        rows: One row for each picture. The row of a duplicate has no captions yet.
        originals: The original of each duplicate, by the duplicate's number in the source.
        pictures: File suffix and bytes of each picture if the output contains the pictures, else empty.
        numbers: Numbers of the pictures that are no duplicates; empty if duplicates are not searched.
        embeddings: Embeddings of the pictures in ``numbers``, float16 ``[len(numbers), 256]``.
    """

    rows: list[Row]
    originals: dict[int, Original]
    pictures: list[tuple[str, bytes]]
    numbers: list[int]
    embeddings: Embeddings


class ChunkCaptioner:
    """Loads a bundle, and captions parts of the output with the bundle; call :meth:`close` after use.

    Args:
        options: How to caption.
        pictures: Whether the results have the bytes of the pictures.

    Attributes:
        generation: The options of the generation; each missing field has the bundle's default.

    Raises:
        BackendError, BundleError, PromptError: For the same reasons as in ``Captioner.load`` and ``Captioner.caption``.
        UsageError: An option is wrong, or the model captions videos.
    """

    def __init__(self, options: BulkOptions, pictures: bool) -> None:
        self.captioner = Captioner.load(
            options.bundle,
            backend=options.backend,
            threads=options.threads,
            draft="none",
            limits=options.limits,
            require_signature=options.require_signature,
        )
        self._options, self._pictures, self._embed = options, pictures, Embedder()
        self._preprocessing = self.captioner.encoder.images.preprocessing
        most = self.captioner.generator.language.decoder.max_rows
        self._batch_size = options.batch_size if most is None else min(options.batch_size, most)
        if self._preprocessing.output_size is None:  # pictures of different sizes share no batch
            self._batch_size = 1
        with self.captioner.graphs.closed_on_error():
            self.generation = self._checked()
        self._threads = ThreadPoolExecutor(options.workers or os.cpu_count() or 1, "blip2edge-pictures")

    def _checked(self) -> GenerationOptions:
        """Returns the options of the generation. Raises an error if the options, the prompt or the model do not fit."""
        options, prompts = self._options, self.captioner.prompts
        if prompts.spec.frames > 1:
            raise UsageError(
                f"expected a model for pictures, but {options.bundle} captions videos",
                "caption videos with `blip2edge caption`",
            )
        prompts(prompts.with_default(options.prompt))
        given = self.captioner.options(**options.generation)
        warn_of_unused(given, options.generation)
        generation = replace(given, seed=DEFAULT_SEED) if given.sampling and given.seed is None else given
        check_captions(options.captions, generation)
        self.captioner.generator.confidence.check(generation, options.prompt)
        return generation

    def loaded(self) -> dict[str, Any]:
        """Returns what this machine loaded: hash of the bundle, backend, names of the graphs with optimized copies.

        The keys are those of :class:`Plan`: ``bundle``, ``backend``, ``optimized``.
        """
        graphs = self.captioner.graphs
        return {
            "bundle": self.captioner.bundle.sha256,
            "backend": graphs.backend,
            "optimized": sorted(graphs.copied),
        }

    def close(self) -> None:
        """Releases the graphs, and cancels the decoding of pictures that no thread has begun to decode."""
        self._threads.shutdown(cancel_futures=True)
        self.captioner.close()

    def __enter__(self) -> ChunkCaptioner:  # noqa: PYI034 - typing.Self is of Python 3.11
        """Returns the object itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Calls :meth:`close`."""
        self.close()

    def captions(self, chunks: Iterable[Chunk], find: Find | None) -> Iterator[ChunkResult]:
        """Yields the result of each part of the output, in order; threads decode the next part's pictures meanwhile.

        Args:
            chunks: The parts of the output.
            find: Finds duplicates; if None, duplicates are not searched.
        """
        for _, group in groupby(self._decoded(chunks), key=lambda one: one[0]):
            yield self._chunk((decoded for _, decoded in group), find)

    def embeddings(self, chunk: Chunk) -> list[tuple[list[int], Embeddings]]:
        """Returns, for each batch of a part's usable pictures, the picture numbers and the embeddings."""
        decoded = (one for _, one in self._decoded([chunk]) if one.pixels is not None)
        found = []
        while batch := list(islice(decoded, self._batch_size)):
            found.append(([one.number for one in batch], self._embed(self._encoded(batch).pictures)))
        return found

    def _decoded(self, chunks: Iterable[Chunk]) -> Iterator[tuple[int, DecodedPicture]]:
        """Yields (number of the part, decoded picture), in order; threads decode the following pictures meanwhile."""
        coming: deque[tuple[int, Future[DecodedPicture]]] = deque()
        for chunk in chunks:
            for number, item in enumerate(chunk.items, chunk.first):
                if len(coming) >= DECODED_BATCHES * self._batch_size:
                    chunk_number, future = coming.popleft()
                    yield chunk_number, future.result()
                coming.append((chunk.number, self._threads.submit(self._decode, number, item)))
        for chunk_number, future in coming:
            yield chunk_number, future.result()

    def _decode(self, number: int, item: ListedPicture) -> DecodedPicture:
        """Reads, decodes and preprocesses a picture; a broken picture is returned with its error."""
        try:
            content = item.read()
            picture = load_image(DeferredImage(item.image, lambda: content), self._options.limits)
            pixels = self._preprocessing(picture, self._options.limits)
        except ImageError as error:
            return DecodedPicture(number, item, None, error=error.problem)
        return DecodedPicture(number, item, pixels, content if self._pictures else b"")

    def _chunk(self, decoded: Iterator[DecodedPicture], find: Find | None) -> ChunkResult:
        """Captions the pictures of one part of the output; returns the part's result."""
        rows: dict[int, Row] = {}
        contents: dict[int, tuple[str, bytes]] = {}
        originals: dict[int, Original] = {}
        kept: list[int] = []
        vectors: list[Embeddings] = []

        def usable() -> Iterator[DecodedPicture]:
            for one in decoded:
                name = printable(one.item.image)
                rows[one.number] = Row(name, error=printable(one.error) if one.pixels is None else None)
                if self._pictures:
                    contents[one.number] = one.item.suffix(one.content), one.content
                if one.pixels is not None:
                    yield one

        pictures = usable()
        while batch := list(islice(pictures, self._batch_size)):
            encoded = self._encoded(batch)
            new = list(range(len(batch)))
            if find is not None:
                embeddings = self._embed(encoded.pictures)
                found = find([one.number for one in batch], embeddings)
                new = [at for at, original in enumerate(found) if original is None]
                originals.update({batch[at].number: one for at, one in enumerate(found) if one is not None})
                kept += [batch[at].number for at in new]
                vectors.append(embeddings[new])
            for at, (texts, logprobs, sure) in zip(new, self._texts(encoded, batch, new), strict=True):
                row = rows[batch[at].number]
                rows[batch[at].number] = replace(row, captions=texts, logprobs=logprobs, confidences=sure)
        numbers = sorted(rows)
        return ChunkResult(
            [rows[number] for number in numbers],
            originals,
            [contents[number] for number in numbers] if self._pictures else [],
            kept,
            np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float16),
        )

    def _encoded(self, batch: Sequence[DecodedPicture]) -> EncodedBatch:
        """Runs the vision encoder and the bridge on a batch of pictures."""
        encoder, clock = self.captioner.encoder, StageClock()
        pixels = np.stack([one.pixels for one in batch if one.pixels is not None])
        prompts, queries = [self._options.prompt] * len(batch), self.generation.queries
        prepared = encoder.prepared(prompts, [1] * len(batch), pixels, queries)
        return prepared.encoded(
            encoder.run_bridge(encoder.run_vision(prepared.pixels, clock), prepared.bridge_inputs, clock)
        )

    def _texts(
        self, encoded: EncodedBatch, batch: Sequence[DecodedPicture], places: list[int]
    ) -> Iterator[tuple[tuple[str, ...], tuple[float, ...], tuple[float | None, ...]]]:
        """Yields (captions, log-probabilities, confidences) of each picture of a batch whose index is in ``places``."""
        generator, count = self.captioner.generator, self._options.captions
        most = generator.language.decoder.max_rows
        size = len(batch) if most is None else max(1, most // max(count, self.generation.num_beams))
        for first in range(0, len(places), size):
            chosen = places[first : first + size]
            streams = [_stream(batch[at].item.image, text) for at in chosen for text in range(count)]
            generated = generator.complete(encoded.part(chosen), self.generation, streams, StageClock(), texts=count)
            for at in range(0, len(generated), count):
                texts = [text for text in generated[at : at + count] if text.finish_reason]
                given = [generator.answer(text, self.generation, self._options.prompt) for text in texts]
                yield (
                    tuple(answer.text for answer in given),
                    tuple(round(text.logprob, DIGITS) for text in texts),
                    tuple(answer.confidence for answer in given),
                )


def _stream(image: str, text: int) -> int:
    """Returns the seed of the random numbers for one caption: 63 bits of a hash of picture name and caption number."""
    digest = hashlib.sha256(f"{text}\0{image}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
