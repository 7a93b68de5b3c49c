"""The Pareto front of a search, and the point that is published."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="graphs are changed with onnx_ir")

from blip2edge.calibration.search.front import (
    FormatPoint,
    PointLimits,
    allowed,
    choose_point,
    pareto,
    to_measure,
)
from blip2edge.errors import BundleError, UsageError


def point(name: str, ms: float, mb: float, drop: float | None, nats: float = 0.0, proven: bool = True) -> FormatPoint:
    return FormatPoint({}, name, ms, {}, int(mb * 1e6), nats, drop, proven)


POINTS = (
    point("parent", 50, 100, 0.0),
    point("int8", 20, 30, 0.0, 1e-3),
    point("int4", 15, 20, 9.0, 1e-2),
    point("mixed", 16, 22, 3.0, 5e-3),
    point("small", 40, 15, 1.0, 8e-3, proven=False),
    point("worse than int8", 21, 31, 0.0, 2e-3),
)


def test_the_front_is_what_no_point_beats() -> None:
    assert [one.flags for one in pareto(POINTS)] == ["int4", "mixed", "int8", "small", "parent"]


def test_a_point_does_not_beat_an_equal_one() -> None:
    twice = [point("a", 1, 1, 0.0), point("b", 1, 1, 0.0)]
    assert pareto(twice) == twice


def test_where_as_many_captions_change_the_next_token_decides() -> None:
    assert point("a", 1, 1, 0.0, 0.1).beats(point("b", 1, 1, 0.0, 0.2))
    assert not point("a", 1, 1, 1.0, 0.1).beats(point("b", 1, 1, 0.0, 0.2))


def test_no_point_of_a_random_front_is_beaten_and_all_others_are() -> None:
    rng = np.random.default_rng(0)
    every = [point(str(at), rng.random() + 0.1, rng.random() + 0.1, 0.0, rng.random()) for at in range(60)]
    front = pareto(every)
    assert not any(one.beats(other) for one, other in itertools.permutations(front, 2))
    assert all(any(one.beats(other) for one in front) for other in every if other not in front)


@pytest.mark.parametrize(
    ("limits", "name", "rule"),
    [
        (PointLimits(), "int8", "the fastest point at which at most 1 % of the captions change"),
        (PointLimits(drop=4), "mixed", "the fastest point within --max-drop 4"),
        (PointLimits(drop=0), "int8", "the fastest point within --max-drop 0"),
        (PointLimits(ms=17), "mixed", "the point with the least loss within --max-ms 17"),
        (PointLimits(mb=25), "mixed", "the point with the least loss within --max-mb 25"),
        (PointLimits(mb=16), "small", "the point with the least loss within --max-mb 16"),
        (PointLimits(drop=5, mb=29), "mixed", "the fastest point within --max-drop 5, --max-mb 29"),
    ],
)
def test_the_published_point(limits: PointLimits, name: str, rule: str) -> None:
    chosen = choose_point(POINTS, limits)
    assert (chosen.point.flags, chosen.rule) == (name, rule)


def test_a_point_within_the_limits_that_is_not_proven_faster() -> None:
    """The one predicate: with --max-ms it is not allowed, and the error gives the reason; with --max-mb it is."""
    points = [point("parent", 50, 100, 0.0), point("small", 40, 15, 1.0, proven=False)]
    assert not allowed(points, PointLimits(ms=45))
    assert [one.flags for one in allowed(points, PointLimits(mb=20))] == ["small"]
    with pytest.raises(BundleError, match=r"45 and proven faster.* \(small\), which has a part that is not"):
        choose_point(points, PointLimits(ms=45))


def test_points_to_measure_hold_the_fastest_proven_one_within_the_limits() -> None:
    unproven = [point(f"unproven {at}", 10 + at, 30 - at, None, 1e-3, proven=False) for at in range(9)]
    proven = point("proven", 30, 40, None, 2e-3)
    assert proven in to_measure([*unproven, proven], PointLimits(ms=35), 4)


@pytest.mark.parametrize(
    ("limits", "nearest"),
    [(PointLimits(drop=0, ms=18), "int8"), (PointLimits(ms=14), "int4"), (PointLimits(mb=14), "small")],
)
def test_limits_that_no_point_keeps(limits: PointLimits, nearest: str) -> None:
    with pytest.raises(BundleError, match=rf"within .*; the nearest is drop .* MB \({nearest}\)"):
        choose_point(POINTS, limits)


@pytest.mark.parametrize(("name", "value"), [("drop", -1.0), ("ms", float("nan")), ("mb", -5.0)])
def test_limits_below_zero(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"max_{name} must be at least 0"):
        PointLimits(**{name: value})


def test_points_to_measure_hold_the_best_of_each_figure_and_of_the_limits() -> None:
    rng = np.random.default_rng(1)
    every = [point(str(at), rng.random() + 0.1, rng.random() + 0.1, None, rng.random()) for at in range(80)]
    chosen = to_measure(every, PointLimits(ms=0.6), 8)
    within = [one for one in every if one.ms <= 0.6]
    assert len(chosen) == 8
    for best in (min(every, key=lambda one: one.ms), min(within, key=lambda one: one.nats)):
        assert best in chosen
