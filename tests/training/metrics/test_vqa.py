"""VQA accuracy; the expected values come from the challenge's program."""

from __future__ import annotations

import pytest

from blip2edge.errors import DataError
from blip2edge.training.metrics.vqa import answer_accuracy, normalise_answer, vqa_scores


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("The Dog.", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("a red, big house!", "red big house"),
        ("black/white", "black white"),  # between two letters a sign becomes a blank,
        ("black / white", "black white"),  # beside a blank it goes
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("p.m.", "pm"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yalld've", "yalld've"),  # two apostrophes missing: not recognised
        ("somebody'd", "somebodyd"),  # as the challenge's table has it
        (" on\nthe\ttable ", "on table"),
        ("x-ray", "x ray"),
    ],
)
def test_normalising(given: str, expected: str) -> None:
    assert normalise_answer(given) == expected


def test_ten_people() -> None:
    truths = ["red"] * 2 + ["Blue."] * 3 + ["green"] * 5
    assert answer_accuracy("Green", truths) == 1.0
    # Left out in turn: 8 of the 10 times two others said red, twice one other: (8·2/3 + 2·1/3) / 10.
    assert answer_accuracy("red", truths) == pytest.approx(0.6)
    # Three said blue: 7 times three of nine, 3 times two of nine.
    assert answer_accuracy("the blue", truths) == pytest.approx(0.9)
    assert answer_accuracy("pink", truths) == 0.0


def test_where_all_agree_nothing_is_rewritten() -> None:
    assert answer_accuracy("Yes", ["yes"] * 10) == 0.0
    assert answer_accuracy(" yes\n", ["yes"] * 10) == 1.0


def test_a_single_true_answer_is_right_or_wrong() -> None:
    assert answer_accuracy("The 2", ["two"]) == 1.0
    assert answer_accuracy("3", ["two"]) == 0.0


def test_by_kind() -> None:
    scores = vqa_scores(
        ["yes", "no", "2"],
        [["yes"] * 10, ["yes"] * 10, ["2"] * 10],
        [{"answer_type": "yes/no"}, {"answer_type": "yes/no"}, {"answer_type": "number"}],
    )
    assert scores == {"vqa_accuracy": pytest.approx(2 / 3), "answer_type": {"number": 1.0, "yes/no": 0.5}}


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="got 0"):
        vqa_scores([], [], [])
    with pytest.raises(DataError, match="has no true answer"):
        answer_accuracy("yes", [])
