"""Generates texts from encoded pictures and prompts, which ``encoder.py`` makes.

    EncodedBatch --prefill--> logits, KV cache --decode--> token ids

A :class:`StageClock` (``request.py``) measures each stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.captioning.encoder import EncodedBatch
from blip2edge.runtime.captioning.request import ABSTAINED, CaptionResult, StageClock, TextAnswer
from blip2edge.runtime.decoding.beam_search import beam_search
from blip2edge.runtime.decoding.confidence import Confidence
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.decoding.generate import Generation, GenerationBatch, generate
from blip2edge.runtime.decoding.generated import Generated, TextPiece, TextTokens
from blip2edge.runtime.decoding.language_model import LanguageModel
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.state import RowState
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import Prompt, PromptText
from blip2edge.runtime.text.tokenizer import TextPieces, Tokenizer


class TextGenerator:
    """Generates texts from encoded batches, with the language model, its tokenizer and the draft models.

    Args:
        language: The loaded language model.
        tokenizer: The language model's tokenizer.
        max_positions: Longest context of the language model, in tokens.
        drafts: Chooses the draft model of each text.
        confidence: Computes the probability that a text is right.
        queries: Number of visual tokens of each picture, if a request sets no other number; None without a bridge.
    """

    def __init__(
        self,
        language: LanguageModel,
        tokenizer: Tokenizer,
        max_positions: int,
        drafts: DraftSelector,
        confidence: Confidence,
        queries: int | None = None,
    ) -> None:
        self.language = language
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.drafts = drafts
        self.confidence = confidence
        self.queries = queries

    def prefill(self, batch: EncodedBatch, clock: StageClock) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts; returns logits ``[B, V]`` of the first token, and the decoder's state."""
        with clock("prefill"):
            return self.language.prefill(batch.prompts, batch.pictures)

    def limited(self, prompt: Prompt, options: GenerationOptions) -> GenerationOptions:
        """Returns the options with ``max_new_tokens`` lowered so that prompt and text fit the model's context.

        The last token of a text needs no slot of the KV cache, so one more token fits.
        """
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
        """Makes the object that holds one text while it is generated: a row of a ``GenerationBatch``.

        Args:
            batch: An encoded batch.
            row: The text's row in the batch.
            options: The text's options; ``num_beams`` is 1.
            vocabulary: V, the number of logits.
            number: Number of the text's random stream: the same seed and number give the same random numbers.
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
            numbers: For each text, the number of its random stream; see :meth:`begin`.
            clock: Measures prefill and decode.
            texts: N, the number of texts of each row: with beam search the N best texts, with sampling N drawn texts.

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
        """Runs beam search on all rows together, or on each row alone if their limits of length differ."""
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

    def pieces(self, batch: EncodedBatch, options: GenerationOptions) -> Generator[TextPiece, None, None]:
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
        """Returns the ids of the prompt that the decoder processes: none if a text encoder processes the prompt."""
        return [] if self.language.initial else prompt.ids

    def _stopped(self, options: GenerationOptions) -> Callable[[Sequence[int]], bool] | None:
        if not options.stop:
            return None

        def stopped(ids: Sequence[int]) -> bool:
            text = self.tokenizer.decode(ids)
            return any(stop in text for stop in options.stop)

        return stopped

    def text(self, generated: Generated, options: GenerationOptions) -> str:
        """Returns the text of generated tokens, cut before the first stop string and without surrounding spaces."""
        text = self.tokenizer.decode(generated.tokens)
        for stop in options.stop:
            text = text.partition(stop)[0]
        return text.strip()

    def answer(self, generated: Generated, options: GenerationOptions, prompt: PromptText | None) -> TextAnswer:
        """Returns text and confidence; the text is empty if its confidence is below ``options.abstain_below``.

        With 0, no text is replaced, also if it has no confidence because it was cut.
        """
        confidence = self.confidence.of(generated, options, prompt)
        if options.abstain_below and (confidence is None or confidence < options.abstain_below):
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
            queries=options.queries or self.queries,
        )


def _path(image: ItemSource) -> str | list[str | None] | None:
    if isinstance(image, (list, tuple)):
        return [os.fspath(one) if isinstance(one, (str, os.PathLike)) else None for one in image]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None
