"""Caption scores compared with recorded results of pycocoevalcap and its Java tokenizer."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from blip2edge.errors import DataError
from blip2edge.training.metrics.captions import (
    bleu,
    caption_scores,
    cider_d,
    common_subsequence,
    rouge_l,
)
from blip2edge.training.metrics.tokens import tokens, words

CAPTIONS = Path(__file__).parents[2] / "data" / "captions"


def recorded(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((CAPTIONS / name).read_text(encoding="utf-8"))
    return content


def test_the_example_of_pycocoevalcap_scores_the_same() -> None:
    example = recorded("coco_example.json")
    pictures = example["pictures"]
    scores = caption_scores(
        [picture["caption"] for picture in pictures], [picture["references"] for picture in pictures]
    )
    assert scores == pytest.approx(example["expected"], rel=1e-12)


def test_words_are_those_of_the_treebank_tokenizer() -> None:
    lines = recorded("tokens.json")["lines"]
    assert len(lines) > 250
    assert [words(text) for text, _ in lines] == [expected for _, expected in lines]


def test_punctuation_is_seen_and_not_counted() -> None:
    assert tokens("A dog's bed, isn't it?") == ["a", "dog", "'s", "bed", ",", "is", "n't", "it", "?"]
    assert words('"." - ...') == ""
    assert words("A\nb") == "a b"


def plain_subsequence(one: list[str], other: list[str]) -> int:
    """The textbook's table."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for row, word in enumerate(one):
        for column, against in enumerate(other):
            both = table[row][column] + 1
            either = max(table[row][column + 1], table[row + 1][column])
            table[row + 1][column + 1] = both if word == against else either
    return table[-1][-1]


def test_the_quick_common_subsequence_is_the_slow_one() -> None:
    draw = random.Random(0)
    for _ in range(500):
        one, other = ([draw.choice("abcd") for _ in range(draw.randint(0, 12))] for _ in range(2))
        assert common_subsequence(one, other) == plain_subsequence(one, other)


def test_bleu_by_hand() -> None:
    # Two of three words are there ("the" is clipped to 1), no bigram is: BLEU-2 is all but 0. Length 3 against 4.
    scores = bleu(["the the cat"], [["the black cat sat"]])
    assert scores[0] == pytest.approx(2 / 3 * math.exp(1 - 4 / 3))
    assert scores[1] < 1e-6
    # The reference nearest in length counts, the shorter one of two.
    assert bleu(["a b c"], [["a b c d", "a b"]])[0] == pytest.approx(1.0)


def test_cider_by_hand() -> None:
    # Two pictures, all words different: every n-gram of a right caption has the same weight, so cosines are 1.
    assert cider_d(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]]) == pytest.approx(10.0)
    # The same one word short of the reference: one bigram fewer, a Gaussian of width 6.
    shorter = cider_d(["a b c", "e f g h"], [["a b c d"], ["e f g h"]])
    cosines = [math.sqrt(3 / 4), math.sqrt(2 / 3), math.sqrt(1 / 2), 0.0]
    assert shorter == pytest.approx((10 * math.exp(-1 / 72) * sum(cosines) / 4 + 10.0) / 2)


def test_saying_nothing_scores_nothing() -> None:
    references = [["a dog on a mat"], ["two cats"]]
    scores = caption_scores(["", "."], references)
    assert all(value < 1e-6 for value in scores.values())
    assert rouge_l(["a dog on a mat", "two cats"], references) == pytest.approx(1.0)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(DataError, match="got 1"):
        caption_scores(["a"], [["a"], ["b"]])
    with pytest.raises(DataError, match="got 0"):
        caption_scores([], [])
    with pytest.raises(DataError, match="1 of 2 have none"):
        caption_scores(["a", "b"], [["a"], []])
