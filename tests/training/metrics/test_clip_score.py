"""CLIPScore and RefCLIPScore against their formulas, written out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from blip2edge.training.metrics.clip_score import PREFIX, Vectors, clip_score, mean_scores, ref_clip_score


def unit(*values: float) -> Vectors:
    found = np.array(values, np.float32)
    return found / np.linalg.norm(found)


def test_the_formulas() -> None:
    pictures = np.stack([unit(1, 0), unit(1, 1), unit(-1, 0)])
    captions = np.stack([unit(1, 1), unit(1, 1), unit(1, 0)])
    scores = clip_score(pictures, captions)
    assert scores == pytest.approx([2.5 * math.sqrt(0.5), 2.5, 0.0])  # a negative cosine counts as 0
    references = [np.stack([unit(0, 1), unit(1, 1)]), np.stack([unit(1, 0)]), np.stack([unit(1, 0)])]
    near = math.sqrt(0.5)
    wanted = [2 * scores[0] / (scores[0] + 1), 2 * 2.5 * near / (2.5 + near), 0.0]
    assert ref_clip_score(scores, captions, references) == pytest.approx(wanted, rel=1e-6)
    opposed = [np.stack([unit(-1, -1)])] * 3
    assert ref_clip_score(scores, captions, opposed).tolist() == [0.0, 0.0, 0.0]


def test_of_several_vectors_the_nearest_counts() -> None:
    pictures = np.stack([np.stack([unit(0, 1), unit(1, 1)]), np.stack([unit(1, 0), unit(-1, 0)])])
    captions = np.stack([unit(1, 0), unit(1, 0)])
    assert clip_score(pictures, captions) == pytest.approx([2.5 * math.sqrt(0.5), 2.5])


def test_texts_have_the_prefix_of_the_paper_and_references_are_optional() -> None:
    seen: list[str] = []

    def embed(texts: Sequence[str]) -> Vectors:
        seen.extend(texts)
        return np.stack([unit(1, len(text)) for text in texts])

    pictures = np.stack([unit(1, 0), unit(0, 1)])
    found = mean_scores(pictures, ["a", "bc"], [["d"], ["e", "f"]], embed)
    assert seen == [PREFIX + text for text in ("a", "bc", "d", "e", "f")]
    assert PREFIX == "A photo depicts "
    assert found.keys() == {"clip_score", "ref_clip_score"}
    alone = mean_scores(pictures, ["a", "bc"], [[], []], embed)
    assert alone == {"clip_score": found["clip_score"]}
