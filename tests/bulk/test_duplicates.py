"""The index of embeddings: originals, their order, and an index that is made again."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from blip2edge.bulk.duplicates import BLOCK, WIDTH, DuplicateIndex, Embedder
from blip2edge.bulk.options import BulkOptions
from blip2edge.errors import UsageError


def vectors(*rows: tuple[float, ...]) -> np.ndarray:
    wide = np.zeros((len(rows), WIDTH), np.float16)
    for at, row in enumerate(rows):
        wide[at, : len(row)] = np.array(row) / np.linalg.norm(row)
    return wide


def test_a_duplicate_names_the_most_similar_earlier_original() -> None:
    index = DuplicateIndex(0.9)
    assert index.find([3, 4, 5], vectors((1, 0), (0, 1), (1, 0.1)))[:2] == [None, None]
    found = index.find([7, 8, 9], vectors((0.1, 1), (0, 0, 1), (1, 0.05)))
    assert [None if one is None else one.number for one in found] == [4, None, 3]
    assert found[0] is not None
    assert found[0].similarity == pytest.approx(1 / np.hypot(1, 0.1), abs=1e-4)
    (last,) = index.find([10], vectors((1, 0.1)))  # a duplicate is never an original: 5 is not named
    assert last is not None
    assert last.number == 3


def test_an_index_that_is_restored_finds_the_same() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal((BLOCK + 40, WIDTH)).astype(np.float32)
    values[50::7] = values[3] + 0.05 * values[50::7]
    values = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    index, kept = DuplicateIndex(0.95), []
    found = []
    for at in range(0, len(values), 16):
        numbers = list(range(at, min(at + 16, len(values))))
        originals = index.find(numbers, values[at : at + 16])
        found += originals
        kept += [number for number, one in zip(numbers, originals, strict=True) if one is None]
    assert {one.number for one in found if one is not None} == {3}
    assert len(kept) < len(values) - 500
    restored, half = DuplicateIndex(0.95), 2048
    restored.restore([number for number in kept if number < half], values[[number for number in kept if number < half]])
    again = []
    for at in range(half, len(values), 16):
        again += restored.find(list(range(at, min(at + 16, len(values)))), values[at : at + 16])
    assert again == found[half:]


def test_embeddings_have_length_one_and_keep_angles() -> None:
    tokens = np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32)
    tokens[1] = tokens[0] * 2 + 0.01
    embeddings = Embedder()({"visual_tokens": tokens}).astype(np.float32)
    assert embeddings.shape == (3, WIDTH)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-3)
    assert embeddings[0] @ embeddings[1] > 0.99
    assert abs(embeddings[0] @ embeddings[2]) < 0.6


def test_identical_pictures_are_duplicates_at_the_threshold_1() -> None:
    random = np.random.default_rng(2)
    tokens = np.repeat(random.standard_normal((25, 1, 4, 64)).astype(np.float32), 2, axis=1).reshape(50, 4, 64)
    embeddings, index, restored = Embedder()({"visual_tokens": tokens}), DuplicateIndex(1.0), DuplicateIndex(1.0)
    found = index.find(range(50), embeddings)
    assert [None if one is None else one.number for one in found] == [
        number - 1 if number % 2 else None for number in range(50)
    ]
    restored.restore(range(0, 50, 2), embeddings[::2])
    again = restored.find(range(50, 75), embeddings[1::2])
    assert [one and (one.number, one.similarity) for one in again] == [(number, 1.0) for number in range(0, 50, 2)]


def test_an_opposite_picture_is_not_compared_with_unused_rows() -> None:
    index = DuplicateIndex(0.0)
    index.find([0], vectors((1, 0)))
    assert index.find([1], vectors((-1, 0))) == [None]  # its cosine with an unused row would be 0
    for threshold in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(UsageError, match="expected duplicates above 0 and at most 1"):
            BulkOptions(Path("bundle"), duplicates=threshold)
