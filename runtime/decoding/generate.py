"""Generates the texts of a batch by greedy decoding or sampling; beam search is in `beam_search.py`.

The token ids are those of `generate` in transformers 5.23, called with `inputs_embeds` and `input_ids` as
`Blip2ForConditionalGeneration.generate` calls its language model. Only logits processors depend on the ids of the
prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.decoding.generated import Generated, Likeliest
from blip2edge.runtime.decoding.logits_processors import LogitsProcessors
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import (
    Draws,
    RowStream,
    StepScores,
    broken_logits,
    draw,
    sampling_filters,
    top_k_indices,
)
from blip2edge.runtime.decoding.speculative import Speculator
from blip2edge.runtime.decoding.state import ChoosingState, ChosenStep, DecodeState, RowState

Stopped = Callable[[Sequence[int]], bool]

LOWEST = -9999.0
"""Log-probability of a token whose logit is minus infinity or NaN, as in OpenAI's chat format; JSON has no infinity."""


def generate(first_logits: NDArray[np.float32], state: DecodeState, rows: Sequence[Generation]) -> list[Generated]:
    """Generates the texts of a batch until every text is finished; returns one result for each row.

    Args:
        first_logits: ``[B, V]``, the logits after each prompt.
        state: The decoder's state after the prompts; the caller must not use it afterwards.
        rows: The B texts.

    Raises:
        BackendError: The decoder returned NaN.
    """
    batch = GenerationBatch()
    batch.join(first_logits, state, rows)
    while batch.rows:
        batch.step()
    return [row.result() for row in rows]


class Generation:
    """A text that is being generated: one row of a batch, with its own options.

    Args:
        prompt_ids: The prompt's ids as in transformers' ``input_ids``, with image placeholders and without padding;
            empty for encoder-decoder models, whose text encoder processes the prompt.
        options: How to generate; ``num_beams`` is 1.
        vocabulary: V, the number of logits.
        initial: Ids that the decoder was started with (encoder-decoder models). They are part of the result and of what
            logits processors get; limits of length do not count them.
        stopped: Returns whether a text with these generated ids contains a stop string; end tokens also end a text.
        number: Number of the row's random stream: the same seed and number give the same random numbers in any batch.
        speculator: Decodes the row with a draft model while it is alone in its batch; None for plain decoding.

    Attributes:
        generated: The generated ids so far.
        finish_reason: Why the text ended, ``eos``, ``stop`` or ``length``; None until it is finished.
        passes: Number of runs of the decoder for this text, prefill included.
        token_logprobs: The log-probability of each generated token, by the decoder's logits; see :class:`Generated`.
        likeliest: For each generated token, the likeliest tokens at its position; empty without ``top_logprobs``.
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
        self.token_logprobs: list[float] = []
        self.likeliest: list[Likeliest] = []
        self.initial = tuple(initial)
        self.generated: list[int] = []
        self.finish_reason: str | None = None
        self._stopped = stopped
        self._random = RowStream(options.seed, number) if options.sampling else None
        self._left_to_host = False
        self._vocabulary = vocabulary
        self._processors = LogitsProcessors([*prompt_ids, *initial], options, vocabulary) if options.processed else None
        self._filters = sampling_filters(options) if options.sampling else []

    def result(self) -> Generated:
        """Returns the generated tokens and why the text ended; call it when the text is finished."""
        tokens = self.initial + tuple(self.generated)
        return Generated(
            tokens,
            self.finish_reason or "",
            None,
            len(self.generated) / self.passes,
            tuple(self.token_logprobs),
            tuple(self.likeliest),
        )

    @property
    def remaining(self) -> int:
        """Returns the number of tokens that may still be generated."""
        return self.options.max_new_tokens - len(self.generated)

    def scores(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Applies the logits processors to a copy of logits ``[V]``, and returns the scores ``[V]``."""
        if self._processors is None or not self._processors.act(len(self.generated)):
            return logits
        scores = np.array(logits, np.float32)
        self._processors(scores, np.array(self.generated, np.int64))
        return scores

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Chooses the next token from logits ``[V]``, and records its log-probability.

        Of equal scores, greedy decoding takes the lowest id. If the logits processors exclude every token, or make a
        score infinite, probabilities cannot be computed; then sampling also takes the token with the best score.
        """
        token = self._choose(logits)
        self.token_logprobs.append(log_probability(logits, token))
        if self.options.top_logprobs:
            self.likeliest.append(likeliest_tokens(logits, self.options.top_logprobs))
        return token

    def _choose(self, logits: NDArray[np.float32]) -> int:
        scores = self.scores(logits)
        if self._random is None or (scores is not logits and not np.isfinite(scores.max())):
            return int(argmax(scores[None])[0])
        options, scores = self.options, np.asarray(scores, np.float32)
        return draw(scores, self._random, options.temperature, options.top_k, options.top_p, self._filters)

    def is_chosen_on_device(self, state: ChoosingState) -> bool:
        """Returns whether the GPU can choose the next token itself, without the host."""
        plain = self.speculator is None and not self.options.top_logprobs and not self._left_to_host
        chooses = self._random is None or (state.draws and not self._filters)
        fit = self._processors is None or self._processors.fit_device(len(self.generated))
        return plain and chooses and fit

    def leave_to_host(self) -> None:
        """Lets the host choose all further tokens of this text, because the GPU could not choose a token."""
        self._left_to_host = True

    def step_scores(self) -> StepScores:
        """Describes how the GPU (:class:`ChoosingState`) must choose the tokens of the next steps."""
        nothing = StepScores(np.zeros(0, np.int64))
        scores = nothing if self._processors is None else self._processors.step_scores(self.generated)
        if self._random is None:
            return scores
        options = self.options
        top_k = options.top_k or 0
        draws = Draws(
            1.0 if options.temperature is None else options.temperature,
            top_k if top_k < self._vocabulary else 0,
            1.0 if options.top_p is None else options.top_p,
            self._random.ahead(self.remaining),
        )
        return replace(scores, draws=draws)

    def take(self, token: int, logprob: float) -> int:
        """Records a token that the GPU has chosen; returns the token."""
        self.passes += 1
        self.token_logprobs.append(max(LOWEST, logprob))
        if self._random is not None:
            self._random.random()  # the number with which the GPU drew
        return token

    def accept(self, token: int) -> None:
        """Appends a token to the text; sets ``finish_reason`` if the token finishes the text."""
        self.generated.append(token)
        self.finish_reason = finish_reason(self.generated, len(self.generated), self.options, self._stopped)


class GenerationBatch:
    """Texts that are decoded together (continuous batching): rows can join between two steps; finished rows leave.

    Attributes:
        rows: The unfinished texts, in the order of the decoder's rows.
    """

    def __init__(self) -> None:
        self.rows: list[Generation] = []
        self._state: DecodeState | None = None
        self._logits: NDArray[np.float32] | None = None
        self._last: NDArray[np.int64] | None = None  # tokens that are chosen, and not processed by the decoder yet
        # Tokens that a ChoosingState chooses itself.
        self._choosing: Generator[ChosenStep, None, None] | None = None

    def join(self, first_logits: NDArray[np.float32], state: DecodeState, rows: Sequence[Generation]) -> None:
        """Adds texts to the batch, after their prefill.

        Args:
            first_logits: ``[B, V]``, the logits after each prompt.
            state: The decoder's state after the prompts; the caller must not use it afterwards.
            rows: The B texts to add.

        Raises:
            BackendError: The decoder has no room for the new rows; the rows that are already in the batch are not
                affected.
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
        """Appends the next token to every row.

        Returns:
            The rows that got a token. Rows that now have a ``finish_reason`` are no longer in the batch.

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
        """Chooses the next token of each row."""
        step = self._chosen_on_device(state)
        if step is not None:
            return [row.take(int(token), float(given)) for row, token, given in zip(self.rows, *step, strict=True)]
        logits = self._advanced(state)
        return [row.choose(scores) for row, scores in zip(self.rows, logits, strict=True)]

    def _chosen_on_device(self, state: DecodeState) -> ChosenStep | None:
        """Returns the tokens that the GPU chose, with their log-probabilities; None if the host must choose."""
        if self._last is None or not isinstance(state, ChoosingState) or not state.gives_logprobs:
            return None
        if not all(row.is_chosen_on_device(state) for row in self.rows):
            return None
        if self._choosing is None:
            self._choosing = state.choose(self._last, [row.step_scores() for row in self.rows])
        step = next(self._choosing, None)
        if step is None:
            for row in self.rows:
                row.leave_to_host()
        return step

    def _halt(self) -> None:
        """Ends the choice of tokens on the GPU; afterwards the KV cache has all tokens except each row's last token."""
        if self._choosing is not None:
            self._choosing.close()
            self._choosing = None

    def leave(self, row: Generation) -> None:
        """Removes a row that is not finished from the batch, for example a cancelled request."""
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
        """Returns the logits ``[B, V]`` after the rows' last tokens; runs the decoder if they are not computed yet."""
        self._halt()
        if self._last is not None:
            self._logits, self._last = self._read(state, self._last), None
        if self._logits is None:
            raise RuntimeError("the batch has neither logits nor new tokens")
        return self._logits

    def _read(self, state: DecodeState, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs the decoder on tokens ``[B]``; returns logits ``[B, V]``. A row that is alone may use a draft model."""
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


def argmax(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns the likeliest token of each row of logits ``[B, V]``, int64 ``[B]``; of equal logits, the lowest id.

    Raises:
        BackendError: The logits contain NaN.
    """
    tokens: NDArray[np.int64] = logits.argmax(axis=-1)  # NaN counts as the largest
    if np.isnan(logits[np.arange(len(tokens)), tokens]).any():
        raise broken_logits()
    return tokens


def finish_reason(
    generated: Sequence[int], length: int, options: GenerationOptions, stopped: Stopped | None
) -> str | None:
    """Returns why a text of `length` generated tokens is finished: "eos", "stop" or "length"; None if it is not."""
    if generated[-1] in options.eos_token_ids:
        return "eos"
    if stopped is not None and stopped(generated):
        return "stop"
    return "length" if length >= options.max_new_tokens else None


def log_probability(logits: NDArray[np.float32], token: int) -> float:
    """Computes the log-probability of a token from logits ``[V]``; :data:`LOWEST` if it is not finite."""
    largest, value = float(logits.max()), float(logits[token])
    if not (math.isfinite(largest) and math.isfinite(value)):
        return 0.0 if value == largest == math.inf else LOWEST
    weights = np.subtract(logits, np.float32(largest))
    np.exp(weights, out=weights)  # in place: new memory for the result would double the time
    return value - largest - math.log(float(weights.sum()))


def likeliest_tokens(logits: NDArray[np.float32], count: int) -> tuple[tuple[int, float], ...]:
    """Returns the ``count`` likeliest tokens of logits ``[V]`` with their log-probabilities, likeliest first.

    The list is empty if the logits contain NaN.
    """
    if np.isnan(logits.max()):
        return ()
    tokens = top_k_indices(np.asarray(logits, np.float32), min(count, len(logits))).tolist()
    highest = log_probability(logits, tokens[0])
    shift = highest - float(logits[tokens[0]])
    return tuple((token, max(LOWEST, float(logits[token]) + shift)) for token in tokens)
