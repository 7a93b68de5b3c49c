"""Finds near-duplicates: pictures whose embeddings have a cosine similarity of at least a threshold.

The embedding of a picture is the mean of its visual tokens (output of the bridge), projected to 256 numbers by a fixed
random matrix. The projection keeps distances within a few percent (Johnson and Lindenstrauss, 1984). The embeddings of
a million pictures take 1 GB. A picture is compared with all earlier pictures that are no duplicates themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.bulk.rows import DIGITS, Original
from blip2edge.bundle.dtypes import Array

WIDTH = 256
"""Number of values in an embedding."""

BLOCK = 4096
"""Number of embeddings in one matrix multiplication. It is constant, so that a resumed run has the same rounding."""

_SEED = 0
_SOURCES = ("visual_tokens", "image_embeds")

Embeddings = NDArray[np.float16]


class Embedder:
    """Computes the embedding of each picture, from its visual tokens or, without a bridge, from its vision features."""

    def __init__(self) -> None:
        self._matrix: NDArray[np.float32] | None = None

    def __call__(self, pictures: Mapping[str, Array]) -> Embeddings:
        """Returns the embeddings of B pictures, float16 ``[B, 256]``; each row is a unit vector.

        Args:
            pictures: Outputs of the graphs by name: ``visual_tokens`` or ``image_embeds``, first axis B.
        """
        tokens = np.asarray(next(pictures[name] for name in _SOURCES if name in pictures), np.float32)
        means = tokens.reshape(len(tokens), -1, tokens.shape[-1]).mean(axis=1)
        if self._matrix is None:
            random = np.random.default_rng(_SEED)
            self._matrix = random.standard_normal((means.shape[1], WIDTH), dtype=np.float32)
        projected = means @ self._matrix
        norms = np.linalg.norm(projected, axis=1, keepdims=True)
        embeddings: Embeddings = (projected / np.maximum(norms, np.float32(1e-12))).astype(np.float16)
        return embeddings


class DuplicateIndex:
    """Holds the embeddings of all pictures that are no duplicates, in the order of the source, and searches them.

    Args:
        threshold: The smallest cosine of a duplicate and its original, above 0 and at most 1.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._blocks: list[NDArray[np.float32]] = []
        self._numbers: list[int] = []

    def find(self, numbers: Sequence[int], embeddings: Embeddings) -> list[Original | None]:
        """Finds the original of each picture, and adds the pictures that have none.

        Args:
            numbers: Numbers of the pictures in the source, ascending.
            embeddings: Embeddings of the pictures, float16 ``[B, 256]``.

        Returns:
            For each picture the most similar earlier picture; None if no cosine reaches the threshold.
        """
        vectors = _normalized(embeddings)
        best, places = np.full(len(vectors), -np.inf, np.float32), np.zeros(len(vectors), np.int64)
        for block, values in enumerate(self._blocks):
            used = len(self._numbers) - block * BLOCK
            cosines = (values @ vectors.T)[:used]
            top = cosines.argmax(axis=0)
            found = cosines[top, np.arange(len(vectors))]
            better = found > best
            best[better], places[better] = found[better], block * BLOCK + top[better]
        earlier = len(self._numbers)
        within = vectors @ vectors.T
        originals: list[Original | None] = []
        for at, number in enumerate(numbers):
            candidates = [(float(best[at]), int(places[at]))] if earlier else []
            candidates += [
                (float(within[at, other]), earlier + place)
                for place, other in enumerate(other for other in range(at) if originals[other] is None)
            ]
            similarity, place = max(candidates, key=lambda one: one[0], default=(-np.inf, 0))
            similarity = round(similarity, DIGITS)
            duplicate = similarity >= self._threshold
            originals.append(Original(self._numbers[place], min(1.0, similarity)) if duplicate else None)
            if not duplicate:
                self._add(number, vectors[at])
        return originals

    def restore(self, numbers: Sequence[int], embeddings: Embeddings) -> None:
        """Adds pictures of a part of the output that an earlier run finished.

        Args:
            numbers: Numbers of the part's pictures that are no duplicates.
            embeddings: Embeddings of these pictures, float16 ``[len(numbers), 256]``.
        """
        for number, vector in zip(numbers, _normalized(embeddings), strict=True):
            self._add(number, vector)

    def _add(self, number: int, vector: NDArray[np.float32]) -> None:
        place = len(self._numbers) % BLOCK
        if place == 0:
            self._blocks.append(np.zeros((BLOCK, WIDTH), np.float32))
        self._blocks[-1][place] = vector
        self._numbers.append(number)


def _normalized(embeddings: Embeddings) -> NDArray[np.float32]:
    """Returns the embeddings in float32, scaled to length 1 again: rounding to float16 changed the length a little."""
    values = embeddings.astype(np.float32)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    normalized: NDArray[np.float32] = (values / np.maximum(norms, 1e-12)).astype(np.float32)
    return normalized
