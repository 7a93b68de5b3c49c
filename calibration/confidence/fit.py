"""Fits maps from the features of a text to the probability that the text is right, and chooses one by cross-validation.

Candidates: the logistic function of one or of all features (Platt, 1999), and isotonic regression, a rising step
function (Zadrozny and Elkan, KDD 2002), over one feature or over the logistic's score. The candidate with the lowest
Brier score on held-out tenths is chosen. The Brier score is the mean square of (probability - right): it is high if the
order of the texts is wrong, and if the probabilities are wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2edge.runtime.decoding.confidence import FEATURES, ConfidenceMap

FOLDS = 10
RIDGE = 1.0  # on the weights of standardised features: keeps them finite where right and wrong texts do not overlap
ITERATIONS = 100
MOST_KNOTS = 256

Rows = NDArray[np.float64]
Right = NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """A fitted map from the features of a text to its confidence.

    The attributes become fields of ``ConfidenceMap``, if this map is chosen.
    """

    offset: float
    weights: tuple[float, ...]
    knots: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())


Fit = Callable[[Rows, Right], Score]


@dataclass(frozen=True)
class FittedMap:
    """The chosen candidate, fitted on all texts, and the measured values of all candidates.

    Attributes:
        kind: Name of the chosen candidate, a key of :data:`CANDIDATES`.
        score: The candidate, fitted on all texts.
        bounds: Lowest and highest probability: 0.5 / (N + 1) and 1 - 0.5 / (N + 1) for N texts.
        held_out: Probability of each text in ten-fold cross-validation: the fit does not contain the text, ``[N]``.
        brier: Brier score of each candidate in ten-fold cross-validation, by the candidate's name.
    """

    kind: str
    score: Score
    bounds: tuple[float, float]
    held_out: Rows
    brier: Mapping[str, float]


def fit_map(rows: Rows, right: Right, pictures: Sequence[Hashable] | None = None) -> FittedMap:
    """Fits all candidates and chooses the one with the lowest Brier score in ten-fold cross-validation.

    Args:
        rows: Features of N texts, ``[N, 3]``.
        right: Whether each text is right, ``[N]``.
        pictures: The picture of each text. The texts of one picture are held out together. None if every text has its
            own picture.
    """
    count = len(right)
    bounds = (0.5 / (count + 1), 1 - 0.5 / (count + 1))
    groups = list(range(count)) if pictures is None else list(pictures)
    numbers = {group: at for at, group in enumerate(dict.fromkeys(groups))}
    drawn = np.random.default_rng(0).permutation(len(numbers)) % FOLDS
    fold = drawn[[numbers[group] for group in groups]]
    held_out: dict[str, Rows] = {}
    for kind, fit in CANDIDATES.items():
        held_out[kind] = np.empty(count)
        for number in range(min(FOLDS, len(numbers))):
            left_out = fold == number
            score = fit(rows[~left_out], right[~left_out])
            held_out[kind][left_out] = probabilities(score, rows[left_out], bounds)
    brier = {kind: round(float(np.mean((values - right) ** 2)), 6) for kind, values in held_out.items()}
    best = min(brier, key=brier.__getitem__)  # of equal ones the first, which is simpler
    return FittedMap(best, CANDIDATES[best](rows, right), bounds, held_out[best], brier)


def probabilities(score: Score, rows: Rows, bounds: tuple[float, float]) -> Rows:
    """Returns the confidence of each of N texts from its three features (``rows``), as the runtime computes it."""
    found = ConfidenceMap("", None, {}, {}, 0, score.offset, score.weights, score.knots, bounds)
    return found.probabilities(rows)


def logistic(columns: tuple[int, ...]) -> Fit:
    """Returns a function that fits a logistic regression on some features, by Newton's method.

    The targets are Platt's: not 0 and 1 but the means under a uniform prior. So a fit on few pictures never gives the
    probability 0 or 1.

    Args:
        columns: Indices of the features.
    """

    def fit(rows: Rows, right: Right) -> Score:
        chosen = rows[:, columns]
        middle, spread = chosen.mean(axis=0), chosen.std(axis=0)
        spread = np.where(spread > 1e-9, spread, 1.0)
        inputs = np.column_stack([np.ones(len(chosen)), (chosen - middle) / spread])
        target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
        penalty = np.diag([1e-9, *[RIDGE] * len(columns)])
        found = np.zeros(inputs.shape[1])
        for _ in range(ITERATIONS):
            chances = 0.5 * (1.0 + np.tanh(0.5 * (inputs @ found)))
            slope = inputs.T @ (chances - target) + penalty @ found
            curve = (inputs * np.maximum(chances * (1 - chances), 1e-9)[:, None]).T @ inputs + penalty
            step = np.linalg.solve(curve, slope)
            found -= np.clip(step, -2.0, 2.0)
            if np.abs(step).max() < 1e-9:
                break
        weights = np.zeros(len(FEATURES))
        weights[list(columns)] = found[1:] / spread
        return Score(float(found[0] - weights[list(columns)] @ middle), tuple(weights.tolist()))

    return fit


def thinned(blocks: Sequence[list[float]]) -> list[list[float]]:
    """Returns at most :data:`MOST_KNOTS` blocks of an isotonic fit, evenly spaced, with the first and the last one."""
    places = np.linspace(0, len(blocks) - 1, min(len(blocks), MOST_KNOTS)).round().astype(int)
    return [blocks[at] for at in places.tolist()]


def isotonic(under: Fit) -> Fit:
    """Returns a function that fits an isotonic regression on the score of another fit (pool adjacent violators)."""

    def fit(rows: Rows, right: Right) -> Score:
        first = under(rows, right)
        scores = first.offset + rows @ np.array(first.weights)
        order = np.argsort(scores, kind="stable")
        blocks: list[list[float]] = []  # sum of scores, right texts, texts
        for at in order.tolist():
            blocks.append([float(scores[at]), float(right[at]), 1.0])
            while len(blocks) > 1 and blocks[-2][1] * blocks[-1][2] >= blocks[-1][1] * blocks[-2][2]:
                last = blocks.pop()
                blocks[-1] = [one + other for one, other in zip(blocks[-1], last, strict=True)]
        kept = thinned(blocks)
        places = tuple(total / count for total, _, count in kept)
        return Score(first.offset, first.weights, (places, tuple(good / count for _, good, count in kept)))

    return fit


_LOWEST, _SUM, _ALL = logistic((0,)), logistic((2,)), logistic((0, 1, 2))
CANDIDATES: dict[str, Fit] = {
    "logistic, sum": _SUM,
    "logistic, lowest": _LOWEST,
    "logistic, lowest + mean + sum": _ALL,
    "isotonic, sum": isotonic(_SUM),
    "isotonic, lowest": isotonic(_LOWEST),
    "isotonic, lowest + mean + sum": isotonic(_ALL),
}
"""Functions that fit the compared candidates, by the candidate's name; simple candidates are first."""
