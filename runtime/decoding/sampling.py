"""Chooses the next token of one row from its scores: filters the scores, then draws a token at random.

The order and the arithmetic (float32) are those of transformers 5.23: temperature, top-k, top-p, then the filters of
`FILTERS` (`generation/logits_process.py`). For speed, nothing here loops over the vocabulary in
Python. The whole vocabulary is sorted only if sorting a few candidates is not enough.
"""

from __future__ import annotations

import math
import secrets
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.errors import BackendError, WithoutEffectWarning, option
from blip2edge.runtime.decoding.options import GenerationOptions

Scores = NDArray[np.float32]
Mask = NDArray[np.bool_]

Filter = Callable[[NDArray[np.float32]], NDArray[np.bool_]]
"""Type of a function that returns, for finite scores [N], which of the N tokens to keep; it keeps at least one."""

_CHUNK = 128  # values per chunk when the largest k of many are searched
_NUCLEUS = 512  # tokens that top-p sorts first; a nucleus is rarely larger


def top_k_indices(values: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Returns the indices of the k largest values, largest first; of equal values, the lower index comes first.

    For speed, the values are divided into chunks. The k-th largest of the chunks' maxima is a lower bound of the k-th
    largest value, so only the values above this bound are sorted.

    Args:
        values: [N] without NaN.
        k: Number of values to find, 1 … N.

    Returns:
        int64 [k].
    """
    chunks = len(values) // _CHUNK
    if chunks >= 4 * k:
        maxima = values[: chunks * _CHUNK].reshape(chunks, _CHUNK).max(axis=1)
        bound = np.partition(maxima, chunks - k)[chunks - k]
    else:
        bound = np.partition(values, len(values) - k)[len(values) - k]
    candidates = np.flatnonzero(values >= bound)
    order = np.argsort(-values[candidates], kind="stable")[:k]
    return candidates[order].astype(np.int64, copy=False)


@dataclass(frozen=True, eq=False)
class Draws:
    """Describes how a GPU must draw the tokens of one row in the next steps, see `draw`.

    Attributes:
        temperature: Divides the scores.
        top_k: Number of the likeliest tokens to keep; 0 for all.
        top_p: Sum of the probabilities of the tokens to keep; 1 for all.
        uniforms: float64 [N], the random numbers of the next N tokens, one for each.
    """

    temperature: float
    top_k: int
    top_p: float
    uniforms: NDArray[np.float64]


@dataclass(frozen=True)
class StepScores:
    """Describes how a GPU must change the logits of one row in the next steps, in which the GPU chooses the tokens.

    Attributes:
        seen: Token ids, int64, to which the repetition penalty applies; the GPU adds every token that it chooses.
        penalty: The repetition penalty; 1 changes nothing.
        held: Token ids, int64, that must not be chosen during `held_steps`, such as end tokens.
        held_steps: Number of steps, from the next one on, in which the ids in `held` must not be chosen.
        draws: How the token is drawn at random; None for the likeliest token.
    """

    seen: NDArray[np.int64]
    penalty: float = 1.0
    held: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    held_steps: int = 0
    draws: Draws | None = None


def penalize_repetition(scores: NDArray[np.float32], seen: NDArray[np.int64], penalty: float) -> None:
    """Makes repeated tokens less likely, in place: divides positive scores, multiplies negative scores.

    The penalty of CTRL (arXiv 1909.05858).

    Args:
        scores: [V]: logits, or log-probabilities in beam search.
        seen: Ids in the prompt and generated so far, repeated or not, each in 0 … V-1.
        penalty: Above 1 discourages repetition, below 1 encourages it.
    """
    values = scores[seen]
    scores[seen] = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))


def filter_scores(
    scores: NDArray[np.float32],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    filters: Sequence[Filter] = (),
) -> tuple[NDArray[np.int64] | None, NDArray[np.float32]]:
    """Applies temperature, top-k, top-p and further filters to the scores of one row.

    Args:
        scores: Logits [V].
        temperature: Divides the scores, above 0; None or 1: no change.
        top_k: Keep the k largest scores, and all scores equal to the k-th; None or 0: keep all.
        top_p: Keep the fewest most probable tokens whose probabilities reach this sum, at least one; None
            or 1: keep all.
        filters: Further filters; they act one after the other on the tokens that top-p kept.

    Returns:
        The ids that are kept, ascending (None: the whole vocabulary), and their scores divided by the temperature.
    """
    if temperature is not None and temperature != 1.0:
        with np.errstate(over="ignore"):
            scores = scores / np.float32(temperature)
    kept: NDArray[np.int64] | None = None
    if top_k and top_k < len(scores):
        smallest = scores[top_k_indices(scores, top_k)[-1]]
        kept = np.flatnonzero(scores >= smallest)
        scores = scores[kept]
    if top_p is not None and top_p < 1.0:
        nucleus = _nucleus(scores, top_p)
        kept = nucleus if kept is None else kept[nucleus]
        scores = scores[nucleus]
    if filters:
        masks: list[Filter] = [np.isfinite, *filters]
        for mask in masks:
            places = np.flatnonzero(mask(scores))
            kept = places if kept is None else kept[places]
            scores = scores[places]
    return kept, scores


def _nucleus(scores: NDArray[np.float32], top_p: float) -> NDArray[np.int64]:
    """Returns the positions of the tokens that top-p keeps, ascending (Holtzman et al., arXiv 1904.09751).

    With tokens in falling order of probability, a token is kept if the sum of the probabilities before it is below p.
    The likeliest token is always kept.
    """
    weights = np.exp((scores - scores.max()).astype(np.float64))
    limit = np.float32(1.0 - top_p)
    total = weights.sum()
    size = min(_NUCLEUS, len(scores))
    while True:
        order = top_k_indices(scores, size)
        mass = np.cumsum(weights[order]) / total
        stays = (1.0 - np.concatenate(([0.0], mass[:-1]))).astype(np.float32) > limit
        stays[0] = True
        count = int(np.count_nonzero(stays))
        if count < size or size == len(scores):
            return np.sort(order[:count])
        size = min(size * 16, len(scores))


class Uniforms(Protocol):
    """A source of random numbers from 0 to 1, such as a :class:`RowStream` or a NumPy ``Generator``."""

    def random(self) -> float:
        """Returns the next number."""


class RowStream:
    """The random numbers of one row, from 0 to 1, which can also be read ahead.

    Args:
        seed: The seed of all rows; None for other numbers at each call.
        number: Number of the row.
    """

    def __init__(self, seed: int | None, number: int) -> None:
        self._generator = np.random.default_rng([secrets.randbits(128) if seed is None else int(seed), number])
        self._ahead: deque[float] = deque()

    def random(self) -> float:
        """Returns the next number."""
        return self._ahead.popleft() if self._ahead else float(self._generator.random())

    def ahead(self, count: int) -> NDArray[np.float64]:
        """Returns the next ``count`` numbers, which :meth:`random` still returns afterwards."""
        self._ahead.extend(self._generator.random(max(0, count - len(self._ahead))).tolist())
        return np.array(list(islice(self._ahead, count)))


def draw(
    scores: NDArray[np.float32],
    rng: Uniforms,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    filters: Sequence[Filter] = (),
) -> int:
    """Draws one token from the softmax over the filtered scores, with one uniform random number.

    Args:
        scores: Logits [V].
        rng: The row's own random stream.
        temperature: See `filter_scores`.
        top_k: See `filter_scores`.
        top_p: See `filter_scores`.
        filters: See `filter_scores`.

    Returns:
        The token id.

    Raises:
        BackendError: The scores contain NaN or infinity.
    """
    if not np.isfinite(scores.max()):
        raise broken_logits()
    kept, scores = filter_scores(scores, temperature, top_k, top_p, filters)
    mass = np.cumsum(np.exp((scores - scores.max()).astype(np.float64)))
    position = int(np.searchsorted(mass, rng.random() * mass[-1], side="right"))
    position = min(position, len(mass) - 1)
    return position if kept is None else int(kept[position])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Computes log-probabilities along the last axis, float32, in a new array of the same shape.

    Raises:
        BackendError: The logits contain NaN.
    """
    shifted: NDArray[np.float32] = logits - logits.max(axis=-1, keepdims=True)
    norm = np.log(np.exp(shifted).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
    if np.isnan(norm).any():
        raise broken_logits()
    shifted -= norm
    return shifted


def broken_logits() -> BackendError:
    """Returns the error for a decoder whose logits are not finite."""
    return BackendError(
        "the decoder's logits are NaN or infinity; in fp16 this happens when values overflow",
        f"export with {option('precision')} fp32, or choose another {option('backend')}",
    )


def _probabilities(scores: Scores) -> Scores:
    weights = np.exp((scores - scores.max()).astype(np.float64))
    probabilities: Scores = (weights / weights.sum()).astype(np.float32)
    return probabilities


def _entropy(probabilities: Scores) -> np.float32:
    positive = probabilities[probabilities > 0]
    return np.float32(-(positive * np.log(positive)).sum(dtype=np.float64))


def _min_p(share: float, scores: Scores) -> Mask:
    probabilities = _probabilities(scores)
    kept: Mask = probabilities >= np.float32(share) * probabilities.max()
    return kept


def _typical(mass: float, scores: Scores) -> Mask:
    """Keeps the most typical tokens: locally typical sampling (Meister et al., arXiv 2202.00666)."""
    log_probs = log_softmax(scores)
    unusual = np.abs(-log_probs - _entropy(np.exp(log_probs)))
    order = np.argsort(unusual, kind="stable")
    total = np.cumsum(_probabilities(scores)[order], dtype=np.float64).astype(np.float32)
    last = min(int(np.count_nonzero(total < np.float32(mass))), len(scores) - 1)
    kept: Mask = unusual <= unusual[order[last]]
    return kept


def _epsilon(least: float, scores: Scores) -> Mask:
    """Keeps tokens whose probability is at least a limit: truncation sampling (Hewitt et al., arXiv 2210.15191)."""
    kept: Mask = (_probabilities(scores) >= np.float32(least)) | (scores >= scores.max())
    return kept


def _eta(epsilon: float, scores: Scores) -> Mask:
    """Keeps tokens whose probability is at least a limit, as `_epsilon`; a large entropy lowers the limit."""
    probabilities = _probabilities(scores)
    return _epsilon(min(epsilon, math.sqrt(epsilon) * math.exp(-_entropy(probabilities))), scores)


FILTERS: Mapping[str, tuple[Callable[[float, Scores], Mask], float]] = {
    "min_p": (_min_p, 0.0),
    "typical_p": (_typical, 1.0),
    "epsilon_cutoff": (_epsilon, 0.0),
    "eta_cutoff": (_eta, 0.0),
}
"""For each option, the function that chooses the tokens to keep, and the value with which it keeps all tokens."""


def sampling_filters(options: GenerationOptions) -> list[Filter]:
    """Returns the filters of sampling besides top-k and top-p, in the order in which they act."""
    return [
        partial(keeps, value)
        for name, (keeps, neutral) in FILTERS.items()
        if (value := getattr(options, name)) is not None and value != neutral
    ]


BEAM_OPTIONS = ("length_penalty", "early_stopping")
"""Options that only beam search uses."""

SAMPLING_OPTIONS: Mapping[str, float | None] = {
    "seed": None,
    "top_p": 1.0,
    "top_k": 0,
    **{name: neutral for name, (_, neutral) in FILTERS.items()},
}
"""Options that only sampling uses, each with a value that changes nothing; decoding with temperature 0 is greedy."""


def warn_of_unused(options: GenerationOptions, given: Collection[str]) -> None:
    """Gives a WithoutEffectWarning for each option of the caller that has no effect.

    The server does not call this function: clients send a seed with every request, whatever the temperature is.

    Args:
        options: The options, with the bundle's defaults.
        given: Names of the options that the caller has given; unused defaults of the bundle are not reported.
    """
    for name, reason in _unused(options):
        if name in given and getattr(options, name) not in (None, getattr(GenerationOptions(), name)):
            warnings.warn(WithoutEffectWarning(f"{option(name)} has no effect: {reason}"), stacklevel=2)


def _unused(options: GenerationOptions) -> Iterator[tuple[str, str]]:
    """Yields each option that is not used, with the reason and the correction; an option may also have its default."""
    if options.num_beams == 1:
        for name in BEAM_OPTIONS:
            yield name, f"only beam search uses it; give {option('num_beams')} above 1, or leave it out"
    if not options.sampling:
        for name in (name for name, neutral in SAMPLING_OPTIONS.items() if getattr(options, name) != neutral):
            yield name, f"only sampling uses it; give a {option('temperature')} above 0, or leave it out"
