"""The half behind the bridge: visual tokens and prompts to generated ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.captioning.encode import Clock, Encoded
from blip2edge.runtime.decoding.draft_model import Drafting
from blip2edge.runtime.decoding.generate import Row, generate, stream
from blip2edge.runtime.decoding.language_model import LanguageModel
from blip2edge.runtime.decoding.options import Generated, GenerationOptions
from blip2edge.runtime.decoding.speculative import Ahead
from blip2edge.runtime.decoding.state import RowState
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.prompt import Prompt
from blip2edge.runtime.text.tokenizer import StopText, TextStream, Tokenizer


@dataclass(frozen=True)
class CaptionResult:
    """A picture's caption.

    Attributes:
        image: Its path; None where a picture was given as an object. Of several pictures a list of those.
        prompt: The prompt as given; None for none.
        text: The caption, without special tokens and surrounding spaces.
        tokens: Generated ids, the end token included.
        finish_reason: ``eos``, ``length`` or ``stop``.
        timings_ms: Milliseconds of each of :data:`blip2edge.runtime.captioning.encode.STAGES` and ``total``, their sum.
            What several pictures went through together is shared equally. Where a picture is encoded while another is
            decoded, less time goes by than the sum over pictures.
        tokens_per_s: Generated tokens over the seconds of prefill and decode.
        tokens_per_pass: Generated tokens over the passes of the language model; 1 where nobody reads ahead.
    """

    image: str | list[str | None] | None
    prompt: str | None
    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    timings_ms: dict[str, float]
    tokens_per_s: float
    tokens_per_pass: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object with the attributes as keys, but for what ``bench`` tells of drafts."""
        values = {**vars(self), "tokens": list(self.tokens)}
        del values["tokens_per_pass"]
        return values


def caption_result(
    image: ItemSource,
    prompt: str | None,
    generated: Generated,
    options: GenerationOptions,
    tokenizer: Tokenizer,
    stage_ms: Mapping[str, float],
) -> CaptionResult:
    """Puts a result together.

    Args:
        image: As it was given.
        prompt: As it was given.
        generated: What the decoder said.
        options: Whose ``stop`` texts end the caption.
        tokenizer: Turns ids into text.
        stage_ms: Milliseconds by stage.
    """
    text = tokenizer.decode(generated.tokens)
    for stop in options.stop:
        text = text.partition(stop)[0]
    seconds = (stage_ms["prefill"] + stage_ms["decode"]) / 1e3
    timings = {**stage_ms, "total": sum(stage_ms.values())}
    return CaptionResult(
        image=_path(image),
        prompt=prompt,
        text=text.strip(),
        tokens=generated.tokens,
        finish_reason=generated.finish_reason,
        timings_ms={stage: round(ms, 3) for stage, ms in timings.items()},
        tokens_per_s=round(len(generated.tokens) / seconds, 1) if seconds > 0 else 0.0,
        tokens_per_pass=round(generated.tokens_per_pass, 3),
    )


def _path(image: ItemSource) -> str | list[str | None] | None:
    if isinstance(image, (list, tuple)):
        return [os.fspath(one) if isinstance(one, (str, os.PathLike)) else None for one in image]
    return os.fspath(image) if isinstance(image, (str, os.PathLike)) else None


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
