"""Computes the Pareto front (combinations of formats that no other beats), and chooses the published combination."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blip2edge.calibration.formats import FormatRule
from blip2edge.errors import BundleError, UsageError, option

DEFAULT_DROP = 1.0
"""Without limits, at most this share of the captions may change, in percentage points."""


@dataclass(frozen=True)
class PointLimits:
    """The limits of ``--max-drop``, ``--max-ms`` and ``--max-mb``; None for no limit.

    Attributes:
        drop: Largest loss of the captions, in percentage points.
        ms: Largest time of a caption, in milliseconds.
        mb: Largest size of graphs and token embedding table, in millions of bytes.
    """

    drop: float | None = None
    ms: float | None = None
    mb: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not value >= 0:
                raise UsageError(f"{option(f'max_{name}')} must be at least 0, not {value:g}", field=f"max_{name}")

    def excess(self, point: FormatPoint) -> float:
        """Returns how far a combination exceeds the limits: the sum of the excesses as shares of the limits, or 0."""
        found = ((self.drop, point.drop), (self.ms, point.ms), (self.mb, point.bytes / 1e6))
        return sum(
            max(value - most, 0.0) / max(most, 1.0) if most is not None and value is not None else 0.0
            for most, value in found
        )

    def words(self, name_of: Callable[[str], str] = option) -> str:
        """Returns the limits that are set in one line; ``name_of`` writes the option name of each limit."""
        given = ((name_of(f"max_{name}"), value) for name, value in vars(self).items() if value is not None)
        return ", ".join(f"{name} {value:g}" for name, value in given)

    def flags(self) -> str:
        """Returns the limits that are set as flags, in one line."""
        return self.words(lambda name: f"--{name.replace('_', '-')}")


@dataclass(frozen=True)
class FormatPoint:
    """One combination of formats (for vision encoder, bridge and language model), and its measured values.

    Attributes:
        names: Name of the format of each part, by the part's name.
        flags: The flags with which ``calibrate`` makes the combination without a search.
        ms: Milliseconds of a caption.
        stages: Milliseconds of each stage.
        bytes: Size of graphs and token embedding table.
        nats: Change of the next token (Kullback-Leibler divergence from the original model), in nats per token. Until
            it is measured for the combination, it is the sum of the changes by each part alone.
        drop: Loss of the captions in percentage points; None until it is measured.
        proven: Whether each part with a new format was measured to be faster than in its original format.
        preset: ``--weights`` with its value if these formats need no ``--format``, or the words "the original bundle";
            empty for all other combinations.
    """

    names: Mapping[str, str]
    flags: str
    ms: float
    stages: Mapping[str, float]
    bytes: int
    nats: float
    drop: float | None = None
    proven: bool = True
    preset: str = ""

    @property
    def loss(self) -> tuple[float, float]:
        """The key that orders combinations by loss: the loss of captions, then the change of the next token."""
        return (0.0 if self.drop is None else self.drop, self.nats)

    def beats(self, other: FormatPoint) -> bool:
        """Returns whether this combination is better than ``other`` in loss, time or size, and worse in none."""
        no_worse = self.loss <= other.loss and self.ms <= other.ms and self.bytes <= other.bytes
        return no_worse and (self.loss, self.ms, self.bytes) != (other.loss, other.ms, other.bytes)

    def text(self) -> str:
        """Returns the measured values and the flags in one line."""
        drop = "" if self.drop is None else f"drop {self.drop:.1f} points, "
        return f"{drop}{self.ms:.1f} ms, {self.bytes / 1e6:.1f} MB ({self.flags})"

    def to_json(self) -> dict[str, Any]:
        """Returns the combination and its measured values as a JSON object for ``report.json``."""
        return {
            **vars(self),
            "names": dict(self.names),
            "ms": round(self.ms, 4),
            "stages": {stage: round(ms, 4) for stage, ms in self.stages.items()},
            "nats": float(f"{self.nats:.4g}"),
        }


def pareto(points: Sequence[FormatPoint]) -> list[FormatPoint]:
    """Returns the combinations that no other combination beats, the fastest first."""
    return sorted(
        (point for point in points if not any(other.beats(point) for other in points)),
        key=lambda point: (point.ms, point.loss, point.bytes),
    )


def allowed(points: Sequence[FormatPoint], limits: PointLimits) -> list[FormatPoint]:
    """Returns the combinations that may be published: within the limits, and with every part proven faster.

    If there is no such combination and ``--max-mb`` is given, all combinations within the limits are returned: they may
    be needed for their small size.
    """
    within = [point for point in points if not limits.excess(point)]
    proven = [point for point in within if point.proven]
    return proven or (within if limits.mb is not None else [])


def to_measure(points: Sequence[FormatPoint], limits: PointLimits, most: int) -> list[FormatPoint]:
    """Chooses the combinations of formats whose captions will be compared with those of the original bundle.

    First, up to six combinations are chosen: the combinations with the least time, the least size and the least loss,
    once on the predicted Pareto front and once among the combinations that may be published. After that, the
    combination of the front with the largest distance from the chosen combinations is added repeatedly. The distance is
    computed from the logarithms of time, size and loss.

    Args:
        points: All combinations, with predicted loss.
        limits: The limits of the user.
        most: Largest number of combinations.
    """
    front = pareto(points)
    sets = [among for among in (front, allowed(points, limits)) if among]
    first = [min(among, key=key) for among in sets for key in (_by_ms, _by_bytes, _by_loss)]
    chosen = list({point.flags: point for point in first}.values())
    rest = [point for point in front if point not in chosen]
    while rest and len(chosen) < most:
        best = max(rest, key=lambda point: min(_distance(point, other, front) for other in chosen))
        chosen.append(best)
        rest.remove(best)
    return chosen[:most]


def _by_ms(point: FormatPoint) -> tuple[Any, ...]:
    return point.ms, point.loss, point.bytes


def _by_bytes(point: FormatPoint) -> tuple[Any, ...]:
    return point.bytes, point.loss, point.ms


def _by_loss(point: FormatPoint) -> tuple[Any, ...]:
    return point.loss, point.ms, point.bytes


def _distance(one: FormatPoint, other: FormatPoint, front: Sequence[FormatPoint]) -> float:
    """Computes the distance of two combinations; time, size and loss are divided by their ranges on the front."""
    total = 0.0
    for mine, theirs, *values in zip(*map(_logarithms, (one, other, *front)), strict=True):
        span = max(values) - min(values) or 1.0
        total += ((mine - theirs) / span) ** 2
    return math.sqrt(total)


def _logarithms(point: FormatPoint) -> tuple[float, float, float]:
    return math.log(point.ms), math.log(point.bytes), math.log(point.nats + 1e-6)


@dataclass(frozen=True)
class ChosenPoint:
    """The combination of formats that is published, and the rule by which it was chosen."""

    point: FormatPoint
    rule: str


def choose_point(points: Sequence[FormatPoint], limits: PointLimits) -> ChosenPoint:
    """Chooses the combination of formats that is published.

    - Without limits: the fastest combination at which at most :data:`DEFAULT_DROP` percent of the captions change. The
      original formats are such a combination.
    - With ``--max-drop``: the fastest combination within all limits.
    - With ``--max-ms`` or ``--max-mb`` and no ``--max-drop``: the combination with the least loss within the limits.

    A combination with a part that was not proven faster than in its original format is chosen only if ``--max-mb`` is
    given and no other combination is within the limits.

    Args:
        points: The measured combinations.
        limits: The limits.

    Raises:
        BundleError: No combination is within the limits.
    """
    given = PointLimits(DEFAULT_DROP) if limits == PointLimits() else limits
    among = allowed(points, given)
    if among and given.drop is not None:
        rule = FASTEST if limits == PointLimits() else f"the fastest point within {given.flags()}"
        return ChosenPoint(min(among, key=_by_ms), rule)
    if among:
        return ChosenPoint(min(among, key=_by_loss), f"the point with the least loss within {limits.flags()}")
    nearest = min(points, key=lambda point: (given.excess(point), _by_ms(point)))
    beyond = given.excess(nearest) > 0
    why = "" if beyond else ", which has a part that is not proven faster than in the original bundle"
    raise BundleError(
        f"no combination of formats is within {given.words()}{'' if beyond else ' and proven faster'}; "
        f"the nearest is {nearest.text()}{why}",
        "give other limits and run the command again; it reuses the stored measurements",
    )


FASTEST = f"the fastest point at which at most {DEFAULT_DROP:g} % of the captions change"


@dataclass(frozen=True)
class FoundPoints:
    """The result of a search: all combinations of formats, and the published one.

    Attributes:
        points: All combinations; a combination with a ``drop`` is measured, the others are predicted.
        front: The measured combinations that no measured combination beats.
        chosen: The published combination.
        rules: The formats of the published combination, as rules of ``calibrate``.
        cpu_s: CPU seconds of the search, with those of earlier runs that were killed.
    """

    points: Sequence[FormatPoint]
    front: Sequence[FormatPoint]
    chosen: ChosenPoint
    rules: Sequence[FormatRule]
    cpu_s: float
