"""Encodes pictures and prompts: preprocessing, vision encoder and bridge.

images, prompts --preprocess--> pixel_values, token ids --vision, bridge--> EncodedBatch
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.prompt_spec import INTERLEAVED
from blip2edge.bundle.schema import QUERY_IDS, ElasticSpec
from blip2edge.errors import UsageError, option
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.options import check_integer
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.images.video import ItemSource, images_of_each, pictures_of
from blip2edge.runtime.text.prompt import InstructionTokenizer, Prompt, PromptBuilder, PromptText, pack_images
from blip2edge.runtime.text.tokenizer import Tokenizer

STAGES = ("preprocess", "vision", "bridge", "prefill", "decode")
"""The stages of a caption, in order."""


class StageClock:
    """Measures the wall time of each stage.

    Args:
        lock: Acquired while a stage runs a graph, if graphs must run one at a time; waiting for the lock does not
            count.

    Attributes:
        ms: Milliseconds by stage.
        spans: Name, start and end (``time.perf_counter`` seconds) of each measured block.
    """

    def __init__(self, lock: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.ms = dict.fromkeys(STAGES, 0.0)
        self.spans: list[tuple[str, float, float]] = []
        self._lock = lock

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time of the ``with`` block to a stage."""
        with nullcontext() if stage == "preprocess" else self._lock():
            start = time.perf_counter()
            try:
                yield
            finally:
                end = time.perf_counter()
                self.ms[stage] += (end - start) * 1e3
                self.spans.append((stage, start, end))

    def share(self, pictures: int) -> dict[str, float]:
        """Returns the milliseconds of each stage divided by ``pictures``, the number of pictures in the batch."""
        return {stage: ms / pictures for stage, ms in self.ms.items()}


class FairLock:
    """A lock that threads acquire in the order of their requests.

    With an ordinary lock, a thread that acquires the lock in a loop can keep all other threads waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Acquires the lock, and releases it at the end of the ``with`` block."""
        mark = object()
        with self._changed:
            self._line.append(mark)
            self._changed.wait_for(lambda: self._line[0] is mark)
        try:
            yield
        finally:
            with self._changed:
                self._line.popleft()
                self._changed.notify_all()


@dataclass(frozen=True)
class EncodedBatch:
    """The language model's inputs for a batch of B rows.

    Attributes:
        prompts: The prompt of each row.
        pictures: Outputs of vision encoder and bridge by name: ``image_embeds [B, P, Dv]`` at P positions and, if there
            is a bridge, Q visual tokens ``visual_tokens [B, Q, D]``. If a row has several pictures, their outputs are
            concatenated along axis 1.
        counts: Number of pictures of each row.
    """

    prompts: list[Prompt]
    pictures: dict[str, Array]
    counts: list[int]

    def part(self, rows: Sequence[int]) -> EncodedBatch:
        """Returns a batch of the rows with these indices; padding that none of these rows needs is removed."""
        if list(rows) == list(range(len(self.prompts))):
            return self
        counts = [self.counts[row] for row in rows]
        places, needed = max(self.counts), max(counts)
        pictures = {
            name: array[list(rows), : array.shape[1] // places * needed] for name, array in self.pictures.items()
        }
        return EncodedBatch([self.prompts[row] for row in rows], pictures, counts)


@dataclass(frozen=True)
class PreparedBatch:
    """A batch after preprocessing: the inputs of vision encoder, bridge and language model.

    Attributes:
        prompts: The prompt of each row.
        counts: Number of pictures of each row.
        pixels: ``pixel_values [N, 3, H, W]`` of all pictures, row by row.
        bridge_inputs: The bridge's inputs besides ``image_embeds``, by name: token ids of the instruction, and the
            indices of the queries to compute; empty if the bridge has neither input.
    """

    prompts: list[Prompt]
    counts: list[int]
    pixels: Array
    bridge_inputs: dict[str, Array]

    def encoded(self, outputs: Mapping[str, Array]) -> EncodedBatch:
        """Returns the encoded batch, given the outputs of vision encoder and bridge for the N pictures by name."""
        if max(self.counts) > 1:
            outputs = {name: pack_images(array, self.counts) for name, array in outputs.items()}
        return EncodedBatch(self.prompts, dict(outputs), self.counts)


EncodeBatch = Callable[[Sequence[ItemSource], Sequence[PromptText | None], StageClock, int | None], EncodedBatch]
"""Type of a function that encodes the images and prompts of some rows as one batch.

Arguments: images, prompts, clock, and the number of visual tokens of each picture (None for all).
"""


@dataclass(frozen=True)
class ImageParts:
    """Preprocessing and graphs for images.

    Attributes:
        preprocessing: Computes pixel values from pictures.
        pixels_dtype: dtype of the vision encoder's input.
        vision: The vision encoder.
        bridge: The bridge; None if the model has none.
        limits: The largest picture or video that is decoded.
        elastic: Range of the number of queries of an elastic bridge, which can compute fewer visual tokens; None for
            any other bridge.
    """

    preprocessing: Preprocessing
    pixels_dtype: np.dtype[np.generic]
    vision: Session
    bridge: Session | None
    limits: Limits = DEFAULT_LIMITS
    elastic: ElasticSpec | None = None

    def query_ids(self, pictures: int, queries: int | None = None) -> dict[str, Array]:
        """Makes the input that selects the first queries of an elastic bridge; empty for any other bridge.

        Args:
            pictures: Number of pictures, B.
            queries: Q, the number of queries; None for all.

        Returns:
            Name and value of the input, int64 ``[B, Q]``.
        """
        if self.elastic is None:
            return {}
        return {QUERY_IDS: np.tile(np.arange(queries or self.elastic.max_queries), (pictures, 1))}


@dataclass(frozen=True)
class TextParts:
    """Tokenizers and template for prompts.

    ``instructions`` tokenizes the prompt for the bridge; None if the bridge has no such input.
    """

    tokenizer: Tokenizer
    prompts: PromptBuilder
    instructions: InstructionTokenizer | None


class Encoder:
    """Encodes pictures and prompts: preprocessing, vision encoder and bridge.

    Args:
        images: Preprocessing and graphs.
        text: Tokenizers and prompt template.
        bridge_outputs: Names of the bridge's outputs to compute; None for all.
    """

    def __init__(self, images: ImageParts, text: TextParts, bridge_outputs: Sequence[str] | None = None) -> None:
        self.images, self.text = images, text
        self._bridge_outputs = bridge_outputs

    def __call__(
        self,
        images: Sequence[ItemSource],
        texts: Sequence[PromptText | None],
        clock: StageClock,
        queries: int | None = None,
    ) -> EncodedBatch:
        """Encodes a batch.

        Args:
            images: One item for each row; as in ``Captioner.caption``.
            texts: The prompt of each row; None for the bundle's default.
            clock: Measures the stages.
            queries: Number of visual tokens of each picture, for a bundle with an elastic bridge; None for all.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: A prompt is too long, or does not fit the model.
            UsageError: A row has several pictures, and the model takes one.
        """
        batch = self.prepare(images, texts, clock, queries)
        outputs = self.run_bridge(self.run_vision(batch.pixels, clock), batch.bridge_inputs, clock)
        return batch.encoded(outputs)

    def prepare(
        self,
        images: Sequence[ItemSource],
        texts: Sequence[PromptText | None],
        clock: StageClock,
        queries: int | None = None,
    ) -> PreparedBatch:
        """Computes the pixel values of the pictures and the token ids of the prompts; arguments as in ``__call__``."""
        with clock("preprocess"):
            spec = self.text.prompts.spec
            counts = [spec.frames] * len(images)
            flat: Sequence[ItemSource] = images
            if spec.kind == INTERLEAVED:
                groups = images_of_each(images)
                counts = list(map(len, groups))
                flat = [image for group in groups for image in group]
            elif spec.frames > 1 or any(isinstance(image, (list, tuple)) for image in images):
                flat = pictures_of(images, spec.frames, self.images.limits)
            pixels = self.images.preprocessing.batch(flat, self.images.limits)  # type: ignore[arg-type]
            return self.prepared(texts, counts, pixels, queries)

    def prepared(
        self, texts: Sequence[PromptText | None], counts: list[int], pixels: Array, queries: int | None = None
    ) -> PreparedBatch:
        """Makes a batch from preprocessed pictures.

        Args:
            texts: The prompt of each row; None for the bundle's default.
            counts: Number of pictures of each row.
            pixels: Pixel values of all pictures, row by row, ``[N, 3, H, W]``.
            queries: Number of visual tokens of each picture; None for all.
        """
        filled = [self.text.prompts.with_default(text) for text in texts]
        inputs = self.text.instructions(filled) if self.text.instructions is not None else {}
        inputs |= self.images.query_ids(len(pixels), queries)
        prompts = [self.text.prompts(text, count, queries) for text, count in zip(filled, counts, strict=True)]
        return PreparedBatch(prompts, counts, pixels.astype(self.images.pixels_dtype, copy=False), inputs)

    def run_vision(self, pixels: Array, clock: StageClock) -> dict[str, Array]:
        """Runs the vision encoder on ``pixel_values [N, 3, H, W]``; returns its outputs by name."""
        with clock("vision"):
            return self.images.vision.run({"pixel_values": pixels})

    def run_bridge(
        self, outputs: Mapping[str, Array], others: Mapping[str, Array], clock: StageClock
    ) -> dict[str, Array]:
        """Runs the bridge, if there is one, on the vision encoder's outputs and the bridge's other inputs.

        Returns:
            The outputs of vision encoder and bridge by name.
        """
        if self.images.bridge is None:
            return dict(outputs)
        with clock("bridge"):
            inputs = {"image_embeds": outputs["image_embeds"], **others}
            return {**outputs, **self.images.bridge.run(inputs, self._bridge_outputs)}


def checked_queries(bundle: Bundle, queries: int | None) -> int | None:
    """Checks that a bundle can be run with this number of queries (visual tokens of a picture).

    Returns:
        ``queries``; None if ``queries`` is None or the number of all queries, which have the same meaning.

    Raises:
        UsageError: The bundle is not elastic, or was not trained with this number.
    """
    elastic = bundle.manifest.elastic
    if queries is None:
        return None
    if elastic is None:
        raise UsageError(
            f"{bundle.path} does not take {option('queries')}: its bridge was trained with all of its queries only",
            f"leave {option('queries')} out, or train the bridge with [stage2] elastic = true and export it again "
            "(docs/training.md)",
            field="queries",
        )
    check_integer("queries", queries, elastic.min_queries, elastic.max_queries)
    return None if queries == elastic.max_queries else int(queries)
