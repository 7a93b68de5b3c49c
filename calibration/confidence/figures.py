"""Measures the quality of confidences: calibration error, reliability diagram, coverage and accuracy, order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Bins of the calibration error, of equal width, as in Guo et al. (ICML 2017, arXiv 1706.04599)."""

DIAGRAM_BINS = 10
COVERAGES = tuple(round(0.05 * step, 2) for step in range(1, 21))

Values = NDArray[np.float64]
Right = NDArray[np.bool_]


def reliability(confidences: Values, right: Right, bins: int = DIAGRAM_BINS) -> list[dict[str, float]]:
    """The reliability diagram: for each bin with texts, their number, mean confidence and share of right ones."""
    place = np.minimum((confidences * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            found.append(
                {
                    "texts": int(inside.sum()),
                    "confidence": round(float(confidences[inside].mean()), 4),
                    "right": round(float(right[inside].mean()), 4),
                }
            )
    return found


def calibration_error(confidences: Values, right: Right) -> float:
    """The expected calibration error: mean difference of confidence and share of right texts over the bins, 0 to 1."""
    rows = reliability(confidences, right, BINS)
    return float(sum(row["texts"] * abs(row["confidence"] - row["right"]) for row in rows) / len(right))


def accuracy_at(confidences: Values, right: Right, coverage: float) -> float:
    """Share of right texts among the most confident ones, which are the share ``coverage`` (0 to 1) of all texts."""
    count = max(1, round(coverage * len(right)))
    return float(right[np.argsort(-confidences, kind="stable")[:count]].mean())


def separation(values: Values, right: Right) -> float | None:
    """AUROC: probability that a right text has a larger value than a wrong one; None if all are right, or wrong."""
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return None
    order = np.sort(values)
    ranks = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2
    return float((ranks[right].sum() - good * (good + 1) / 2) / (good * bad))


def figures(confidences: Values, right: Right, coverages: Sequence[float] = COVERAGES) -> dict[str, Any]:
    """All figures as a JSON object: accuracy, calibration error, AUROC, reliability diagram, coverage curve.

    Args:
        confidences: Probabilities of N texts that were not used for the fit, ``[N]``.
        right: Whether each is right, ``[N]``.
        coverages: Shares of texts of the coverage curve.
    """
    auroc = separation(confidences, right)
    return {
        "accuracy": round(float(right.mean()), 4),
        "calibration_error": round(calibration_error(confidences, right), 4),
        "auroc": None if auroc is None else round(auroc, 4),
        "reliability": reliability(confidences, right),
        "coverage": [[share, round(accuracy_at(confidences, right, share), 4)] for share in coverages],
    }
