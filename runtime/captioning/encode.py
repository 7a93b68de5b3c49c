"""The half before the language model: a batch of pictures and prompts to what the decoder starts from."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import VISION
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.images.video import ItemSource, pictures_of
from blip2edge.runtime.text.prompt import Instructor, Prompt, Prompter, pack, separate

STAGES = ("preprocess", "vision", "bridge", "prefill", "decode")


class Clock:
    """Milliseconds by stage.

    Args:
        turn: What a stage that runs a graph waits for, where graphs run one at a time; the wait is not counted.

    Attributes:
        ms: By stage.
        spans: Each stage as it was run: its name, start and end (``time.perf_counter`` seconds).
    """

    def __init__(self, turn: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        self.ms = dict.fromkeys(STAGES, 0.0)
        self.spans: list[tuple[str, float, float]] = []
        self._turn = turn

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds what the block takes to a stage."""
        with nullcontext() if stage == "preprocess" else self._turn():
            start = time.perf_counter()
            try:
                yield
            finally:
                end = time.perf_counter()
                self.ms[stage] += (end - start) * 1e3
                self.spans.append((stage, start, end))

    def share(self, pictures: int) -> dict[str, float]:
        """The share of one of ``pictures``, stage by stage."""
        return {stage: ms / pictures for stage, ms in self.ms.items()}


@dataclass(frozen=True)
class Encoded:
    """A batch whose pictures have been looked at.

    Attributes:
        prompts: A row each.
        pictures: The outputs of the graphs before the language model, by name: ``image_embeds [B, P, Dv]``, and
            ``visual_tokens [B, Q, D]`` where there is a bridge; of several pictures a row side by side.
        counts: Pictures of each row.
    """

    prompts: list[Prompt]
    pictures: dict[str, Array]
    counts: list[int]

    def part(self, rows: Sequence[int]) -> Encoded:
        """Some of the rows, without the places that only others need."""
        if list(rows) == list(range(len(self.prompts))):
            return self
        counts = [self.counts[row] for row in rows]
        places, needed = max(self.counts), max(counts)
        pictures = {
            name: array[list(rows), : array.shape[1] // places * needed]
            for name, array in self.pictures.items()
        }
        return Encoded([self.prompts[row] for row in rows], pictures, counts)


@dataclass(frozen=True)
class Prepared:
    """A batch about to be looked at.

    Attributes:
        prompts: A row each.
        counts: Pictures of each row.
        pixels: ``pixel_values [N, 3, H, W]`` of all rows' pictures, one row's after the other's.
        instruction: The bridge's inputs beside the picture, by name; empty where none enters it.
    """

    prompts: list[Prompt]
    counts: list[int]
    pixels: Array
    instruction: dict[str, Array]

    def seen(self, pictures: Mapping[str, Array]) -> Encoded:
        """The batch with what the graphs made of its N pictures, several of a row side by side."""
        if max(self.counts) > 1:
            pictures = {name: pack(array, self.counts) for name, array in pictures.items()}
        return Encoded(self.prompts, dict(pictures), self.counts)


Encoder = Callable[[Sequence[ItemSource], Sequence[str | None], Clock], Encoded]
"""Pictures and prompts, a row each, to a batch."""


class PictureEncoder:
    """Preprocessing, vision encoder and bridge.

    Args:
        bundle: An opened bundle.
        vision: The loaded vision encoder.
        bridge: The loaded bridge; None where the decoder looks at patches.
        prompter: Makes prompts.
        instructor: Makes the bridge's instructions; None where none enters it.
        drafted: Whether a draft goes on from the queries' keys and values.
    """

    def __init__(
        self,
        bundle: Bundle,
        vision: Session,
        bridge: Session | None,
        prompter: Prompter,
        instructor: Instructor | None,
        drafted: bool = False,
    ) -> None:
        self.preprocessing = Preprocessing.from_json(bundle.manifest.preprocessing)
        self.vision = vision
        self.bridge = bridge
        self.prompter = prompter
        self.instructor = instructor
        self._bridged = None if drafted else ["visual_tokens"]
        self._pixels_dtype = NUMPY_DTYPES[bundle.graph(VISION).spec.inputs[0].dtype]

    def __call__(self, images: Sequence[ItemSource], texts: Sequence[str | None], clock: Clock) -> Encoded:
        """Encodes a batch.

        Args:
            images: As ``Captioner.caption`` takes them, a row each.
            texts: Prompts as given; None for the bundle's default.
            clock: Told what each stage takes.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: A prompt does not fit.
            UsageError: A row has several pictures, and the model takes one.
        """
        prepared = self.prepare(images, texts, clock)
        return prepared.seen(self.bridged(self.look(prepared.pixels, clock), prepared.instruction, clock))

    def prepare(self, images: Sequence[ItemSource], texts: Sequence[str | None], clock: Clock) -> Prepared:
        """The first part of a call: pixels and tokens, with no graph run."""
        spec = self.prompter.spec
        with clock("preprocess"):
            groups = separate(list(images)) if spec.picture_token else None
            counts = [spec.frames] * len(images) if groups is None else list(map(len, groups))
            given = (
                pictures_of(images, spec.frames)
                if groups is None
                else [one for group in groups for one in group]
            )
            filled = [self.prompter.filled(text) for text in texts]
            instruction = self.instructor(filled) if self.instructor is not None else {}
            prompts = [self.prompter(text, count) for text, count in zip(filled, counts, strict=True)]
            pixels = self.preprocessing.batch(given).astype(self._pixels_dtype, copy=False)
        return Prepared(prompts, counts, pixels, instruction)

    def look(self, pixels: Array, clock: Clock) -> dict[str, Array]:
        """The vision encoder's outputs, of ``pixel_values [N, 3, H, W]``."""
        with clock("vision"):
            return self.vision.run({"pixel_values": pixels})

    def bridged(
        self, pictures: Mapping[str, Array], instruction: Mapping[str, Array], clock: Clock
    ) -> dict[str, Array]:
        """The vision encoder's outputs and, where there is a bridge, what that makes of them."""
        if self.bridge is None:
            return dict(pictures)
        with clock("bridge"):
            given = {"image_embeds": pictures["image_embeds"], **instruction}
            return {**pictures, **self.bridge.run(given, self._bridged)}
