"""CLIPScore and RefCLIPScore (Hessel et al., arXiv 2104.08718): captions scored by a model that compares vectors.

    CLIPScore(c, v) = 2.5 · max(cos(c, v), 0)                                                            equation 1
    RefCLIPScore(c, R, v) = harmonic mean of CLIPScore(c, v) and max(max over r in R of cos(c, r), 0)    equation 2

v is the vector of the picture, c the vector of the caption, R the vectors of the references. :data:`PREFIX` is put
before each text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]

WEIGHT = 2.5
"""The factor of equation 1; it brings the scores of CLIP into the range from 0 to 1."""

PREFIX = "A photo depicts "
"""Text that is put before each caption and each reference, as in the paper."""


def clip_score(pictures: Vectors, captions: Vectors) -> NDArray[np.float64]:
    """Computes CLIPScore of each caption.

    Args:
        pictures: Unit vectors of the pictures, ``[N, F]``; or ``[N, K, F]`` of a model with K vectors for each picture
            (BLIP-2). Then the vector nearest to the caption counts.
        captions: Unit vectors of the captions, ``[N, F]``.

    Returns:
        ``[N]``, from 0 to :data:`WEIGHT`.
    """
    each = pictures if pictures.ndim == 3 else pictures[:, None]
    cosines = np.einsum("nkf,nf->nk", each.astype(np.float64), captions.astype(np.float64)).max(axis=1)
    scores: NDArray[np.float64] = WEIGHT * np.maximum(cosines, 0.0)
    return scores


def ref_clip_score(
    scores: NDArray[np.float64], captions: Vectors, references: Sequence[Vectors]
) -> NDArray[np.float64]:
    """Computes RefCLIPScore of each caption.

    Args:
        scores: Result of :func:`clip_score`, ``[N]``.
        captions: Unit vectors of the captions, ``[N, F]``.
        references: For each caption the unit vectors of its references, ``[R_i, F]`` with at least one.

    Returns:
        ``[N]``; 0 if one of the two values in the harmonic mean is 0.
    """
    near = np.array([float((own @ caption).max()) for own, caption in zip(references, captions, strict=True)])
    near = np.maximum(near, 0.0)
    total = scores + near
    means: NDArray[np.float64] = np.divide(2 * scores * near, total, out=np.zeros_like(total), where=total > 0)
    return means


def mean_scores(
    pictures: Vectors,
    captions: Sequence[str],
    references: Sequence[Sequence[str]],
    embed: Callable[[Sequence[str]], Vectors],
) -> dict[str, float]:
    """Computes the mean scores of captions.

    Args:
        pictures: Unit vectors of the pictures, ``[N, F]``, or ``[N, K, F]`` if a picture has K vectors.
        captions: One caption of each picture.
        references: The references of each picture; if a picture has none, there is no RefCLIPScore.
        embed: Computes the unit vectors of texts.

    Returns:
        ``clip_score``, and ``ref_clip_score`` if there are references.
    """
    vectors = embed([PREFIX + caption for caption in captions])
    scores = clip_score(pictures, vectors)
    found = {"clip_score": float(scores.mean())}
    if all(references):
        known = embed([PREFIX + text for own in references for text in own])
        parts = np.split(known, np.cumsum([len(own) for own in references])[:-1])
        found["ref_clip_score"] = float(ref_clip_score(scores, vectors, parts).mean())
    return found
