"""The index of embeddings: originals, their order, and an index that is made again."""

from __future__ import annotations

import numpy as np

from blip2edge.bulk.duplicates import BLOCK, WIDTH, DuplicateIndex, Embedder


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
    assert found[0].similarity == np.round(1 / np.hypot(1, 0.1), 3) or abs(found[0].similarity - 0.995) < 1e-3
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
