"""Measures the quality of confidences: calibration error, reliability diagram, accuracy by coverage, and AUROC."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
"""Number of bins of the calibration error, all of equal width, as in Guo et al. (ICML 2017, arXiv 1706.04599)."""

DIAGRAM_BINS = 10
COVERAGES = tuple(round(0.05 * step, 2) for step in range(1, 21))

Values = NDArray[np.float64]
Right = NDArray[np.bool_]


def reliability(confidences: Values, right: Right, bins: int = DIAGRAM_BINS) -> list[dict[str, float]]:
    """Returns the rows of the reliability diagram, one for each bin that contains texts.

    Each row has the number of texts (``texts``), their mean ``confidence``, and the share of right texts (``right``).
    """
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
    """Computes the expected calibration error, 0 to 1.

    Returns:
        The mean over the bins of |mean confidence - share of right texts|, weighted by the number of texts in the bin.
    """
    rows = reliability(confidences, right, BINS)
    return float(sum(row["texts"] * abs(row["confidence"] - row["right"]) for row in rows) / len(right))


def accuracy_at(confidences: Values, right: Right, coverage: float) -> float:
    """Returns the share of right texts among the texts with the highest confidence.

    Args:
        confidences: Confidences of N texts, ``[N]``.
        right: Whether each text is right, ``[N]``.
        coverage: The share of all texts that are counted, 0 to 1: those with the highest confidence.
    """
    count = max(1, round(coverage * len(right)))
    return float(right[np.argsort(-confidences, kind="stable")[:count]].mean())


def separation(values: Values, right: Right) -> float | None:
    """Computes the AUROC: the probability that a right text has a larger value than a wrong text.

    Returns:
        The AUROC, 0 to 1; None if all texts are right, or all are wrong.
    """
    good, bad = int(right.sum()), int((~right).sum())
    if not good or not bad:
        return None
    order = np.sort(values)
    ranks = (np.searchsorted(order, values, "left") + np.searchsorted(order, values, "right") + 1) / 2
    return float((ranks[right].sum() - good * (good + 1) / 2) / (good * bad))


def figures(confidences: Values, right: Right, coverages: Sequence[float] = COVERAGES) -> dict[str, Any]:
    """Returns all measured values as a JSON object.

    They are the accuracy, the calibration error, the AUROC, the reliability diagram and the coverage curve.

    Args:
        confidences: Probabilities of N texts that were not used for the fit, ``[N]``.
        right: Whether each text is right, ``[N]``.
        coverages: Shares of texts at which the accuracy is measured, for the coverage curve.
    """
    auroc = separation(confidences, right)
    return {
        "accuracy": round(float(right.mean()), 4),
        "calibration_error": round(calibration_error(confidences, right), 4),
        "auroc": None if auroc is None else round(auroc, 4),
        "reliability": reliability(confidences, right),
        "coverage": [[share, round(accuracy_at(confidences, right, share), 4)] for share in coverages],
    }
