"""The generated scenes: their content, the held-out split, and that they never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from blip2edge.errors import UsageError
from blip2edge.training.data.scenes import (
    COLOURS,
    PICTURE_SIZE,
    RELATIONS,
    SHAPES,
    SIZES,
    all_captions,
    all_pairs,
    coverage,
    make_scene,
    scenes,
    split_pairs,
)


def test_there_is_enough_to_tell_apart() -> None:
    assert len(SHAPES) >= 6
    assert len(COLOURS) >= 8
    assert len(SIZES) == 2
    assert len(RELATIONS) == 4
    assert len(all_pairs()) == len(set(all_pairs())) == 1008


def test_the_splits_are_disjoint_and_complete() -> None:
    train, heldout = ({frozenset(pair) for pair in split_pairs(split)} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(heldout) == 200
    assert train | heldout == {frozenset(pair) for pair in all_pairs()}
    singles = {kind for pair in train for kind in pair}
    assert len(singles) == len(COLOURS) * len(SHAPES), "every object alone is seen in training"


def test_scenes_keep_to_their_split() -> None:
    train = {frozenset(pair) for pair in split_pairs("train")}
    for split, inside in (("train", True), ("heldout", False)):
        for scene in scenes(200, split=split):  # type: ignore[arg-type]
            assert (frozenset((scene.first.kind, scene.second.kind)) in train) == inside


def test_captions_of_the_splits_are_disjoint() -> None:
    train, heldout = set(all_captions("train")), set(all_captions("heldout"))
    assert not train & heldout
    assert all(scene.caption in train for scene in scenes(50))
    assert all(scene.caption in heldout for scene in scenes(50, split="heldout"))


def test_the_caption_is_canonical() -> None:
    for scene in scenes(300, seed=5):
        one, two = scene.first, scene.second
        assert one.colour < two.colour, "the order of naming is alphabetical"
        across, down = one.x - two.x, one.y - two.y
        seen = ("left" if across < 0 else "right") if abs(across) > abs(down) else ("above" if down < 0 else "below")
        assert scene.relation == seen
        assert abs(abs(across) - abs(down)) >= 5.0, "no one could dispute the relation"
        assert max(abs(across), abs(down)) > one.radius + two.radius, "the objects do not touch"
        assert scene.caption == f"{one.phrase} {RELATIONS[scene.relation]} {two.phrase}"


def test_objects_lie_within_the_picture() -> None:
    for scene in scenes(300, seed=6):
        assert scene.picture.size == (PICTURE_SIZE, PICTURE_SIZE)
        assert scene.picture.mode == "RGB"
        for thing in (scene.first, scene.second):
            assert min(thing.x, thing.y) > thing.radius
            assert max(thing.x, thing.y) < PICTURE_SIZE - thing.radius
            assert coverage(thing, 8).any(), "every object covers the centre of a patch"


def test_a_scene_depends_on_its_number_only() -> None:
    alone = make_scene(7, seed=3)
    within = list(scenes(10, seed=3))[7]
    assert alone.caption == within.caption
    assert np.array_equal(np.asarray(alone.picture), np.asarray(within.picture))
    others = [make_scene(8, seed=3), make_scene(7, seed=4), make_scene(7, seed=3, split="heldout")]
    pixels = np.asarray(alone.picture)
    assert not any(np.array_equal(np.asarray(other.picture), pixels) for other in others)


def test_the_captions_of_a_series_never_change() -> None:
    text = "\n".join(scene.caption for scene in scenes(100, split="heldout", seed=1000))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "ab6c925861ad9069"


@pytest.mark.parametrize(("index", "seed"), [(-1, 0), (0, -1)])
def test_numbers_and_seeds_below_zero_are_refused(index: int, seed: int) -> None:
    with pytest.raises(UsageError, match="at least 0"):
        make_scene(index, seed=seed)


def test_another_split_is_refused() -> None:
    with pytest.raises(UsageError, match="heldout, train"):
        make_scene(0, split="test")  # type: ignore[arg-type]
