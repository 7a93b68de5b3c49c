"""Hallucination metrics: objects that a caption names and the picture does not show."""

from __future__ import annotations

import pytest

from blip2edge.errors import DataError
from blip2edge.training.data.scenes import scenes
from blip2edge.training.metrics.hallucination import (
    NEGATIVES,
    chair,
    pope,
    pope_questions,
    said_yes,
    things_named,
    things_shown,
)


def test_things_are_read_off_a_caption() -> None:
    assert things_named("a small blue ring above a large red circle") == [("blue", "ring"), ("red", "circle")]
    assert things_named("A circle, and a green SQUARE.") == [("", "circle"), ("green", "square")]
    assert things_named("a photo of a cat") == []


def test_every_scene_names_what_it_shows() -> None:
    for scene in scenes(50):
        assert tuple(things_named(scene.caption)) == things_shown(scene)


def test_chair_by_hand() -> None:
    shown = [[("red", "circle"), ("blue", "ring")]] * 4
    captions = [
        "a red circle above a blue ring",
        "a red circle above a green ring",  # the ring is green: not there
        "a circle",  # there, and the ring is not named
        "",
    ]
    figures = chair(captions, shown)
    assert figures["chair_i"] == pytest.approx(1 / 5)
    assert figures["chair_s"] == pytest.approx(1 / 4)
    assert figures["chair_recall"] == pytest.approx(3 / 8)


def test_probes_are_half_true_and_near_where_they_say_so() -> None:
    shown = [things_shown(scene) for scene in scenes(40, split="heldout")]
    asked = pope_questions(shown, seed=1)
    assert asked == pope_questions(shown, seed=1)
    assert asked != pope_questions(shown, seed=2)
    for probe in asked:
        assert (probe.thing in shown[probe.picture]) == probe.there
    for name in NEGATIVES:
        assert sum(probe.negatives == name for probe in asked) == sum(probe.there for probe in asked) == 80
    pairs = zip(asked[0::4], asked[3::4], strict=True)
    assert all((one.thing[0] == other.thing[0]) != (one.thing[1] == other.thing[1]) for one, other in pairs)
    assert asked[0].question == f"Is there a {asked[0].thing[0]} {asked[0].thing[1]} in the picture?"


def test_pope_of_one_who_knows_and_of_one_who_says_yes() -> None:
    asked = pope_questions([things_shown(scene) for scene in scenes(10)])
    knows = pope(asked, [probe.there for probe in asked])["adversarial"]
    assert knows == {"accuracy": 1.0, "precision": 1.0, "recall": 1.0, "f1": 1.0, "yes": 0.5}
    nods = pope(asked, [True] * len(asked))["random"]
    assert nods == {"accuracy": 0.5, "precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "yes": 1.0}


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, there is.", True),
        ("no", False),
        ("There isn't one.", False),
        ("It is not. Yes.", False),
        ("", False),
    ],
)
def test_yes_and_no_in_words(answer: str, yes: bool) -> None:
    assert said_yes(answer) is yes


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(DataError, match="got 0"):
        chair([], [])
    with pytest.raises(DataError, match="got 1"):
        pope([], [True])
