"""Compares visual tokens by their cosine: of two queries in one picture, and of one query in two pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array


@dataclass(frozen=True)
class Similarity:
    """The similarity of the visual tokens of the queries.

    Attributes:
        pictures: Number of pictures, N.
        matrix: float64 ``[Q, Q]``, the cosine of the visual tokens of two queries, averaged over the pictures.
        between: float64 ``[Q]``, the cosine of the visual tokens of one query in two different pictures, averaged over
            all pairs of pictures; None with fewer than two pictures. If the value is near 1, the visual token of this
            query hardly depends on the picture.
    """

    pictures: int
    matrix: NDArray[np.float64]
    between: NDArray[np.float64] | None

    @property
    def mean(self) -> float | None:
        """The mean cosine of two different queries; None with one query."""
        count = len(self.matrix)
        if count < 2:
            return None
        return float((self.matrix.sum() - np.trace(self.matrix)) / (count * (count - 1)))

    @property
    def most_alike(self) -> tuple[int, int, float] | None:
        """The two queries with the largest cosine, and this cosine; None with one query."""
        if len(self.matrix) < 2:
            return None
        upper = np.where(np.triu(np.ones_like(self.matrix), 1) > 0, self.matrix, -np.inf)
        one, other = np.unravel_index(int(upper.argmax()), upper.shape)
        return int(one), int(other), float(upper[one, other])

    def to_json(self) -> dict[str, Any]:
        """Returns the object ``similarity`` of ``explain.json``."""
        pair = self.most_alike
        return {
            "pictures": self.pictures,
            "mean": self.mean,
            "most_alike": None if pair is None else {"queries": list(pair[:2]), "cosine": pair[2]},
            "matrix": self.matrix.tolist(),
            "between_pictures": None if self.between is None else self.between.tolist(),
        }


class QueryComparison:
    """Sums of the cosines between visual tokens, over pictures that are added one by one.

    Memory does not grow with the number of pictures.
    """

    def __init__(self) -> None:
        self._pictures = 0
        self._products: NDArray[np.float64] | None = None  # [Q, Q]
        self._sums: NDArray[np.float64] | None = None  # [Q, D]

    def add(self, tokens: Array) -> None:
        """Adds the visual tokens of one picture, ``[Q, D]``."""
        rows = np.asarray(tokens, np.float64)
        units = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        products = units @ units.T
        self._products = products if self._products is None else self._products + products
        self._sums = units if self._sums is None else self._sums + units
        self._pictures += 1

    def result(self) -> Similarity:
        """Returns the similarity over all pictures that were added; there must be at least one.

        The mean over pairs of pictures comes from the sum s of the N unit vectors of a query:
        ``(|s|² - N) / (N (N - 1))``.
        """
        if self._products is None or self._sums is None:
            raise ValueError("no picture was added")
        count = self._pictures
        between = None
        if count > 1:
            between = ((self._sums**2).sum(axis=1) - count) / (count * (count - 1))
        return Similarity(count, self._products / count, between)
