"""Changes the scores of the next token: penalties, suppressed and forced tokens, biases.

The table `PROCESSORS` has a function for each option. The order in which they act (`options.PROCESSED`) is that of
`_get_logits_processor` in transformers 5.23. They act in greedy decoding, in sampling, and in beam search, where scores
are log-probabilities. `sampling.py` has the filters that act in sampling alone.

A processor gets the ids that transformers has in `input_ids`: the ids of the prompt with its image placeholders (of an
encoder-decoder model: its start ids), then the generated ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from blip2edge.errors import UsageError, option
from blip2edge.runtime.decoding.options import MAX_TOKENS, GenerationOptions
from blip2edge.runtime.decoding.sampling import StepScores, log_softmax, penalize_repetition

Scores = NDArray[np.float32]
Ids = NDArray[np.int64]
Mask = NDArray[np.bool_]

ALWAYS = range(MAX_TOKENS)
NEVER = range(0)

_LARGEST_GROWTH = 1e30
"""Largest growth by `exponential_decay_length_penalty`; a larger number would overflow float32."""


@dataclass(frozen=True)
class LogitsProcessor:
    """A function that changes the scores of the next token for one option.

    Attributes:
        apply: Changes scores [V] in place, given the ids [P + n]: the P prompt ids, then the n generated ids.
        steps: The function is called if the number n of generated tokens is in this range.
    """

    apply: Callable[[Scores, Ids], None]
    steps: range = ALWAYS


@dataclass(frozen=True)
class TextStart:
    """The values from which the logits processors of one text are made.

    Attributes:
        prompt: int64 [P], the P ids before the first generated id.
        options: How to generate.
        vocabulary: Number of logits V.
    """

    prompt: Ids
    options: GenerationOptions
    vocabulary: int

    def known(self, ids: Iterable[int]) -> Ids:
        """Returns the ids that are below :attr:`vocabulary`, without repetitions."""
        unique = np.unique(np.array(list(ids), np.int64))
        return unique[(unique >= 0) & (unique < self.vocabulary)]


class LogitsProcessors:
    """The logits processors of one text: all that its options select.

    Args:
        prompt: The ids before the first generated id. They may include ids outside the vocabulary, which have no score.
        options: How to generate.
        vocabulary: Number of logits V.
    """

    def __init__(self, prompt: Sequence[int], options: GenerationOptions, vocabulary: int) -> None:
        self._prompt = np.array(prompt, np.int64)
        self._start = TextStart(self._prompt, options, vocabulary)
        self._processors = {name: PROCESSORS[name](getattr(options, name), self._start) for name in options.processed}

    def act(self, count: int) -> bool:
        """Returns whether a processor acts on the scores of the next token, after ``count`` generated tokens."""
        return any(count in processor.steps for processor in self._processors.values())

    def fit_device(self, count: int) -> bool:
        """Returns whether a GPU can apply all processors that act after ``count`` generated tokens (`StepScores`)."""
        return self._acting(count).keys() <= {"repetition_penalty", *_HOLDING_END}

    def step_scores(self, generated: Sequence[int]) -> StepScores:
        """Describes the processors of the next steps for a GPU; call it only if `fit_device` returned true."""
        acting = self._acting(len(generated))
        seen, penalty = np.zeros(0, np.int64), 1.0
        if "repetition_penalty" in acting:
            penalty = self._start.options.repetition_penalty
            seen = self._start.known([*self._prompt.tolist(), *generated])
        holding = [acting[name].steps.stop - len(generated) for name in _HOLDING_END if name in acting]
        held = self._start.known(self._start.options.eos_token_ids)
        return StepScores(seen, penalty, held, max(holding, default=0))

    def _acting(self, count: int) -> dict[str, LogitsProcessor]:
        """Returns the processors that act after ``count`` generated tokens, by the name of the option."""
        return {name: processor for name, processor in self._processors.items() if count in processor.steps}

    def __call__(self, scores: Scores, generated: Ids) -> None:
        """Changes scores [V] in place.

        Args:
            scores: float32 logits, or log-probabilities in beam search.
            generated: int64 [n], the n ids that were generated so far.
        """
        ids = np.concatenate((self._prompt, generated))
        for processor in self._processors.values():
            if len(generated) in processor.steps:
                processor.apply(scores, ids)


class _SequenceBias:
    """Adds a bias to the score of a sequence's last token, if the ids so far end with the sequence's other tokens."""

    def __init__(self, biases: Iterable[tuple[tuple[int, ...], float]], start: TextStart) -> None:
        self._single = np.zeros(start.vocabulary, np.float32)
        longer: dict[int, list[tuple[tuple[int, ...], float]]] = {}
        for ids, bias in biases:
            if ids[-1] >= start.vocabulary:
                continue
            if len(ids) == 1:
                self._single[ids[0]] = bias
            else:
                longer.setdefault(len(ids) - 1, []).append((ids, bias))
        self._longer = [
            (
                np.array([ids[:-1] for ids, _ in group], np.int64),
                np.array([ids[-1] for ids, _ in group], np.int64),
                np.array([bias for _, bias in group], np.float32),
            )
            for group in longer.values()
        ]

    def __call__(self, scores: Scores, ids: Ids) -> None:
        biases = self._single
        for prefixes, last, values in self._longer:
            length = prefixes.shape[1]
            matches = (prefixes == ids[-length:]).all(axis=1) if length <= len(ids) else np.zeros(len(last), bool)
            if matches.any():
                biases = biases.copy() if biases is self._single else biases
                np.add.at(biases, last[matches], values[matches])
        scores += biases


def _sequence_bias(biases: Sequence[tuple[tuple[int, ...], float]], start: TextStart) -> LogitsProcessor:
    return LogitsProcessor(_SequenceBias(biases, start))


def _bad_words(words: Sequence[tuple[int, ...]], start: TextStart) -> LogitsProcessor:
    """Forbids sequences of ids. A sequence that is a single end token stays allowed, as in transformers."""
    ends = {(token,) for token in start.options.eos_token_ids}
    return LogitsProcessor(_SequenceBias([(word, -math.inf) for word in words if word not in ends], start))


def _repetition(penalty: float, start: TextStart) -> LogitsProcessor:
    before, length = start.known(start.prompt), len(start.prompt)

    def apply(scores: Scores, ids: Ids) -> None:
        penalize_repetition(scores, np.concatenate((before, ids[length:])), penalty)

    return LogitsProcessor(apply)


def _encoder_repetition(penalty: float, start: TextStart) -> LogitsProcessor:
    before = start.known(start.prompt)
    return LogitsProcessor(lambda scores, _: penalize_repetition(scores, before, 1 / penalty))


def _ban_ngrams(scores: Scores, ngrams: Ids, ids: Ids) -> None:
    """Excludes the last token of each n-gram in ``ngrams [N, n]`` whose other tokens equal the last n - 1 ids."""
    last = ids[len(ids) + 1 - ngrams.shape[1] :]
    banned = ngrams[(ngrams[:, :-1] == last).all(axis=1), -1]
    scores[banned[(banned >= 0) & (banned < len(scores))]] = -np.inf


def _no_repeated_ngram(size: int, start: TextStart) -> LogitsProcessor:
    def apply(scores: Scores, ids: Ids) -> None:
        _ban_ngrams(scores, sliding_window_view(ids, size), ids)

    return LogitsProcessor(apply, range(max(0, size - len(start.prompt)), MAX_TOKENS))


def _no_ngram_of_prompt(size: int, start: TextStart) -> LogitsProcessor:
    if size > len(start.prompt):
        return LogitsProcessor(lambda scores, ids: None, NEVER)
    ngrams = sliding_window_view(start.prompt, size)
    return LogitsProcessor(lambda scores, ids: _ban_ngrams(scores, ngrams, ids))


def _suppressed(tokens: Iterable[int], start: TextStart, steps: range = ALWAYS) -> LogitsProcessor:
    banned = start.known(tokens)

    def apply(scores: Scores, _: Ids) -> None:
        scores[banned] = -np.inf

    return LogitsProcessor(apply, steps if len(banned) else NEVER)


def _suppressed_first(tokens: Iterable[int], start: TextStart) -> LogitsProcessor:
    """Excludes ids from the first generated token; if that token is forced, from the second generated token."""
    forced = len(start.prompt) <= 1 and start.options.forced_bos_token_id is not None
    return _suppressed(tokens, start, range(int(forced), int(forced) + 1))


def _too_short(least: int, start: TextStart) -> LogitsProcessor:
    return _suppressed(start.options.eos_token_ids, start, range(least))


def _too_short_with_prompt(least: int, start: TextStart) -> LogitsProcessor:
    """Excludes end tokens before `min_length` tokens, prompt included; does nothing if `min_new_tokens` is set."""
    return _too_short(0 if start.options.min_new_tokens else max(0, least - len(start.prompt)), start)


def _forced(tokens: Iterable[int], start: TextStart, steps: range) -> LogitsProcessor:
    allowed = start.known(tokens)

    def apply(scores: Scores, _: Ids) -> None:
        scores.fill(-np.inf)
        scores[allowed] = 0.0

    return LogitsProcessor(apply, steps)


def _forced_first(token: int, start: TextStart) -> LogitsProcessor:
    """Forces the first generated token if the prompt is a single id; has no effect after a longer prompt."""
    return _forced([token], start, range(1) if len(start.prompt) == 1 else NEVER)


def _forced_last(tokens: Sequence[int], start: TextStart) -> LogitsProcessor:
    last = start.options.max_new_tokens - 1
    return _forced(tokens, start, range(last, last + 1))


def _finite(_: bool, start: TextStart) -> LogitsProcessor:  # noqa: ARG001 - the table's
    largest = float(np.finfo(np.float32).max)

    def apply(scores: Scores, _: Ids) -> None:
        np.nan_to_num(scores, copy=False, nan=0.0, posinf=largest, neginf=-largest)

    return LogitsProcessor(apply)


def _end_ids(options: GenerationOptions, vocabulary: int) -> Ids:
    """Returns the ids of the end tokens that the model can generate (below ``vocabulary``), int64."""
    return np.array([token for token in options.eos_token_ids if token < vocabulary], np.int64)


def _growing_end(value: tuple[int, float], start: TextStart) -> LogitsProcessor:
    first, factor = value
    ends, before = _end_ids(start.options, start.vocabulary), len(start.prompt)

    def apply(scores: Scores, ids: Ids) -> None:
        late = len(ids) - before - first
        growth = factor**late if late * math.log(factor) < math.log(_LARGEST_GROWTH) else _LARGEST_GROWTH
        values = scores[ends]
        finite = np.isfinite(values)
        with np.errstate(over="ignore", invalid="ignore"):
            scores[ends] = np.where(finite, values + np.abs(values) * np.float32(growth - 1), values)

    return LogitsProcessor(apply, range(first + 1, MAX_TOKENS))


def _renormalized(_: bool, start: TextStart) -> LogitsProcessor:
    """Turns scores into log-probabilities; does nothing in sampling, which computes probabilities anyway."""

    def apply(scores: Scores, _: Ids) -> None:
        if scores.max() > -np.inf:
            scores[:] = log_softmax(scores)

    return LogitsProcessor(apply, NEVER if start.options.sampling else ALWAYS)


PROCESSORS: Mapping[str, Callable[[Any, TextStart], LogitsProcessor]] = {
    "sequence_bias": _sequence_bias,
    "encoder_repetition_penalty": _encoder_repetition,
    "repetition_penalty": _repetition,
    "no_repeat_ngram_size": _no_repeated_ngram,
    "encoder_no_repeat_ngram_size": _no_ngram_of_prompt,
    "bad_words_ids": _bad_words,
    "min_length": _too_short_with_prompt,
    "min_new_tokens": _too_short,
    "forced_bos_token_id": _forced_first,
    "forced_eos_token_id": _forced_last,
    "remove_invalid_values": _finite,
    "exponential_decay_length_penalty": _growing_end,
    "suppress_tokens": _suppressed,
    "begin_suppress_tokens": _suppressed_first,
    "renormalize_logits": _renormalized,
}
"""For each option of `options.PROCESSED`, the function that makes its logits processor."""

_HOLDING_END = ("min_length", "min_new_tokens")
"""Options that suppress the end tokens in the first steps."""


def check_ids(options: GenerationOptions, vocabulary: int) -> None:
    """Checks that token ids in the options are in the vocabulary; checks the same options as transformers.

    Raises:
        UsageError: An id is not below ``vocabulary``, the number of logits.
    """
    forced_first = () if options.forced_bos_token_id is None else (options.forced_bos_token_id,)
    sequences = {
        "sequence_bias": [ids for ids, _ in options.sequence_bias],
        "bad_words_ids": options.bad_words_ids,
        "forced_bos_token_id": [forced_first],
        "forced_eos_token_id": [options.forced_eos_token_id],
    }
    for name, found in sequences.items():
        largest = max((max(ids, default=0) for ids in found), default=0)
        if largest >= vocabulary:
            raise UsageError(f"expected {option(name)} to hold ids below {vocabulary}, got {largest}", field=name)


def check_prompt_ids(options: GenerationOptions, *, given: bool) -> None:
    """Checks the options that need the ids of the prompt (transformers' `encoder_input_ids`).

    Args:
        options: How to generate.
        given: Whether transformers passes the prompt's ids to its `generate`. For a language model behind a
            bridge (BLIP-2) it passes embeddings only, and ignores these options.

    Raises:
        UsageError: One of these options is set, but would have no effect.
    """
    for name in ("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"):
        if not given and name in options.processed:
            raise UsageError(
                f"{option(name)} does not act on this model: its language model gets embeddings and no ids",
                "leave it out",
                field=name,
            )
