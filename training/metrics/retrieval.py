"""Computes retrieval scores: how often the right text is found for a picture, and the right picture for a text.

Candidates are ranked by the cosine of vectors (ITC). The matching head (ITM) gets picture and text together, and is too
slow for all pairs. So only the first k candidates are ranked again with it (Li et al., arXiv 2107.07651, section 4.2):
by its probability, or as in LAVIS by its logit plus the cosine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.errors import DataError

Scores = NDArray[np.float32]
RANKS = (1, 5, 10)


def similarities(images: Scores, texts: Scores) -> Scores:
    """Computes the cosine similarities of pictures and texts.

    Args:
        images: Unit vectors, float32 [N, F], or [N, K, F] if a picture has K vectors.
        texts: Unit vectors, float32 [M, F].

    Returns:
        float32 [N, M]: for each pair, the largest cosine over the picture's vectors.
    """
    vectors = images[:, None] if images.ndim == 2 else images
    best = vectors[:, 0] @ texts.T
    for column in range(1, vectors.shape[1]):  # one vector at a time: [N, K, M] would not fit
        np.maximum(best, vectors[:, column] @ texts.T, out=best)
    return best


def top_columns(scores: Scores, count: int) -> NDArray[np.int64]:
    """Returns the columns of each row's largest values, largest first; of equal values, the first column comes first.

    Args:
        scores: The values, float32 [N, M].
        count: Number of columns to return for each row; all if there are fewer.

    Returns:
        Column numbers, int64 [N, min(count, M)].
    """
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]


def pairs_to_match(scores: Scores, top: int) -> dict[int, list[int]]:
    """Chooses the pairs of picture and text that the matching head scores.

    Args:
        scores: Cosines of N pictures and M texts, [N, M].
        top: Number of nearest texts for each picture, and of nearest pictures for each text.

    Returns:
        For each picture, the sorted numbers of the texts to match it with.
    """
    wanted = {image: set(texts.tolist()) for image, texts in enumerate(top_columns(scores, top))}
    for text, images in enumerate(top_columns(np.ascontiguousarray(scores.T), top)):
        for image in images.tolist():
            wanted[image].add(text)
    return {image: sorted(texts) for image, texts in wanted.items()}


def match_pairs(
    pairs: Mapping[int, Sequence[int]], match: Callable[[int, Sequence[int]], Sequence[float]]
) -> dict[tuple[int, int], float]:
    """Scores the chosen pairs with the matching head.

    Args:
        pairs: Result of `pairs_to_match`: the numbers of texts, by the picture's number.
        match: Maps the number of a picture and the numbers of some texts to their scores.

    Returns:
        The score of each pair, by (picture, text).
    """
    return {
        (image, text): float(score)
        for image, texts in pairs.items()
        for text, score in zip(texts, match(image, texts), strict=True)
    }


def _order(scores: Scores, top: int, matched: Mapping[tuple[int, int], float]) -> list[list[int]]:
    """Returns the candidates (column numbers) of each row of `scores`, best first.

    They are ordered by the cosine. Then those among the first `top` that have a score in `matched` are put first, in
    the order of these scores of the matching head.
    """
    rows: list[list[int]] = top_columns(scores, max(top, *RANKS)).tolist()
    for row, columns in enumerate(rows):
        head = [column for column in columns[:top] if (row, column) in matched]
        head.sort(key=lambda column: (-matched[row, column], -scores[row, column]))
        rows[row] = head + [column for column in columns if column not in set(head)]
    return rows


def _recall(orders: Sequence[Sequence[int]], right: Sequence[set[int]], name: str) -> dict[str, float]:
    return {
        f"{name}_r{rank}": sum(bool(set(order[:rank]) & wanted) for order, wanted in zip(orders, right, strict=True))
        / len(orders)
        for rank in RANKS
    }


def retrieval_scores(
    scores: Scores,
    image_of_text: Sequence[int],
    *,
    top: int = 0,
    matched: Mapping[tuple[int, int], float] | None = None,
) -> dict[str, float]:
    """Computes recall at 1, 5 and 10, of texts for pictures and of pictures for texts.

    Args:
        scores: Cosines of N pictures and M texts [N, M].
        image_of_text: Number of each text's picture; a picture may have several texts.
        top: Number of nearest candidates that `matched` ranks again.
        matched: Scores of the matching head by (picture, text); None or empty to rank only by the cosine.

    Returns:
        `text_r1`, `text_r5`, `text_r10`: share of pictures with one of their texts among the first 1, 5, 10;
        `image_r1` …: share of texts with their picture among them.

    Raises:
        DataError: A picture has no text, or `scores` and `image_of_text` differ in the number of texts.
    """
    images, texts = scores.shape
    if texts != len(image_of_text) or set(image_of_text) != set(range(images)):
        raise DataError(
            f"expected at least one text for each of {images} pictures, and {texts} texts in all, got"
            f" {len(image_of_text)} texts for {len(set(image_of_text))} pictures"
        )
    right: list[set[int]] = [set() for _ in range(images)]
    for text, image in enumerate(image_of_text):
        right[image].add(text)
    matched = matched or {}
    swapped = {(text, image): value for (image, text), value in matched.items()}
    by_image = _order(scores, top, matched)
    by_text = _order(np.ascontiguousarray(scores.T), top, swapped)
    return _recall(by_image, right, "text") | _recall(by_text, [{image} for image in image_of_text], "image")
