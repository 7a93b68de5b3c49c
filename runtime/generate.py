"""Greedy decoding and sampling, streamed or not; beam search is in `runtime.beam`.

Parity target: transformers 5.23 `generate`, called as `Blip2ForConditionalGeneration.generate` calls its
language model, with `inputs_embeds` and `input_ids`. There the prompt's ids lengthen both the running length
and the limits by the same number, so that with `max_new_tokens` and `min_new_tokens` they matter to the
repetition penalty alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.errors import UsageError
from blip2edge.runtime.beam import beam_search
from blip2edge.runtime.options import (
    DecodeState,
    Generated,
    GenerationOptions,
    StepEvent,
    Stopped,
    check_rows,
    end_ids,
    finish_reason,
)
from blip2edge.runtime.sampling import argmax, draw, penalize_repetition, row_streams

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

    Returns:
        One result a row.

    Raises:
        BackendError: The decoder returned NaN.
    """
    if options.num_beams > 1:
        return beam_search(first_logits, state, prompt_ids, options, stopped=stopped, initial=initial)
    tokens: list[list[int]] = [[] for _ in prompt_ids]
    reasons = [""] * len(tokens)
    for event in stream(
        first_logits, state, prompt_ids, options, stopped=stopped, initial=initial, row_ids=row_ids
    ):
        tokens[event.row].append(event.token)
        reasons[event.row] = event.finish_reason or ""
    start = tuple(initial)
    return [Generated(start + tuple(ids), reason, None) for ids, reason in zip(tokens, reasons, strict=True)]


def stream(
    first_logits: NDArray[np.float32],
    state: DecodeState,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    stopped: Stopped | None = None,
    initial: Sequence[int] = (),
    row_ids: Sequence[int] | None = None,
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
        raise UsageError(f"expected --num-beams 1 for a stream, got {options.num_beams}")
    check_rows(first_logits, state, prompt_ids)
    rows = range(len(prompt_ids)) if row_ids is None else row_ids
    if len(rows) != len(prompt_ids):
        raise ValueError(f"expected {len(prompt_ids)} row_ids, got {len(rows)}")
    streams = row_streams(options.seed, rows) if options.sampling else []
    vocabulary = first_logits.shape[-1]
    histories = [History(ids, initial, options, vocabulary) for ids in prompt_ids]
    return _steps(first_logits, state, histories, streams, options, stopped)


def _steps(
    logits: NDArray[np.float32],
    state: DecodeState,
    histories: list[History],
    streams: list[np.random.Generator],
    options: GenerationOptions,
    stopped: Stopped | None,
) -> Iterator[StepEvent]:
    active = list(range(len(histories)))
    for length in range(1, options.max_new_tokens + 1):
        tokens = _choose(
            logits, [histories[row] for row in active], [streams[row] for row in active if streams], options
        )
        going: list[int] = []
        for position, (row, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
            histories[row].append(token)
            reason = finish_reason(histories[row].generated, length, options, stopped)
            if reason is None:
                going.append(position)
            yield StepEvent(row, token, reason)
        if not going:
            return
        if len(going) < len(active):
            kept = np.array(going, np.int64)
            state.select(kept)
            tokens, active = tokens[kept], [active[position] for position in going]
        logits = state.step(tokens)


def _choose(
    logits: NDArray[np.float32],
    histories: Sequence[History],
    streams: Sequence[np.random.Generator],
    options: GenerationOptions,
) -> NDArray[np.int64]:
    """The next token of each row, int64 [B]."""
    if any(history.changes_scores for history in histories):
        logits = np.array(logits, np.float32)  # a copy: the decoder's output stays as it is
        for scores, history in zip(logits, histories, strict=True):
            history.process(scores)
    if not streams:
        return argmax(logits)
    drawn = [
        draw(np.asarray(scores, np.float32), rng, options.temperature, options.top_k, options.top_p)
        for scores, rng in zip(logits, streams, strict=True)
    ]
    return np.array(drawn, np.int64)


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
