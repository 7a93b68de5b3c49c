"""The half behind the bridge: visual tokens and prompts to generated ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.drafting import Drafting
from blip2edge.runtime.encoder import Clock, Encoded
from blip2edge.runtime.generate import Row, generate, stream
from blip2edge.runtime.language import LanguageModel
from blip2edge.runtime.options import Generated, GenerationOptions, RowState
from blip2edge.runtime.prompt import Prompt
from blip2edge.runtime.speculate import Ahead
from blip2edge.runtime.tokenizer import StopText, TextStream, Tokenizer


class Completer:
    """The language model with what it takes to write a text: the tokenizer, and where the context ends.

    Args:
        language: The loaded language model.
        tokenizer: Its tokenizer.
        max_positions: Longest context.
        drafting: Makes what reads ahead in a text.
    """

    def __init__(
        self, language: LanguageModel, tokenizer: Tokenizer, max_positions: int, drafting: Drafting
    ) -> None:
        self.language = language
        self.tokenizer = tokenizer
        self.max_positions = max_positions
        self.drafting = drafting

    def prefill(self, batch: Encoded, clock: Clock) -> tuple[NDArray[np.float32], RowState]:
        """Reads the prompts: the logits ``[B, V]`` behind them, and the state to go on from."""
        with clock("prefill"):
            return self.language.prefill(batch.prompts, batch.pictures)

    def fitted(self, prompt: Prompt, options: GenerationOptions) -> GenerationOptions:
        """Ends a text where the context does; the last token is generated and not read."""
        room = self.max_positions - (len(self.language.initial) or prompt.length) + 1
        if options.max_new_tokens <= room:
            return options
        least = min(options.min_new_tokens, room)
        return replace(options, max_new_tokens=room, min_new_tokens=least)

    def row(
        self, batch: Encoded, place: int, options: GenerationOptions, vocabulary: int, number: int
    ) -> Row:
        """A text about to begin, for a ``Decoding``.

        Args:
            batch: What it goes on from.
            place: Which of the batch's rows.
            options: Without beams.
            vocabulary: Number of logits V.
            number: Of its random stream.
        """
        prompt = batch.prompts[place]
        return Row(
            self._seen(prompt),
            self.fitted(prompt, options),
            vocabulary,
            initial=self.language.initial,
            stopped=self._stopped(options),
            number=number,
            ahead=self.drafting.ahead(options, prompt.ids, batch.pictures, place),
        )

    def complete(
        self, batch: Encoded, options: GenerationOptions, numbers: Sequence[int], clock: Clock
    ) -> list[Generated]:
        """The texts of a batch; rows that the context ends at different lengths go one by one.

        Args:
            batch: B rows.
            options: The same for all.
            numbers: Of their random streams.
            clock: Told what prefill and decoding take.
        """
        fitted = [self.fitted(prompt, options) for prompt in batch.prompts]
        rows = range(len(batch.prompts))
        together = [list(rows)] if len(set(fitted)) == 1 else [[row] for row in rows]
        texts: list[Generated] = []
        for chosen in together:
            part = batch.part(chosen)
            logits, state = self.prefill(part, clock)
            with clock("decode"):
                texts += generate(
                    logits,
                    state,
                    [self._seen(prompt) for prompt in part.prompts],
                    fitted[chosen[0]],
                    initial=self.language.initial,
                    stopped=self._stopped(options),
                    row_ids=[numbers[row] for row in chosen],
                    ahead=self._ahead(part, options),
                )
        return texts

    def pieces(self, batch: Encoded, options: GenerationOptions) -> Iterator[str]:
        """The pieces of one row's text as they are decided."""
        logits, state = self.prefill(batch, Clock())
        prompt = batch.prompts[0]
        text = Pieces(self.tokenizer, options)
        for event in stream(
            logits,
            state,
            [self._seen(prompt)],
            self.fitted(prompt, options),
            initial=self.language.initial,
            stopped=self._stopped(options),
            ahead=self._ahead(batch, options),
        ):
            piece = text.push(event.token)
            if piece:
                yield piece
        rest = text.flush()
        if rest:
            yield rest

    def _ahead(self, batch: Encoded, options: GenerationOptions) -> list[Ahead | None]:
        """What reads ahead in each row."""
        return [
            self.drafting.ahead(options, prompt.ids, batch.pictures, row)
            for row, prompt in enumerate(batch.prompts)
        ]

    def _seen(self, prompt: Prompt) -> list[int]:
        """A prompt's ids as the decoder has seen them: none where an encoder reads the prompt."""
        return [] if self.language.initial else prompt.ids

    def _stopped(self, options: GenerationOptions) -> Callable[[Sequence[int]], bool] | None:
        if not options.stop:
            return None

        def stopped(ids: Sequence[int]) -> bool:
            text = self.tokenizer.decode(ids)
            return any(stop in text for stop in options.stop)

        return stopped


class Pieces:
    """A text as it comes: whole characters only, and nothing of a stop text."""

    def __init__(self, tokenizer: Tokenizer, options: GenerationOptions) -> None:
        self._text, self._stops = TextStream(tokenizer), StopText(options.stop)

    def push(self, token: int) -> str:
        """What is final now that a token is added; empty where nothing is."""
        return self._stops.push(self._text.push(token))

    def flush(self) -> str:
        """The rest."""
        return self._stops.push(self._text.flush()) + self._stops.flush()
