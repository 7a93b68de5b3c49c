"""The language model of a bundle, and the generation of texts from encoded pictures and prompts.

    EncodedBatch --prefill--> logits, KV cache --decode--> token ids

``encoder.py`` makes the encoded batches. A :class:`StageClock` measures each stage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CROSS_MASK
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.captioning.encoder import EncodedBatch, StageClock
from blip2edge.runtime.captioning.request import ABSTAINED, CaptionResult, TextAnswer
from blip2edge.runtime.decoding.beam_search import beam_search
from blip2edge.runtime.decoding.confidence import Confidence
from blip2edge.runtime.decoding.draft_model import DraftSelector
from blip2edge.runtime.decoding.generate import Generation, GenerationBatch, generate
from blip2edge.runtime.decoding.generated import Generated, TextPiece, TextTokens
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.state import Decoder, RowState
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import Prompt, PromptText, cross_attention_mask
from blip2edge.runtime.text.tokenizer import TextPieces, Tokenizer


class LanguageModel:
    """A language model: the decoder, and the graphs that compute its inputs from prompts and pictures.

    Args:
        decoder: The decoder graph with its KV cache.
        initial: Ids that every text begins with (encoder-decoder models); empty if a text continues its prompt.
    """

    def __init__(self, decoder: Decoder, initial: tuple[int, ...] = ()) -> None:
        self.decoder = decoder
        self.initial = initial

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """Computes the keys and values of cross-attention to the pictures, by name; empty without cross-attention.

        Keys and values do not depend on the prompts. If they are passed to :meth:`prefill` in ``pictures``, they
        are not computed again.
        """
        del pictures
        return {}

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts of a batch.

        Args:
            prompts: The prompt of each row.
            pictures: Outputs of vision encoder and bridge by name: ``image_embeds [B, P, Dv]`` at P positions and, if
                there is a bridge, Q visual tokens ``visual_tokens [B, Q, D]``. The tensors of :meth:`context` may be
                added, so that they are not computed again.

        Returns:
            Logits ``[B, V]`` of the first token, and the decoder's state.
        """
        raise NotImplementedError


class DecoderOnly(LanguageModel):
    """A language model that continues its prompt; in BLIP and Flamingo it reads the pictures by cross-attention.

    Args:
        decoder: The decoder.
        cross_kv: The loaded ``cross_kv`` graph; None without cross-attention.
        source: Name of the input of the ``cross_kv`` graph: ``image_embeds`` or ``visual_tokens``.
    """

    def __init__(self, decoder: Decoder, cross_kv: Session | None, source: str) -> None:
        super().__init__(decoder)
        self.cross_kv = cross_kv
        self.source = source

    def context(self, pictures: Mapping[str, Array]) -> dict[str, Array]:
        """Computes the cross-attention keys and values; see :class:`LanguageModel`."""
        if self.cross_kv is None:
            return {}
        names = self.cross_kv.output_names
        if all(name in pictures for name in names):
            return {name: pictures[name] for name in names}
        return self.cross_kv.run({self.source: pictures[self.source]})

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the prompts; returns logits ``[B, V]`` and the decoder's state; see :class:`LanguageModel`."""
        context = self.context(pictures)
        if prompts[0].attends_to:
            most = max(prompt.images for prompt in prompts)
            keys = pictures[self.source].shape[1]
            context[CROSS_MASK] = cross_attention_mask([prompt.attends_to for prompt in prompts], most, keys)
        return self.decoder.prefill(_embedded(self.decoder.table, prompts, pictures), context)


class EncoderDecoder(LanguageModel):
    """A text encoder and a decoder (T5): the prompt is the encoder's input, and the decoder starts a new text.

    Args:
        decoder: The decoder; it cross-attends to the text encoder's outputs.
        encoder: The loaded ``text_encoder`` graph.
        takes: Names of the encoder's inputs: ``inputs_embeds``, or ``input_ids`` if the graph has its own token
            embeddings; also ``image_embeds`` if the encoder cross-attends to the picture.
        cross_kv: The loaded ``cross_kv`` graph.
        start_token_id: First id of every text.
    """

    def __init__(
        self,
        decoder: Decoder,
        encoder: Session,
        takes: Sequence[str],
        cross_kv: Session,
        start_token_id: int,
    ) -> None:
        super().__init__(decoder, (start_token_id,))
        self.encoder = encoder
        self.takes = takes
        self.cross_kv = cross_kv

    def prefill(self, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> tuple[NDArray[np.float32], RowState]:
        """Runs the text encoder on the prompts, and the decoder on the start token; see :class:`LanguageModel`."""
        batch = len(prompts)
        rows = (
            [np.array(prompt.ids, np.int64) for prompt in prompts]
            if "input_ids" in self.takes
            else _embedded(self.decoder.table, prompts, pictures)
        )
        longest = max(map(len, rows))
        dtype = np.dtype(np.int64) if "input_ids" in self.takes else self.decoder.embeds_dtype
        padded = np.zeros((batch, longest, *rows[0].shape[1:]), dtype)
        mask = np.zeros((batch, longest), np.int64)
        for row, values in enumerate(rows):  # padded on the right: the encoder's slots are positions
            padded[row, : len(values)] = values
            mask[row, : len(values)] = 1
        given = {"inputs_embeds": padded, "input_ids": padded, "attention_mask": mask, **pictures}
        states = self.encoder.run({name: given[name] for name in self.takes})["encoder_states"]
        context = {**self.cross_kv.run({"encoder_states": states}), "cross_attention_mask": mask}
        start = self.decoder.table.rows(self.initial)
        return self.decoder.prefill([start] * batch, context)


def _embedded(table: TokenTable, prompts: Sequence[Prompt], pictures: Mapping[str, Array]) -> list[Array]:
    """Returns each row's embedded prompt: S_i vectors ``[S_i, D]``, in which visual tokens replace the placeholders."""
    visual = pictures.get("visual_tokens")
    return [prompt.embed(table, None if visual is None else visual[row]) for row, prompt in enumerate(prompts)]


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
        prompt, speculator = batch.prompts[row], None
        if options.draft != "none":
            speculator = self.drafts.speculator(options, prompt.ids, batch.pictures, row)
        return Generation(
            self._prompt_ids(prompt),
            self.limited(prompt, options),
            vocabulary,
            initial=self.language.initial,
            stopped=self._stopped(options),
            number=number,
            speculator=speculator,
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

        A text that was cut at the length limit may have no confidence; it then becomes empty too. If ``abstain_below``
        is 0 or None, no text becomes empty.
        """
        confidence = self.confidence.of(generated, options, prompt) if self.confidence.maps else None
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
