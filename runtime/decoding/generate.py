"""Greedy decoding and sampling, with or without streaming; beam search is in `beam_search.py`.

Parity target: transformers 5.23 `generate`, called as `Blip2ForConditionalGeneration.generate` calls its
language model, with `inputs_embeds` and `input_ids`. There the prompt's ids count both in the current length and in the
limits of length, so that only the repetition penalty depends on them.
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
from blip2edge.runtime.decoding.sampling import broken_logits, draw, penalize_repetition, row_streams
from blip2edge.runtime.decoding.speculative import Speculator
from blip2edge.runtime.decoding.state import DecodeState, GreedyState, RowState

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
    speculators: Sequence[Speculator | None] = (),
) -> list[Generated]:
    """Generate a text for every row, and return one result a row.

    Args:
        first_logits: [B,V], the logits that the prompt's last position gave.
        state: The decoder after the prompt, B rows; used up by the call.
        prompt_ids: Per row the prompt's ids as transformers' `input_ids` hold them, without padding (image
            placeholders included); empty for encoder-decoder models, whose decoder does not read them.
        options: What to do.
        stopped: Whether a row's generated ids finish the text; the end tokens always do.
        initial: Ids that the decoder was started with (encoder-decoder models). They come before the
            generated ids in the result and under the repetition penalty; lengths do not count them.
        row_ids: Numbers of the rows' random streams, 0 … B−1 if left out. With a picture's number in the
            whole request a seed gives the same texts whatever the batches are.
        speculators: Speculative decoding of each row, used while the row is decoded alone; None for plain decoding.

    Raises:
        BackendError: The decoder returned NaN.
    """
    if options.num_beams > 1:
        _check_rows(first_logits, state, prompt_ids)
        return beam_search(first_logits, state, prompt_ids, options, stopped=stopped, initial=initial)
    batch = _batch(first_logits, state, prompt_ids, options, stopped, initial, row_ids, speculators)
    rows = batch.rows
    while batch.rows:
        batch.step()
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
    speculators: Sequence[Speculator | None] = (),
) -> Iterator[StepEvent]:
    """Generate token by token: the arguments are those of `generate`.

    Yields:
        An event for every token of every row, before the decoder is run for the next ones. Rows that have
        finished leave the state and cost nothing more.

    Raises:
        UsageError: The options select beam search, whose tokens are known only at the end.
        BackendError: The decoder returned NaN.
    """
    if options.num_beams > 1:
        raise UsageError(f"expected {option('num_beams')} 1 for a stream, got {options.num_beams}")
    return _events(_batch(first_logits, state, prompt_ids, options, stopped, initial, row_ids, speculators))


def _batch(
    first_logits: NDArray[np.float32],
    state: DecodeState,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    stopped: Stopped | None,
    initial: Sequence[int],
    row_ids: Sequence[int] | None,
    speculators: Sequence[Speculator | None],
) -> GenerationBatch:
    """The batch of `generate` and `stream`; raises ValueError where the arguments are for different numbers of rows."""
    _check_rows(first_logits, state, prompt_ids)
    numbers = range(len(prompt_ids)) if row_ids is None else row_ids
    chosen = speculators or [None] * len(prompt_ids)
    if len(numbers) != len(prompt_ids) or len(chosen) != len(prompt_ids):
        raise ValueError(f"expected {len(prompt_ids)} row_ids and speculators, got {len(numbers)} and {len(chosen)}")
    vocabulary = first_logits.shape[-1]
    rows = [
        Generation(ids, options, vocabulary, initial=initial, stopped=stopped, number=number, speculator=one)
        for ids, number, one in zip(prompt_ids, numbers, chosen, strict=True)
    ]
    batch = GenerationBatch()
    batch.join(first_logits, state, rows)
    return batch


def _events(batch: GenerationBatch) -> Iterator[StepEvent]:
    places = {id(row): place for place, row in enumerate(batch.rows)}
    while batch.rows:
        for row in batch.step():
            yield StepEvent(places[id(row)], row.generated[-1], row.finish_reason)


class Generation:
    """A text that is being generated: one row of a batch, with its own options.

    Args:
        prompt_ids: One row of `generate`'s.
        options: Without beams.
        vocabulary: Number of logits V.
        initial: Ids that the decoder was started with.
        stopped: Whether the generated ids finish the text; the end tokens always do.
        number: Of its random stream.
        speculator: Speculative decoding while the row is decoded alone; None for plain decoding.

    Attributes:
        finish_reason: None until the text is finished.
        passes: Runs of the decoder for this text, prefill included.
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
        speculator: Speculator | None = None,
    ) -> None:
        self.options = options
        self.speculator = speculator
        self.passes = 1
        self.initial = tuple(initial)
        self.history = TokenHistory(prompt_ids, initial, options, vocabulary)
        self.finish_reason: str | None = None
        self._stopped = stopped
        self._random = row_streams(options.seed, [number])[0] if options.sampling else None

    @property
    def generated(self) -> list[int]:
        """The generated ids so far."""
        return self.history.generated

    def result(self) -> Generated:
        """The result; call it when the text is finished."""
        tokens = self.initial + tuple(self.generated)
        return Generated(tokens, self.finish_reason or "", None, len(self.generated) / self.passes)

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self.options.max_new_tokens - len(self.generated)

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Logits [V] after repetition penalty and minimal length; the argument is not changed."""
        if not self.history.changes_scores:
            return logits
        scores = np.array(logits, np.float32)
        self.history.process(scores)
        return scores

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token by its logits [V]; greedy decoding takes the lowest id of equals."""
        scores = self.scores(logits)
        if self._random is None:
            return int(argmax(scores[None])[0])
        options = self.options
        return draw(np.asarray(scores, np.float32), self._random, options.temperature, options.top_k, options.top_p)

    @property
    def is_plain(self) -> bool:
        """Whether the next token is the arg-max of the raw logits."""
        return self._random is None and self.speculator is None and not self.history.changes_scores

    def accept(self, token: int) -> None:
        """Appends a token and sets `finish_reason` where the text is finished by it."""
        self.history.append(token)
        self.finish_reason = finish_reason(self.generated, len(self.generated), self.options, self._stopped)


class GenerationBatch:
    """Rows that are decoded together (continuous batching): rows join between two steps and leave when finished.

    Attributes:
        rows: The unfinished ones, in the order of the decoder's rows.
    """

    def __init__(self) -> None:
        self.rows: list[Generation] = []
        self._state: DecodeState | None = None
        self._logits: NDArray[np.float32] | None = None
        self._last: NDArray[np.int64] | None = None  # chosen, not yet given to the decoder
        # Tokens that the state chooses itself.
        self._greedy: Generator[NDArray[np.int64], None, None] | None = None

    def join(self, first_logits: NDArray[np.float32], state: DecodeState, rows: Sequence[Generation]) -> None:
        """Adds rows.

        Args:
            first_logits: [B,V], after each prompt.
            state: The decoder after the prompts; used up by the call.
            rows: B.

        Raises:
            BackendError: The decoder has no room for them; the rows before are not affected.
        """
        if not self.rows or self._state is None:
            self._state, self._logits, self._last = state, first_logits, None
        else:
            logits = self._advanced(self._state)
            self._discard_unverified(self._state)
            self._state.join(state)  # may raise; then the rows before stay as they were
            self._logits = np.concatenate([logits, first_logits])
        self.rows = [*self.rows, *rows]

    def step(self) -> list[Generation]:
        """Gives every row its next token.

        Returns:
            The rows that got one. Those with a `finish_reason` have left the batch.

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
        """Stops the state's own greedy decoding; it has then processed all tokens but the last ones."""
        if self._greedy is not None:
            self._greedy.close()
            self._greedy = None

    def leave(self, row: Generation) -> None:
        """Removes a row that is not finished."""
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
        """The logits [B,V] after the rows' last tokens; runs the decoder where those are new."""
        self._halt()
        if self._last is not None:
            self._logits, self._last = self._read(state, self._last), None
        if self._logits is None:
            raise RuntimeError("a decoding without logits")
        return self._logits

    def _read(self, state: DecodeState, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs the decoder on tokens [B]; on a draft as well where the only row has a speculator."""
        row = self.rows[0]
        if len(self.rows) == 1 and row.speculator is not None and isinstance(state, RowState):
            logits, passes = row.speculator.step(state, row.generated, row.remaining, row.scores)
            row.passes += passes
            return logits
        for row in self.rows:
            row.passes += 1
        return state.step(tokens)

    def _discard_unverified(self, state: DecodeState) -> None:
        """Removes draft tokens that are not accepted from the KV cache, before another row joins."""
        speculator = self.rows[0].speculator
        if len(self.rows) == 1 and speculator is not None and isinstance(state, RowState):
            speculator.discard_unverified(state)


class TokenHistory:
    """The ids of one row, and their effect on the next scores.

    Args:
        prompt: Ids before generation; those outside the vocabulary are ignored, as they cannot be generated.
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
        """Whether `process` changes anything at this length."""
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


def argmax(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """The likeliest token of each row, the lowest id of equals.

    Args:
        logits: [B,V].

    Returns:
        int64 [B].

    Raises:
        BackendError: The logits hold NaN.
    """
    tokens: NDArray[np.int64] = logits.argmax(axis=-1)  # NaN counts as the largest
    if np.isnan(logits[np.arange(len(tokens)), tokens]).any():
        raise broken_logits()
    return tokens


def _check_rows(first_logits: NDArray[np.float32], state: DecodeState, prompt_ids: Sequence[Sequence[int]]) -> None:
    """Raise ValueError where logits, state and prompts are not for the same number of rows, at least one."""
    sizes = (len(first_logits), state.batch_size, len(prompt_ids))
    if first_logits.ndim != 2 or len(set(sizes)) != 1 or sizes[0] < 1:
        raise ValueError(
            f"expected logits [B,V], a state of B rows and B prompts, got logits {list(first_logits.shape)}, "
            f"{sizes[1]} rows and {sizes[2]} prompts"
        )
