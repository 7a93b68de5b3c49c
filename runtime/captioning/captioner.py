"""The captioner: the public interface of the runtime.

    picture --preprocess--> pixel_values --vision--> image_embeds --bridge--> visual_tokens
    prompt  --tokenize---> token ids    ----------------------------------> inputs_embeds --prefill--> logits, KV cache
                                                                            token by token --decode--> ids --> text

The stages are in ``pipeline.py``, and ``assemble.py`` loads them. The runtime imports neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict, TypeVar, overload

from blip2edge.bundle.bundle import Bundle, load_whole
from blip2edge.bundle.hub.names import MAIN, HubName
from blip2edge.bundle.schema import BRIDGE, CROSS_KV, DECODER, TEXT_ENCODER, VISION, BackendName, DraftName
from blip2edge.errors import Blip2EdgeError, UsageError, option
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.backends.base import check_threads
from blip2edge.runtime.captioning.assemble import LoadedBundle, load_pipeline
from blip2edge.runtime.captioning.encoder import STAGES, EncodeBatch, FairLock, StageClock, checked_queries
from blip2edge.runtime.captioning.engine_check import KnownGoodRequest
from blip2edge.runtime.captioning.request import CaptionResult, Request, Span, check_text, listed, raising
from blip2edge.runtime.captioning.reuse.frames import ReusingEncoder
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.decoding.generated import TextPiece, Word, words_of
from blip2edge.runtime.decoding.logits_processors import check_ids, check_prompt_ids
from blip2edge.runtime.decoding.options import CaptionOptions, GenerationOptions, check_integer, merged
from blip2edge.runtime.images.video import Channels, ItemSource, in_rgb

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["STAGES", "CaptionResult", "Captioner"]

Item = TypeVar("Item")

IN_FLIGHT = 3  # batches at once: one in the decoder, one in the encoder, one waiting


class CaptionerOptions(TypedDict, total=False):
    """The keywords of :meth:`Captioner.load`."""

    backend: BackendName
    threads: int | None
    draft: DraftName
    limits: Limits
    require_signature: str | Path | None


class Captioner(LoadedBundle):
    """Captions pictures with a bundle.

    Make one with :meth:`load`, and close it after use:

        with Captioner.load("bundle/") as captioner:
            print(captioner.caption("dog.jpg").text)
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: BackendName = "auto",
        threads: int | None = None,
        draft: DraftName = "auto",
        limits: Limits = DEFAULT_LIMITS,
        queries: int | None = None,
    ) -> None:
        super().__init__(bundle, backend, threads)
        with self._loading():
            self.graphs.open_ahead((VISION, BRIDGE, TEXT_ENCODER, CROSS_KV, DECODER), after=DECODER)
            self._queries = checked_queries(bundle, queries)
            self.encoder, self.generator = load_pipeline(
                bundle, self.graphs, draft=draft, backend=self.graphs.backend, limits=limits
            )
        self.prompts, self.tokenizer = self.encoder.text.prompts, self.encoder.text.tokenizer

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: BackendName = "auto",
        threads: int | None = None,
        draft: DraftName = "auto",
        limits: Limits = DEFAULT_LIMITS,
        require_signature: str | Path | None = None,
    ) -> Captioner:
        """Opens a bundle and loads its graphs.

        Args:
            bundle: The directory that ``blip2edge export`` made, or ``hub:ORG/NAME[@REVISION]``; see
                :meth:`Bundle.open`.
            backend: Name of the backend that runs the graphs; ``auto`` for the default.
            threads: CPU threads that one operator uses; None for as many as there are cores.
            draft: The draft model of speculative decoding for calls that do not set the option ``draft``; one of
                :data:`blip2edge.bundle.schema.DRAFTS`.
            limits: The largest picture or video that is decoded; of its fields, ``FILE_LIMITS`` are used.
            require_signature: A public key; the bundle must have a signature that fits it. See :meth:`Bundle.open`.

        Raises:
            BundleError: The directory is not a bundle, a newer version wrote it, its files were changed, or it lacks
                the required signature.
            BackendError: The backend is not installed, or does not run here.
            UsageError: ``bundle`` is not a path, ``threads`` is below 1, or the bundle does not have this draft model.
        """
        check_threads(threads)
        return load_whole(
            bundle, lambda opened: cls(opened, backend, threads, draft, limits), require_signature=require_signature
        )

    @classmethod
    def from_pretrained(
        cls, repository: str, *, revision: str | None = None, **options: Unpack[CaptionerOptions]
    ) -> Captioner:
        """Downloads a bundle from the Hugging Face hub into the hub's cache, if it is not there yet, and loads it.

        Args:
            repository: ``ORG/NAME``.
            revision: A branch, a tag or a commit; None for ``main``.
            **options: As for :meth:`load`.

        Raises:
            BundleError: The repository cannot be downloaded, or is not a bundle; or for the reasons in :meth:`load`.
            BackendError, UsageError: For the reasons in :meth:`load`.
        """
        return cls.load(str(HubName(repository, revision or MAIN)), **options)

    def caption(
        self,
        image: ItemSource,
        *,
        prompt: str | None = None,
        channels: Channels = "rgb",
        **options: Unpack[CaptionOptions],
    ) -> CaptionResult:
        """Captions one picture.

        Args:
            image: A path, a Pillow picture or an array ``[H, W, 3]`` uint8. For a model of videos: a list of
                pictures, an array ``[F, H, W, 3]``, a folder of frames or a video file. For a model that reads
                several pictures (Flamingo): one picture, or a list.
            prompt: The beginning of the caption, which the model continues; for models that follow instructions
                (InstructBLIP, LLaVA) the instruction. None for the bundle's default. With several pictures, write
                ``<image>`` in the place of each picture, as in ``"<image>A cat.<image>A"``; without any
                ``<image>``, all pictures come before the text.
            channels: Order of the channels in arrays: ``"rgb"``, or ``"bgr"`` for frames of OpenCV. Files and Pillow
                pictures are not affected.
            **options: Fields of :class:`GenerationOptions`; the bundle's defaults replace missing ones.

        Raises:
            ImageError: The picture cannot be read.
            PromptError: The prompt is too long, contains tokens that the model does not accept, or is needed but empty.
            UsageError: An argument is of the wrong type, or an option is outside its range.
        """
        if self.graphs.closed:
            self._check_open()
        picture = image if channels == "rgb" else in_rgb(image, channels)
        result = next(self._batch(range(1), [picture], [prompt], self._checked([prompt], options)))
        if isinstance(result, Blip2EdgeError):
            raise result
        return result

    def ask(
        self, image: ItemSource, question: str, *, channels: Channels = "rgb", **options: Unpack[CaptionOptions]
    ) -> CaptionResult:
        """Answers a question about a picture, in the question template of the model's family.

        Args:
            image: As in :meth:`caption`.
            question: The question, without the template.
            channels: As in :meth:`caption`.
            **options: As in :meth:`caption`.

        Raises:
            ImageError, PromptError, UsageError: As in :meth:`caption`.
        """
        check_text("question", question)
        return self.caption(image, prompt=self.prompts.question(question), channels=channels, **options)

    @overload
    def caption_many(
        self,
        images: Iterable[ItemSource],
        *,
        prompts: Sequence[str | None] | None = None,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: Literal[False] = False,
        **options: Unpack[CaptionOptions],
    ) -> Generator[CaptionResult, None, None]: ...

    @overload
    def caption_many(
        self,
        images: Iterable[ItemSource],
        *,
        prompts: Sequence[str | None] | None = None,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: bool,
        **options: Unpack[CaptionOptions],
    ) -> Generator[CaptionResult | Blip2EdgeError, None, None]: ...

    def caption_many(
        self,
        images: Iterable[ItemSource],
        *,
        prompts: Sequence[str | None] | None = None,
        batch_size: int = 1,
        channels: Channels = "rgb",
        return_exceptions: bool = False,
        **options: Unpack[CaptionOptions],
    ) -> Generator[CaptionResult | Blip2EdgeError, None, None]:
        """Captions pictures in order; encodes later pictures while earlier pictures are decoded (:meth:`scheduler`).

        Args:
            images: As in :meth:`caption`.
            prompts: A list with the prompt of each picture; None for the bundle's default prompt for all pictures.
            batch_size: Number of pictures that are decoded together; results do not depend on it.
            channels: As in :meth:`caption`.
            return_exceptions: Whether to yield an error in place of the result of its picture, and to continue with
                the next picture; otherwise the first error is raised and ends the iterator.
            **options: As in :meth:`caption`.

        Yields:
            One result for each picture; with ``return_exceptions``, a result or an error.

        Raises:
            ImageError, PromptError: As in :meth:`caption`; raised after the results of the pictures before.
            UsageError: As in :meth:`caption`; raised by the call itself, before the first result.
        """
        self._check_open()
        pictures = [in_rgb(image, channels) for image in listed("images", images)]
        texts: list[str | None] = [None] * len(pictures) if prompts is None else listed("prompts", prompts)
        if len(texts) != len(pictures):
            raise UsageError(
                f"expected one prompt for each of the {len(pictures)} pictures, got {len(texts)}",
                field="prompts",
            )
        check_integer("batch_size", batch_size, 1)
        generation = self._checked(texts, options)
        compute = self._scheduled if len(pictures) > batch_size and (os.cpu_count() or 1) > 1 else self._in_turn
        results = self._while_open(compute(pictures, texts, generation, batch_size))
        return results if return_exceptions else raising(results)

    def stream(
        self,
        image: ItemSource,
        *,
        prompt: str | None = None,
        channels: Channels = "rgb",
        **options: Unpack[CaptionOptions],
    ) -> Generator[TextPiece, None, None]:
        """Yields the caption of one picture piece by piece, as it is generated.

        Joined together, the pieces are the text that :meth:`caption` returns. The attribute ``tokens`` of a piece has
        the tokens of the piece. Arguments and errors are those of :meth:`caption`. With beam search or
        ``abstain_below``, a text cannot be streamed (UsageError).
        """
        self._check_open()
        generation = self._checked([prompt], options)
        generation.check_stream()
        batch = self.encoder([in_rgb(image, channels)], [prompt], StageClock(), generation.queries)
        return self._while_open(self.generator.pieces(batch, generation))

    def words(self, result: CaptionResult) -> tuple[Word, ...]:
        """Returns the words of ``result.text``, each with the lowest log-probability of its tokens."""
        return words_of(self.tokenizer, result.tokens[-result.new_tokens :], result.token_logprobs, result.text)

    def scheduler(
        self,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        trace: Callable[[Span], None] | None = None,
        encoder: EncodeBatch | None = None,
        graph_lock: FairLock | None = None,
        known_good: KnownGoodRequest | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> Scheduler:
        """Makes a scheduler, which batches requests that arrive at any time; close the scheduler after use.

        Args:
            max_batch: Largest number of rows that are decoded together; reduced to what the decoder's engine supports.
            max_waiting: Largest number of requests that wait to be encoded.
            trace: Called with start and end of each stage (:class:`Span`); the function must return quickly.
            encoder: Used in place of the captioner's own encoder, for example one of :meth:`reusing`.
            graph_lock: A lock that several schedulers share, so that their graphs run one at a time. If None, the
                scheduler makes a lock if two graphs at once would use more threads than there are cores.
            known_good: A test request after an unexpected exception; see :class:`Scheduler`.
            on_failure: Called with the error when the scheduler has closed itself.
        """
        self._check_open()
        most = self.generator.language.decoder.max_rows
        return Scheduler(
            encoder or self.encoder,
            self.generator,
            max_batch=max_batch if most is None else min(max_batch, most),
            max_waiting=max_waiting,
            graph_lock=graph_lock or (FairLock() if self.graphs.takes_all_cores else None),
            trace=trace,
            known_good=known_good,
            on_failure=on_failure,
        )

    def reusing(self, below: float) -> ReusingEncoder:
        """Makes an encoder that reuses the visual tokens of the last picture if the difference is less than ``below``.

        See :class:`ReusingEncoder` for the measure of the difference.
        """
        return ReusingEncoder(self.encoder, below, self.generator.language.context)

    def options(self, **options: Unpack[CaptionOptions]) -> GenerationOptions:
        """Returns the bundle's default options with the given fields replaced.

        Raises:
            UsageError: A field is unknown, or a value is outside its range.
        """
        known = GenerationOptions.__dataclass_fields__
        unknown = sorted(options.keys() - known.keys())
        if unknown:
            similar = " or ".join(map(option, get_close_matches(unknown[0], known)))
            fix = f"use {similar}" if similar else "the options are the fields of GenerationOptions"
            raise UsageError(f"there is no option {unknown[0]}", fix, field=unknown[0])
        manifest = self.bundle.manifest
        defaults = {**manifest.generation, "draft": self.generator.drafts.default, "queries": self._queries}
        chosen = GenerationOptions(**merged(defaults, options))
        if chosen.processed:
            check_ids(chosen, manifest.vocab_size)
            check_prompt_ids(chosen, given=self.prompts.spec.gives_ids)
        if chosen.draft == "itg":
            self.generator.drafts.check(chosen)
        return replace(chosen, queries=checked_queries(self.bundle, chosen.queries))

    def _checked(self, prompts: Sequence[str | None], options: CaptionOptions) -> GenerationOptions:
        """Checks the prompts and the options of a call; returns the options with the bundle's defaults."""
        generation = self.options(**options)
        for prompt in prompts:
            if prompt is not None:
                check_text("prompt", prompt)
            if generation.abstain_below is not None:
                self.generator.confidence.check(generation, prompt)
        return generation

    def _while_open(self, items: Generator[Item, None, None]) -> Generator[Item, None, None]:
        """Yields the items; raises UsageError if the captioner was closed before the next item is asked for."""
        self._check_open()
        with closing(items):
            for item in items:
                yield item
                self._check_open()

    def _in_turn(
        self, images: list[ItemSource], texts: list[str | None], options: GenerationOptions, batch_size: int
    ) -> Generator[CaptionResult | Blip2EdgeError, None, None]:
        """Computes the results batch by batch in the calling thread, and yields them."""
        for first in range(0, len(images), batch_size):
            yield from self._batch(range(first, min(first + batch_size, len(images))), images, texts, options)

    def _batch(
        self, rows: range, images: list[ItemSource], texts: list[str | None], options: GenerationOptions
    ) -> Generator[CaptionResult | Blip2EdgeError, None, None]:
        """Yields the results of a batch; if the batch fails, runs each picture alone and yields result or error."""
        clock = StageClock()
        try:
            span = slice(rows.start, rows.stop)
            batch = self.encoder(images[span], texts[span], clock, options.queries)
        except Blip2EdgeError as error:
            if len(rows) == 1:
                yield error
                return
            for row in rows:
                yield from self._batch(range(row, row + 1), images, texts, options)
            return
        generated = self.generator.complete(batch, options, rows, clock)
        stage_ms = clock.share(len(rows))
        for row, prompt, text in zip(rows, batch.prompts, generated, strict=True):
            yield self.generator.result(images[row], texts[row], prompt.length, text, options, stage_ms)

    def _scheduled(
        self, images: list[ItemSource], texts: list[str | None], options: GenerationOptions, batch_size: int
    ) -> Generator[CaptionResult | Blip2EdgeError, None, None]:
        """Yields the results in order, while the scheduler computes the results of later pictures."""
        with self.scheduler(max_batch=batch_size, max_waiting=IN_FLIGHT * batch_size) as scheduler:
            coming: deque[Request] = deque()
            for row, (image, text) in enumerate(zip(images, texts, strict=True)):
                if len(coming) == IN_FLIGHT * batch_size:
                    yield coming.popleft().outcome()
                coming.append(scheduler.submit(image, options, prompt=text, row=row))
            while coming:
                yield coming.popleft().outcome()
