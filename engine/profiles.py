"""Optimisation profiles: the ranges of shapes that an engine is made for, from a graph's axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blip2edge.contract import DECODER, Axis, GraphSpec

Range = tuple[int, int, int]
"""Smallest, best and largest length."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""The same of a whole shape."""

LONGEST_DRAFT = 16  # tokens that one verification checks


@dataclass(frozen=True)
class Profile:
    """One range for every dynamic axis of a graph.

    Attributes:
        name: What it is for.
        ranges: By the name of an elementary axis.
    """

    name: str
    ranges: Mapping[str, Range]

    def shapes(self, spec: GraphSpec) -> dict[str, Shapes]:
        """Smallest, best and largest shape of every input that varies."""
        found: dict[str, Shapes] = {}
        for tensor in spec.inputs:
            if any(isinstance(dim, Axis) for dim in tensor.dims):
                low, best, high = (
                    tensor.shape({name: bounds[end] for name, bounds in self.ranges.items()})
                    for end in range(3)
                )
                found[tensor.name] = (low, best, high)
        return found


DECODER_PROFILES: dict[str, dict[str, Range]] = {
    "prefill": {"past": (0, 0, 0), "steps": (1, 40, 1 << 30), "asked": (1, 1, 1)},
    "decode": {"past": (1, 64, 1 << 30), "steps": (1, 1, 1), "asked": (1, 1, 1)},
    "verify": {"past": (1, 64, 1 << 30), "steps": (2, 4, LONGEST_DRAFT), "asked": (2, 4, LONGEST_DRAFT)},
}
"""One engine, three uses; each range is cut to what the graph's own axis allows."""


def profiles_of(spec: GraphSpec) -> list[Profile]:
    """The profiles of a graph: three for a decoder, one for any other."""
    axes = spec.axes()
    uses = DECODER_PROFILES if spec.name == DECODER else {"default": {}}
    return [
        Profile(use, {name: _cut(axis, wanted.get(name)) for name, axis in axes.items()})
        for use, wanted in uses.items()
    ]


def _cut(axis: Axis, wanted: Range | None) -> Range:
    if wanted is None:
        return axis.min, axis.opt, axis.max
    low, best, high = (min(max(length, axis.min), axis.max) for length in wanted)
    return low, best, high
