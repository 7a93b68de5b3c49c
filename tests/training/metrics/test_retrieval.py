"""Retrieval compared with a slow reference."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.errors import DataError
from blip2edge.training.metrics.retrieval import (
    match_pairs,
    pairs_to_match,
    retrieval_scores,
    similarities,
    top_columns,
)


def test_the_nearest_of_a_pictures_vectors_counts() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(5, 3, 4)).astype(np.float32)
    texts = rng.normal(size=(7, 4)).astype(np.float32)
    slow = [[max(float(vector @ text) for vector in image) for text in texts] for image in images]
    np.testing.assert_allclose(similarities(images, texts), slow, rtol=1e-5)
    np.testing.assert_allclose(similarities(images[:, 0], texts), images[:, 0] @ texts.T, rtol=1e-6)


def test_recall_by_hand() -> None:
    # Three pictures with two texts each; texts 0 and 1 belong to picture 0, and so on.
    scores = np.array(
        [[0.9, 0.1, 0.8, 0.2, 0.0, 0.3], [0.7, 0.1, 0.2, 0.3, 0.4, 0.1], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]],
        np.float32,
    )
    figures = retrieval_scores(scores, [0, 0, 1, 1, 2, 2])
    assert figures["text_r1"] == pytest.approx(2 / 3)  # picture 1 is nearest to text 0
    assert figures["text_r5"] == 1.0
    # Text 1 is nearest to picture 2, texts 2 and 3 to pictures 0 and 2.
    assert figures["image_r1"] == pytest.approx(3 / 6)


def test_the_matching_head_puts_the_nearest_in_order_anew() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(6, 12)).astype(np.float32)
    belongs = [number // 2 for number in range(12)]
    pairs = pairs_to_match(scores, 4)
    assert all(set(top_columns(scores, 4)[image].tolist()) <= set(texts) for image, texts in pairs.items())
    # A head that knows the truth: what is right and among the first four comes first.
    matched = match_pairs(pairs, lambda image, texts: [float(belongs[text] == image) for text in texts])
    figures = retrieval_scores(scores, belongs, top=4, matched=matched)
    top = top_columns(scores, 4).tolist()
    assert figures["text_r1"] == sum(any(belongs[text] == row for text in top[row]) for row in range(6)) / 6
    columns = top_columns(np.ascontiguousarray(scores.T), 4).tolist()
    assert figures["image_r1"] == sum(belongs[text] in columns[text] for text in range(12)) / 12
    # It cannot reach beyond them.
    plain = retrieval_scores(scores, belongs)
    assert figures["text_r10"] == plain["text_r10"]


def test_equal_probabilities_leave_the_order_of_the_cosines() -> None:
    scores = np.array([[0.1, 0.9], [0.8, 0.2]], np.float32)
    matched = dict.fromkeys([(0, 0), (0, 1), (1, 0), (1, 1)], 1.0)
    assert retrieval_scores(scores, [1, 0], top=2, matched=matched)["text_r1"] == 1.0


def test_a_picture_without_a_text_is_refused() -> None:
    with pytest.raises(DataError, match="at least one text for each of 2"):
        retrieval_scores(np.zeros((2, 2), np.float32), [0, 0])


def test_ranking_of_lavis() -> None:
    """The first `top` candidates by logit plus cosine, as LAVIS' compute_sim_matrix and report_metrics."""
    generator = np.random.default_rng(0)
    count, each, top = 60, 3, 8
    owners = np.repeat(np.arange(count), each)
    cosines = generator.normal(0.2, 0.1, (count, count * each)).astype(np.float32)
    cosines[owners, np.arange(count * each)] += 0.2
    logits = generator.normal(0, 2, cosines.shape).astype(np.float32)
    logits[owners, np.arange(count * each)] += 3

    def lavis(rows: NDArray[np.float32], head: NDArray[np.float32]) -> list[int]:
        scores = np.full(rows.shape, -100.0)
        for row in range(len(rows)):
            nearest = np.argsort(-rows[row], kind="stable")[:top]
            scores[row, nearest] = head[row, nearest] + rows[row, nearest]
        return scores.argmax(axis=1).tolist()

    pairs = pairs_to_match(cosines, top)
    matched = match_pairs(pairs, lambda image, texts: (logits + cosines)[image, list(texts)].tolist())
    figures = retrieval_scores(cosines, owners.tolist(), top=top, matched=matched)
    assert figures["text_r1"] == np.mean([owners[best] == row for row, best in enumerate(lavis(cosines, logits))])
    assert figures["image_r1"] == np.mean([owners[row] == best for row, best in enumerate(lavis(cosines.T, logits.T))])
    assert 0.2 < figures["text_r1"] < 1.0
