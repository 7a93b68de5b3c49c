"""The stages of a caption, for a batch of pictures. :class:`Captioner` and :class:`Scheduler` use them.

    Encoder         images, prompts --preprocess--> pixel_values, token ids --vision, bridge--> EncodedBatch
    TextGenerator   EncodedBatch --prefill--> logits, KV cache --decode--> token ids

A :class:`StageClock` (``request.py``) measures each stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import INTERLEAVED
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.captioning.request import ABSTAINED, CaptionResult, StageClock, TextAnswer
from blip2edge.runtime.decoding.beam_search import beam_search
from blip2edge.runtime.decoding.confidence import Confidence
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.decoding.generate import Generation, GenerationBatch, generate
from blip2edge.runtime.decoding.generated import Generated, TextPiece, TextTokens
from blip2edge.runtime.decoding.language_model import LanguageModel
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.state import RowState
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.runtime.images.video import ItemSource, images_of_each, pictures_of
from blip2edge.runtime.text.prompt import InstructionTokenizer, Prompt, PromptBuilder, PromptText, pack_images
from blip2edge.runtime.text.tokenizer import TextPieces, Tokenizer


@dataclass(frozen=True)
class EncodedBatch:
    """The language model's inputs for a batch of B rows.

    Attributes:
        prompts: The prompt of each row.
        pictures: Outputs of vision encoder and bridge by name: ``image_embeds [B, P, Dv]``, and
            ``visual_tokens [B, Q, D]`` if there is a bridge. If a row has several pictures, they are concatenated along
            axis 1.
        counts: Number of pictures of each row.
    """

    prompts: list[Prompt]
    pictures: dict[str, Array]
    counts: list[int]

    def part(self, rows: Sequence[int]) -> EncodedBatch:
        """Returns a batch of the rows with these indices; padding that none of them needs is removed."""
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
    """A batch after preprocessing, before any graph is run.

    Attributes:
        prompts: The prompt of each row.
        counts: Number of pictures of each row.
        pixels: ``pixel_values [N, 3, H, W]`` of all pictures, row by row.
        instruction: The bridge's text inputs by name; empty if the bridge takes no instruction.
    """

    prompts: list[Prompt]
    counts: list[int]
    pixels: Array
    instruction: dict[str, Array]

    def encoded(self, outputs: Mapping[str, Array]) -> EncodedBatch:
        """Makes the encoded batch from ``outputs`` of vision encoder and bridge for the N pictures, by name."""
        if max(self.counts) > 1:
            outputs = {name: pack_images(array, self.counts) for name, array in outputs.items()}
        return EncodedBatch(self.prompts, dict(outputs), self.counts)


EncodeBatch = Callable[[Sequence[ItemSource], Sequence[PromptText | None], StageClock], EncodedBatch]
"""Function that encodes the images and prompts of some rows as one batch."""


@dataclass(frozen=True)
class ImageParts:
    """The parts that encode images. ``pixels_dtype`` is the dtype of ``vision``'s input; ``bridge`` is optional.

    ``limits`` is the largest picture or video that is decoded.
    """

    preprocessing: Preprocessing
    pixels_dtype: np.dtype[np.generic]
    vision: Session
    bridge: Session | None
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class TextParts:
    """The parts that encode prompts. ``instructions`` is None unless the bridge takes an instruction."""

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
        self, images: Sequence[ItemSource], texts: Sequence[PromptText | None], clock: StageClock
    ) -> EncodedBatch:
        """Encodes a batch.

        Args:
            images: As ``Captioner.caption`` takes them, one item a row.
            texts: The prompt of each row; None for the bundle's default.
            clock: Measures the stages.

        Raises:
            ImageError: A picture cannot be read.
            PromptError: A prompt does not fit.
            UsageError: A row has several pictures, and the model takes one.
        """
        batch = self.prepare(images, texts, clock)
        outputs = self.run_bridge(self.run_vision(batch.pixels, clock), batch.instruction, clock)
        return batch.encoded(outputs)

    def prepare(
        self, images: Sequence[ItemSource], texts: Sequence[PromptText | None], clock: StageClock
    ) -> PreparedBatch:
        """Computes the pixel values of the pictures and the token ids of the prompts; ``clock`` measures the time."""
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
            return self.prepared(texts, counts, pixels)

    def prepared(self, texts: Sequence[PromptText | None], counts: list[int], pixels: Array) -> PreparedBatch:
        """Makes the batch of pictures that are preprocessed: ``counts`` of each row, ``pixels`` of all of them."""
        filled = [self.text.prompts.with_default(text) for text in texts]
        instruction = self.text.instructions(filled) if self.text.instructions is not None else {}
        prompts = [self.text.prompts(text, count) for text, count in zip(filled, counts, strict=True)]
        return PreparedBatch(prompts, counts, pixels.astype(self.images.pixels_dtype, copy=False), instruction)

    def run_vision(self, pixels: Array, clock: StageClock) -> dict[str, Array]:
        """Runs the vision encoder on ``pixel_values [N, 3, H, W]``; returns its outputs by name."""
        with clock("vision"):
            return self.images.vision.run({"pixel_values": pixels})

    def run_bridge(
        self, outputs: Mapping[str, Array], instruction: Mapping[str, Array], clock: StageClock
    ) -> dict[str, Array]:
        """Runs the bridge, if there is one, on the vision encoder's outputs and the instruction.

        Returns:
            The outputs of vision encoder and bridge by name.
        """
        if self.images.bridge is None:
            return dict(outputs)
        with clock("bridge"):
            inputs = {"image_embeds": outputs["image_embeds"], **instruction}
            return {**outputs, **self.images.bridge.run(inputs, self._bridge_outputs)}


class TextGenerator:
    """Generates texts from encoded batches, with the language model, its tokenizer and the draft models.

    Args:
        language: The loaded language model.
        tokenizer: The language model's tokenizer.
        max_positions: Longest context of the language model, in tokens.
        drafts: Chooses the draft model of each text.
        confidence: Computes how sure a text is.
    """

    def __init__(
        self,
        language: LanguageModel,
        tokenizer: Tokenizer,
        max_positions: int,
        drafts: DraftSelector,
        confidence: Confidence,
    ) -> None:
        self.language = language
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.drafts = drafts
        self.confidence = confidence

    def prefill(self, batch: EncodedBatch, clock: StageClock) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts; returns logits ``[B, V]`` of the first token, and the decoder's state."""
        with clock("prefill"):
            return self.language.prefill(batch.prompts, batch.pictures)

    def limited(self, prompt: Prompt, options: GenerationOptions) -> GenerationOptions:
        """Reduces the length limits to the context that the prompt leaves; the last token needs no slot."""
        room = self.max_positions - (len(self.language.initial) or prompt.length) + 1
        if options.max_new_tokens <= room:
            return options
        least = min(options.min_new_tokens, room)
        return replace(options, max_new_tokens=room, min_new_tokens=least)

    def begin(
        self,
        batch: EncodedBatch,
        row: int,
        options: GenerationOptions,
        vocabulary: int,
        number: int,
    ) -> Generation:
        """Makes the row of a ``GenerationBatch`` for one text.

        Args:
            batch: An encoded batch.
            row: The text's row in it.
            options: The text's options; ``num_beams`` is 1.
            vocabulary: V, the number of logits.
            number: Number that selects the text's random stream.
        """
        prompt = batch.prompts[row]
        return Generation(
            self._prompt_ids(prompt),
            self.limited(prompt, options),
            vocabulary,
            initial=self.language.initial,
            stopped=self._stopped(options),
            number=number,
            speculator=self.drafts.speculator(options, prompt.ids, batch.pictures, row),
        )

    def complete(
        self,
        batch: EncodedBatch,
        options: GenerationOptions,
        numbers: Sequence[int],
        clock: StageClock,
        *,
        texts: int = 1,
    ) -> list[Generated]:
        """Generates the texts of a batch.

        Args:
            batch: B rows.
            options: How to generate, the same for all rows.
            numbers: For each text, the number that selects its random stream.
            clock: Measures prefill and decode.
            texts: N, the number of texts of each row: of a beam search the best ones, otherwise drawn one by one.

        Returns:
            ``B * N`` texts, row by row.
        """
        if options.num_beams > 1:
            return self._search(batch, options, clock, texts)
        logits, state = self.prefill(batch, clock)
        with clock("decode"):
            places = np.repeat(np.arange(len(batch.prompts)), texts)
            if texts > 1:
                state.select(places)
            chosen = zip(places.tolist(), numbers, strict=True)
            rows = [self.begin(batch, at, options, logits.shape[-1], number) for at, number in chosen]
            return generate(logits[places], state, rows)

    def _search(self, batch: EncodedBatch, options: GenerationOptions, clock: StageClock, best: int) -> list[Generated]:
        """Beam search; rows whose texts reach the end of the context at different lengths are run separately."""
        limited = [self.limited(prompt, options) for prompt in batch.prompts]
        rows = range(len(batch.prompts))
        groups = [list(rows)] if len(set(limited)) == 1 else [[row] for row in rows]
        texts: list[Generated] = []
        for group in groups:
            part = batch.part(group)
            logits, state = self.prefill(part, clock)
            prompts = [self._prompt_ids(prompt) for prompt in part.prompts]
            with clock("decode"):
                texts += beam_search(
                    logits,
                    state,
                    prompts,
                    limited[group[0]],
                    initial=self.language.initial,
                    stopped=self._stopped(options),
                    best=best,
                )
        return texts

    def pieces(self, batch: EncodedBatch, options: GenerationOptions) -> Iterator[TextPiece]:
        """Yields the pieces of a text as they are generated; ``batch`` has one row."""
        logits, state = self.prefill(batch, StageClock())
        row, decoding = self.begin(batch, 0, options, logits.shape[-1], 0), GenerationBatch()
        decoding.join(logits, state, [row])
        text, tokens = TextPieces(self.tokenizer, options.stop), TextTokens(self.tokenizer)
        known = (row.generated, row.token_logprobs, row.likeliest)  # lists that grow
        while decoding.rows:
            decoding.step()
            if piece := text.push(row.generated[-1]):
                yield TextPiece(piece, tokens.take(*known, piece))
        if rest := text.flush():
            yield TextPiece(rest, tokens.rest(*known, rest))

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt's ids that the decoder processes: none if a text encoder takes the prompt."""
        return [] if self.language.initial else prompt.ids

    def _stopped(self, options: GenerationOptions) -> Callable[[Sequence[int]], bool] | None:
        if not options.stop:
            return None

        def stopped(ids: Sequence[int]) -> bool:
            text = self.tokenizer.decode(ids)
            return any(stop in text for stop in options.stop)

        return stopped

    def text(self, generated: Generated, options: GenerationOptions) -> str:
        """The text of generated tokens: cut before the first stop string, without surrounding spaces."""
        text = self.tokenizer.decode(generated.tokens)
        for stop in options.stop:
            text = text.partition(stop)[0]
        return text.strip()

    def answer(self, generated: Generated, options: GenerationOptions, prompt: PromptText | None) -> TextAnswer:
        """The text and its confidence; the text is empty if the confidence is below ``options.abstain_below``."""
        confidence = self.confidence.of(generated, options, prompt)
        if options.abstain_below is not None and (confidence is None or confidence < options.abstain_below):
            return TextAnswer("", ABSTAINED, confidence)
        return TextAnswer(self.text(generated, options), generated.finish_reason, confidence)

    def result(
        self,
        image: ItemSource,
        prompt: PromptText | None,
        prompt_tokens: int,
        generated: Generated,
        options: GenerationOptions,
        stage_ms: Mapping[str, float],
    ) -> CaptionResult:
        """Makes the result for one picture.

        Args:
            image: The picture as the user gave it.
            prompt: The prompt as the user gave it.
            prompt_tokens: Length of the tokenized prompt, :attr:`Prompt.length`.
            generated: The generated tokens.
            options: The options of the request; the caption is cut before the first of their ``stop`` strings.
            stage_ms: Milliseconds by stage.
        """
        seconds = (stage_ms["prefill"] + stage_ms["decode"]) / 1e3
        new_tokens = len(generated.tokens) - len(self.language.initial)
        answer, timings = self.answer(generated, options, prompt), {**stage_ms, "total": sum(stage_ms.values())}
        return CaptionResult(
            image=_path(image),
            prompt=None if prompt is None else str(prompt),
            text=answer.text,
            tokens=generated.tokens,
            finish_reason=answer.finish_reason,
            timings_ms={stage: round(ms, 3) for stage, ms in timings.items()},
            tokens_per_s=round(new_tokens / seconds, 1) if seconds > 0 else 0.0,
            tokens_per_pass=round(generated.tokens_per_pass, 3),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            token_logprobs=generated.token_logprobs,
            confidence=answer.confidence,
            likeliest=generated.likeliest,
        )


def _path(image: ItemSource) -> str | list[str | None] | None:
    if isinstance(image, (list, tuple)):
        return [os.fspath(one) if isinstance(one, (str, os.PathLike)) else None for one in image]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
