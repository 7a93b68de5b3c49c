"""Pictures in, captions out: the whole runtime in one place.

    picture --preprocess--> pixel_values --vision--> image_embeds --bridge--> visual_tokens
    prompt  --tokenise---> token rows   ----------------------------------> inputs_embeds --prefill--> logits, cache
                                                                            token by token --decode--> ids --> text

Neither torch nor transformers is imported here or below.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from blip2edge.contract import BRIDGE, QFORMER_TOKENIZER_FILE, TOKENIZER_FILE, VISION
from blip2edge.errors import BackendError, Blip2EdgeError, BundleError, UsageError
from blip2edge.manifest import Bundle
from blip2edge.runtime.frames import ItemSource, pictures_of
from blip2edge.runtime.generate import Generated, GenerationOptions, generate, stream
from blip2edge.runtime.instruction import Instructor
from blip2edge.runtime.interleave import pack, separate
from blip2edge.runtime.language import load_language_model
from blip2edge.runtime.preprocess import Preprocessing
from blip2edge.runtime.prompt import Prompt, Prompter
from blip2edge.runtime.session import NUMPY_DTYPES, Array, Session, check_threads, open_session
from blip2edge.runtime.tokenizer import StopText, TextStream, Tokenizer

STAGES = ("preprocess", "vision", "bridge", "prefill", "decode")


@dataclass(frozen=True)
class CaptionResult:
    """A picture's caption.

    Attributes:
        image: Its path; None where a picture was given as an object. Of several pictures a list of those.
        prompt: The prompt as given; None for none.
        text: The caption, without special tokens and surrounding spaces.
        tokens: Generated ids, the end token included.
        finish_reason: ``eos``, ``length`` or ``stop``.
        timings_ms: Milliseconds of each of :data:`STAGES` and ``total``. Pictures of one batch share its time
            equally. Where the next batch is encoded meanwhile, less time goes by than the sum over pictures.
        tokens_per_s: Generated tokens over the seconds of prefill and decode.
    """

    image: str | list[str | None] | None
    prompt: str | None
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]
    tokens_per_s: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the attributes as keys."""
        return {**vars(self), "tokens": list(self.tokens)}


@dataclass
class _Encoded:
    """A batch whose pictures have been looked at: the outputs of the graphs before the language model, by name."""

    images: list[ItemSource]
    texts: list[str | None]
    prompts: list[Prompt]
    pictures: dict[str, Array]
    clock: _Clock

    def part(self, rows: range) -> tuple[list[Prompt], dict[str, Array]]:
        """Prompts and pictures of some rows."""
        if len(rows) == len(self.prompts):
            return self.prompts, self.pictures
        pictures = {name: array[rows.start : rows.stop] for name, array in self.pictures.items()}
        return self.prompts[rows.start : rows.stop], pictures


class _Clock:
    """Milliseconds by stage."""

    def __init__(self) -> None:
        self.ms = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[stage] += (time.perf_counter() - start) * 1e3

    def share(self, pictures: int) -> dict[str, float]:
        """The share of one of ``pictures``, with the total."""
        shared = {stage: ms / pictures for stage, ms in self.ms.items()}
        return {**shared, "total": sum(shared.values())}


class Captioner:
    """A loaded bundle. Make one with :meth:`load`."""

    def __init__(self, bundle: Bundle, backend: str = "auto", threads: int | None = None) -> None:
        manifest = bundle.manifest
        if manifest.prompt is None:
            raise BundleError(
                f"{bundle.path} compares pictures with texts and captions none",
                "use blip2edge match or blip2edge embed",
            )
        if manifest.precision == "bf16" and backend in ("auto", "cpu"):
            raise BackendError(
                "the bundle is in bf16, for which ONNX Runtime has no CPU kernels",
                "export with --precision fp32 or fp16",
            )

        def session(graph: str) -> Session:
            return open_session(bundle.file(bundle.graph(graph).spec.file), backend, threads)

        self.bundle = bundle
        self.preprocessing = Preprocessing.from_json(manifest.preprocessing)
        self.tokenizer = Tokenizer.from_file(bundle.file(TOKENIZER_FILE))
        self.vision = session(VISION)
        self.bridge = session(BRIDGE) if BRIDGE in manifest.graphs else None
        self.language = load_language_model(bundle, session)
        rows = self.language.table.num_rows
        self.prompter = Prompter(manifest.prompt, self.tokenizer, manifest.max_positions, rows)
        self.instructor: Instructor | None = None
        if manifest.prompt.instruction_positions:
            tokenizer = Tokenizer.from_file(bundle.file(QFORMER_TOKENIZER_FILE))
            spec = manifest.prompt
            self.instructor = Instructor(tokenizer, spec.instruction_positions, spec.frames)
        self._pixels_dtype = NUMPY_DTYPES[bundle.graph(VISION).spec.inputs[0].dtype]

    @classmethod
    def load(cls, bundle: str | Path, *, backend: str = "auto", threads: int | None = None) -> Captioner:
        """Opens a bundle and loads its graphs.

        Args:
            bundle: The directory that ``blip2edge export`` made.
            backend: ``auto``, or a backend by name.
            threads: CPU threads within an operator; None for as many as there are cores.

        Raises:
            BundleError: No bundle, a newer one, or one whose files were changed.
            BackendError: The backend is not there.
            UsageError: ``threads`` is below 1.
        """
        check_threads(threads)
        return cls(Bundle.open(bundle), backend, threads)

    def caption(self, image: ItemSource, *, prompt: str | None = None, **options: Any) -> CaptionResult:
        """Captions one picture.

        Args:
            image: A path, a Pillow picture or an array ``[H, W, 3]`` uint8. Where the model takes videos: a list
                of those, an array ``[F, H, W, 3]``, a folder of frames or a video file. Where it reads pictures
                between texts (Flamingo): one, or a list.
            prompt: Text that the caption goes on from, or the instruction; None for the bundle's default. Of
                several pictures each stands where ``<image>`` does: ``"<image>A cat.<image>A"``; without it all
                stand before the text.
            **options: Fields of :class:`GenerationOptions`; what is left out is the bundle's default.

        Raises:
            ImageError: The picture cannot be read.
            PromptError: The prompt does not fit.
            UsageError: An option is outside its range.
        """
        return next(self.caption_many([image], prompts=[prompt], **options))

    def ask(self, image: ItemSource, question: str, **options: Any) -> CaptionResult:
        """Answers a question on a picture, by the family's question template; arguments as :meth:`caption`."""
        return self.caption(image, prompt=self.prompter.question(question), **options)

    def caption_many(
        self,
        images: Iterable[ItemSource],
        *,
        prompts: Sequence[str | None] | None = None,
        batch_size: int = 1,
        **options: Any,
    ) -> Iterator[CaptionResult]:
        """Captions pictures in order, those of the next batch being encoded while this one is decoded.

        Args:
            images: As in :meth:`caption`.
            prompts: One a picture; None for none at all.
            batch_size: Pictures decoded together; a result does not depend on it.
            **options: As in :meth:`caption`.

        Yields:
            A result a picture.

        Raises:
            ImageError, PromptError, UsageError: As in :meth:`caption`; results before it have been given.
        """
        pictures = list(images)
        texts: list[str | None] = [None] * len(pictures) if prompts is None else list(prompts)
        if len(texts) != len(pictures):
            raise UsageError(
                f"there are {len(texts)} prompts for {len(pictures)} pictures", "give one prompt a picture"
            )
        if batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1, not {batch_size}")
        generation = self.options(**options)
        starts = range(0, len(pictures), batch_size)
        return self._in_batches(
            [(pictures[at : at + batch_size], texts[at : at + batch_size]) for at in starts], generation
        )

    def stream(self, image: ItemSource, *, prompt: str | None = None, **options: Any) -> Iterator[str]:
        """The pieces of one picture's caption as they are decided; joined and stripped, they are its text.

        Arguments and errors as in :meth:`caption`; beams cannot be streamed.
        """
        generation = self.options(**options)
        if generation.num_beams > 1:
            raise UsageError(
                "--stream and --num-beams above 1 exclude each other: beams choose the words at the end"
            )
        batch = self._encode([image], [prompt])
        return self._pieces(batch, generation)

    def options(self, **options: Any) -> GenerationOptions:
        """The bundle's defaults with some fields replaced.

        Raises:
            UsageError: An unknown field, or a value outside its range.
        """
        defaults = self.bundle.manifest.generation
        known = GenerationOptions.__dataclass_fields__
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            raise UsageError(f"there is no option {unknown[0]}", f"options are {', '.join(known)}")
        least = options.get("min_new_tokens", 0)
        merged = {
            "eos_token_ids": tuple(defaults["eos_token_ids"]),
            "stop": tuple(defaults.get("stop", ())),
            "max_new_tokens": max(defaults["max_new_tokens"], least if isinstance(least, int) else 0),
            **options,
        }
        return GenerationOptions(**merged)

    def _in_batches(
        self, batches: list[tuple[list[ItemSource], list[str | None]]], options: GenerationOptions
    ) -> Iterator[CaptionResult]:
        if len(batches) <= 1 or (os.cpu_count() or 1) == 1:
            done = 0
            for images, texts in batches:
                yield from self._captions(partial(self._encode, images, texts), images, texts, options, done)
                done += len(images)
            return
        with ThreadPoolExecutor(1, thread_name_prefix="blip2edge-vision") as ahead:
            done = 0
            coming = ahead.submit(self._encode, *batches[0])
            for at, (images, texts) in enumerate(batches):
                encoded = coming
                wait([encoded])
                if at + 1 < len(batches):
                    coming = ahead.submit(self._encode, *batches[at + 1])
                yield from self._captions(encoded.result, images, texts, options, done)
                done += len(images)

    def _captions(
        self,
        encode: Callable[[], _Encoded],
        images: list[ItemSource],
        texts: list[str | None],
        options: GenerationOptions,
        first: int,
    ) -> Iterator[CaptionResult]:
        """A batch's captions; where one item is broken, those before it one by one, and then its error."""
        try:
            batch = encode()
        except Blip2EdgeError:
            if len(images) == 1:
                raise
        else:
            yield from self._decode(batch, options, first)
            return
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            yield from self._decode(self._encode([image], [text]), options, first + row)

    def _encode(self, images: list[ItemSource], texts: list[str | None]) -> _Encoded:
        clock = _Clock()
        spec = self.prompter.spec
        with clock("preprocess"):
            groups = separate(images) if spec.picture_token else None
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
        with clock("vision"):
            pictures = self.vision.run({"pixel_values": pixels})
        if self.bridge is not None:
            with clock("bridge"):
                pictures |= self.bridge.run({"image_embeds": pictures["image_embeds"], **instruction})
        if max(counts) > 1:
            pictures = {name: pack(array, counts) for name, array in pictures.items()}
        return _Encoded(images, texts, prompts, pictures, clock)

    def _seen(self, prompt: Prompt) -> list[int]:
        """A prompt's ids as the decoder has seen them: none where an encoder reads the prompt."""
        return [] if self.language.initial else prompt.ids

    def _fit(self, prompt: Prompt, options: GenerationOptions) -> GenerationOptions:
        """Ends a caption where the context does; the last token is generated and not read."""
        room = self.prompter.max_positions - (len(self.language.initial) or prompt.length) + 1
        if options.max_new_tokens <= room:
            return options
        least = min(options.min_new_tokens, room)
        return replace(options, max_new_tokens=room, min_new_tokens=least)

    def _decode(self, batch: _Encoded, options: GenerationOptions, first: int) -> list[CaptionResult]:
        """Captions of an encoded batch; rows that the context ends at different lengths go one by one."""
        fitted = [self._fit(prompt, options) for prompt in batch.prompts]
        rows = range(len(batch.prompts))
        together = [rows] if len(set(fitted)) == 1 else [range(row, row + 1) for row in rows]
        texts: list[Generated] = []
        for part in together:
            with batch.clock("prefill"):
                logits, state = self.language.prefill(*batch.part(part))
            with batch.clock("decode"):
                texts += generate(
                    logits,
                    state,
                    [self._seen(batch.prompts[row]) for row in part],
                    fitted[part[0]],
                    initial=self.language.initial,
                    stopped=self._stopped(options),
                    row_ids=[first + row for row in part],
                )
        timings = batch.clock.share(len(batch.images))
        return [
            self._result(image, text, generated, options, timings)
            for image, text, generated in zip(batch.images, batch.texts, texts, strict=True)
        ]

    def _result(
        self,
        image: ItemSource,
        prompt: str | None,
        generated: Generated,
        options: GenerationOptions,
        timings: dict[str, float],
    ) -> CaptionResult:
        text = self.tokenizer.decode(generated.tokens)
        for stop in options.stop:
            text = text.partition(stop)[0]
        seconds = (timings["prefill"] + timings["decode"]) / 1e3
        return CaptionResult(
            image=_path(image),
            prompt=prompt,
            text=text.strip(),
            tokens=generated.tokens,
            finish_reason=generated.finish_reason,
            timings_ms={stage: round(ms, 3) for stage, ms in timings.items()},
            tokens_per_s=round(len(generated.tokens) / seconds, 1) if seconds > 0 else 0.0,
        )

    def _stopped(self, options: GenerationOptions) -> Any:
        if not options.stop:
            return None
        return lambda ids: any(stop in self.tokenizer.decode(ids) for stop in options.stop)

    def _pieces(self, batch: _Encoded, options: GenerationOptions) -> Iterator[str]:
        logits, state = self.language.prefill(batch.prompts, batch.pictures)
        text, stops = TextStream(self.tokenizer), StopText(options.stop)
        for event in stream(
            logits,
            state,
            [self._seen(batch.prompts[0])],
            self._fit(batch.prompts[0], options),
            initial=self.language.initial,
            stopped=self._stopped(options),
        ):
            piece = stops.push(text.push(event.token))
            if piece:
                yield piece
        rest = stops.push(text.flush()) + stops.flush()
        if rest:
            yield rest


def _path(image: ItemSource) -> str | list[str | None] | None:
    if isinstance(image, (list, tuple)):
        return [os.fspath(one) if isinstance(one, (str, os.PathLike)) else None for one in image]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
