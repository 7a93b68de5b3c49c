"""Greedy decoding and sampling, streamed or not; beam search is in `runtime.beam`.

Parity target: transformers 5.23 `generate`, called as `Blip2ForConditionalGeneration.generate` calls its
language model, with `inputs_embeds` and `input_ids`. There the prompt's ids lengthen both the running length
and the limits by the same number, so that with `max_new_tokens` and `min_new_tokens` they matter to the
repetition penalty alone.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.errors import UsageError, option
from blip2edge.runtime.decoding.beam_search import beam_search
from blip2edge.runtime.decoding.options import (
    Generated,
    GenerationOptions,
    StepEvent,
    Stopped,
    end_ids,
    finish_reason,
)
from blip2edge.runtime.decoding.sampling import argmax, draw, penalize_repetition, row_streams
from blip2edge.runtime.decoding.speculative import Ahead
from blip2edge.runtime.decoding.state import DecodeState, GreedyState, RowState, check_rows

__all__ = ["DecodeState", "Generated", "GenerationOptions", "StepEvent", "Stopped", "generate", "stream"]


def generate(
    first_logits: NDArray[np.float32],
    state: DecodeState,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    stopped: Stopped | None = None,
    initial: Sequence[int] = (),
    row_ids: Sequence[int] | None = None,
    ahead: Sequence[Ahead | None] = (),
) -> list[Generated]:
    """Generate a text for every row.

    Args:
        first_logits: [B,V], the logits that the prompt's last position gave.
        state: The decoder after the prompt, B rows; used up by the call.
        prompt_ids: Per row the prompt's ids as transformers' `input_ids` hold them, without padding (image
            placeholders included); empty for encoder-decoder models, whose decoder has not seen them.
        options: What to do.
        stopped: Says of a row's generated ids whether the text is over, beside the end tokens.
        initial: Ids that the decoder was started with (encoder-decoder models). They come before the
            generated ids in the result and under the repetition penalty; lengths do not count them.
        row_ids: Numbers of the rows' random streams, 0 … B−1 if left out. With a picture's number in the
            whole request a seed gives the same texts whatever the batches are.
        ahead: What reads ahead in each row's text while it is alone, or None; left out for none at all.

    Returns:
        One result a row.

    Raises:
        BackendError: The decoder returned NaN.
    """
    if options.num_beams > 1:
        return beam_search(first_logits, state, prompt_ids, options, stopped=stopped, initial=initial)
    rows = _rows(first_logits, state, prompt_ids, options, stopped, initial, row_ids, ahead)
    together = Decoding()
    together.join(first_logits, state, rows)
    while together.rows:
        together.step()
    return [row.result() for row in rows]


def stream(
    first_logits: NDArray[np.float32],
    state: DecodeState,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    stopped: Stopped | None = None,
    initial: Sequence[int] = (),
    row_ids: Sequence[int] | None = None,
    ahead: Sequence[Ahead | None] = (),
) -> Iterator[StepEvent]:
    """Generate token by token: the arguments are those of `generate`.

    Yields:
        An event for every token of every row, before the decoder is run for the next ones. Rows that have
        finished leave the state and cost nothing more.

    Raises:
        UsageError: Beam search was asked for, whose tokens are known only at the end.
        BackendError: The decoder returned NaN.
    """
    if options.num_beams > 1:
        raise UsageError(f"expected {option('num_beams')} 1 for a stream, got {options.num_beams}")
    rows = _rows(first_logits, state, prompt_ids, options, stopped, initial, row_ids, ahead)
    together = Decoding()
    together.join(first_logits, state, rows)
    return _events(together)


def _rows(
    first_logits: NDArray[np.float32],
    state: DecodeState,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    stopped: Stopped | None,
    initial: Sequence[int],
    row_ids: Sequence[int] | None,
    ahead: Sequence[Ahead | None],
) -> list[Row]:
    """The rows of `generate` and `stream`; raises ValueError where their numbers do not fit together."""
    check_rows(first_logits, state, prompt_ids)
    numbers = range(len(prompt_ids)) if row_ids is None else row_ids
    readers = ahead or [None] * len(prompt_ids)
    if len(numbers) != len(prompt_ids) or len(readers) != len(prompt_ids):
        raise ValueError(
            f"expected {len(prompt_ids)} row_ids and ahead, got {len(numbers)} and {len(readers)}"
        )
    vocabulary = first_logits.shape[-1]
    return [
        Row(ids, options, vocabulary, initial=initial, stopped=stopped, number=number, ahead=reader)
        for ids, number, reader in zip(prompt_ids, numbers, readers, strict=True)
    ]


def _events(together: Decoding) -> Iterator[StepEvent]:
    places = {id(row): place for place, row in enumerate(together.rows)}
    while together.rows:
        for row in together.step():
            yield StepEvent(places[id(row)], row.generated[-1], row.finish_reason)


class Row:
    """One text on its way, with options of its own.

    Args:
        prompt_ids: As a row of those of `generate`.
        options: What to do; no beams.
        vocabulary: Number of logits V.
        initial: Ids that the decoder was started with.
        stopped: Says of the generated ids whether the text is over, beside the end tokens.
        number: Of its random stream.
        ahead: Reads ahead while the row is decoded alone; None for nobody.

    Attributes:
        finish_reason: None until the text is over.
        passes: Runs of the decoder that the text took, the one over the prompt among them.
    """

    def __init__(
        self,
        prompt_ids: Sequence[int],
        options: GenerationOptions,
        vocabulary: int,
        *,
        initial: Sequence[int] = (),
        stopped: Stopped | None = None,
        number: int = 0,
        ahead: Ahead | None = None,
    ) -> None:
        self.options = options
        self.ahead = ahead
        self.passes = 1
        self.initial = tuple(initial)
        self.history = History(prompt_ids, initial, options, vocabulary)
        self.finish_reason: str | None = None
        self._stopped = stopped
        self._random = row_streams(options.seed, [number])[0] if options.sampling else None

    @property
    def generated(self) -> list[int]:
        """The ids so far."""
        return self.history.generated

    def result(self) -> Generated:
        """The outcome, once the text is over."""
        tokens = self.initial + tuple(self.generated)
        return Generated(tokens, self.finish_reason or "", None, len(self.generated) / self.passes)

    @property
    def left(self) -> int:
        """How many tokens may follow."""
        return self.options.max_new_tokens - len(self.generated)

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """What a token is chosen by: logits [V], which stay as they are, after penalty and minimal length."""
        if not self.history.changes_scores:
            return logits
        scores = np.array(logits, np.float32)
        self.history.process(scores)
        return scores

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token by its logits [V]; greedy rows break ties downwards."""
        scores = self.scores(logits)
        if self._random is None:
            return int(argmax(scores[None])[0])
        options = self.options
        return draw(
            np.asarray(scores, np.float32), self._random, options.temperature, options.top_k, options.top_p
        )

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the likeliest as the decoder says it."""
        return self._random is None and self.ahead is None and not self.history.changes_scores

    def accept(self, token: int) -> None:
        """Appends a token, and says in `finish_reason` whether the text is over."""
        self.history.append(token)
        self.finish_reason = finish_reason(self.generated, len(self.generated), self.options, self._stopped)


class Decoding:
    """Rows that are decoded together. Between two steps rows may join, and those that finish have left.

    Attributes:
        rows: Those on their way, in the order of the decoder's rows.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._state: DecodeState | None = None
        self._logits: NDArray[np.float32] | None = None
        self._last: NDArray[np.int64] | None = None  # chosen, and not yet read by the decoder
        self._greedy: Generator[NDArray[np.int64], None, None] | None = (
            None  # what the state chooses by itself
        )

    def join(self, first_logits: NDArray[np.float32], state: DecodeState, rows: Sequence[Row]) -> None:
        """Takes in further rows.

        Args:
            first_logits: [B,V], behind each prompt.
            state: The decoder after the prompts; used up by the call.
            rows: B.

        Raises:
            BackendError: The decoder has no room for them; those on their way go on.
        """
        if not self.rows or self._state is None:
            self._state, self._logits, self._last = state, first_logits, None
        else:
            advanced = self._advanced(self._state)
            self._settle(self._state)
            self._state.join(state)  # may refuse; then the rows before go on as they were
            self._logits = np.concatenate([advanced, first_logits])
        self.rows = [*self.rows, *rows]

    def step(self) -> list[Row]:
        """Gives every row its next token.

        Returns:
            The rows that got one; those of them with a `finish_reason` have left.

        Raises:
            BackendError: The decoder returned NaN.
        """
        if self._state is None or not self.rows:
            return []
        stepped = self.rows
        for row, token in zip(stepped, self._chosen(self._state), strict=True):
            row.accept(token)
        self._last, self._logits = np.array([row.generated[-1] for row in stepped], np.int64), None
        self._keep([place for place, row in enumerate(stepped) if row.finish_reason is None])
        return stepped

    def _chosen(self, state: DecodeState) -> list[int]:
        """The next token of each row."""
        plain = all(row.is_plain for row in self.rows)
        if self._last is None or not plain or not isinstance(state, GreedyState):
            logits = self._advanced(state)
            return [row.choose(scores) for row, scores in zip(self.rows, logits, strict=True)]
        if self._greedy is None:
            self._greedy = state.greedy(self._last)
        for row in self.rows:
            row.passes += 1
        return [int(token) for token in next(self._greedy)]

    def _halt(self) -> None:
        """Ends what the state chooses by itself: it stands behind the tokens before the last ones."""
        if self._greedy is not None:
            self._greedy.close()
            self._greedy = None

    def leave(self, row: Row) -> None:
        """Lets a row go before its end."""
        self._keep([place for place, other in enumerate(self.rows) if other is not row])

    def _keep(self, places: list[int]) -> None:
        if len(places) == len(self.rows):
            return
        self._halt()
        self.rows = [self.rows[place] for place in places]
        if not places or self._state is None:
            self._state = self._logits = self._last = None
            return
        kept = np.array(places, np.int64)
        self._state.select(kept)
        self._last = None if self._last is None else self._last[kept]
        self._logits = None if self._logits is None else self._logits[kept]

    def _advanced(self, state: DecodeState) -> NDArray[np.float32]:
        """The logits [B,V] behind the rows' last tokens; runs the decoder where it has not read those."""
        self._halt()
        if self._last is not None:
            self._logits, self._last = self._read(state, self._last), None
        if self._logits is None:
            raise RuntimeError("a decoding without logits")
        return self._logits

    def _read(self, state: DecodeState, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Lets the decoder read tokens [B], and more where a lone row is read ahead in."""
        row = self.rows[0]
        if len(self.rows) == 1 and row.ahead is not None and isinstance(state, RowState):
            logits, passes = row.ahead.step(state, row.generated, row.left, row.scores)
            row.passes += passes
            return logits
        for row in self.rows:
            row.passes += 1
        return state.step(tokens)

    def _settle(self, state: DecodeState) -> None:
        """Forgets what was read ahead: another row is about to join."""
        ahead = self.rows[0].ahead
        if len(self.rows) == 1 and ahead is not None and isinstance(state, RowState):
            ahead.settle(state)


class History:
    """The ids of one row and what they do to the next scores.

    Args:
        prompt: Ids before generation; those outside the vocabulary are not penalised, as nothing can
            generate them.
        initial: Ids that the decoder was started with.
        options: What to do.
        vocabulary: Number of logits V.
    """

    def __init__(
        self, prompt: Sequence[int], initial: Sequence[int], options: GenerationOptions, vocabulary: int
    ) -> None:
        before = np.unique(np.array([*prompt, *initial], np.int64))
        before = before[(before >= 0) & (before < vocabulary)]
        self._seen = np.concatenate((before, np.empty(options.max_new_tokens, np.int64)))
        self._before = len(before)
        self._options = options
        self._end_ids = end_ids(options, vocabulary)
        self.generated: list[int] = []

    def append(self, token: int) -> None:
        """Add a generated token."""
        self._seen[self._before + len(self.generated)] = token
        self.generated.append(token)

    @property
    def changes_scores(self) -> bool:
        """Whether `process` would do anything at this length."""
        return self._options.repetition_penalty != 1.0 or self._too_short

    @property
    def _too_short(self) -> bool:
        return len(self.generated) < self._options.min_new_tokens and len(self._end_ids) > 0

    def process(self, scores: NDArray[np.float32]) -> None:
        """Apply the repetition penalty and the minimal length to scores [V], in place."""
        if self._options.repetition_penalty != 1.0:
            seen = self._seen[: self._before + len(self.generated)]
            penalize_repetition(scores, seen, self._options.repetition_penalty)
        if self._too_short:
            scores[self._end_ids] = -np.inf
