"""Makes TensorRT's optimization profiles, which say for which shapes of the inputs an engine is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from blip2edge.bundle.schema import DECODER, Axis, GraphSpec, TensorSpec

Range = tuple[int, int, int]
"""Smallest length of an axis, the length that TensorRT optimizes for, and the largest length."""

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest shape of an input, the shape that TensorRT optimizes for, and the largest shape."""

LONGEST_DRAFT = 16  # tokens that one verification checks


@dataclass(frozen=True)
class Profile:
    """An optimization profile: the range of every dynamic axis of a graph.

    Attributes:
        name: The profile's purpose: ``prefill``, ``decode``, ``verify`` or ``default``.
        ranges: Smallest, best and largest length of each axis, by the axis's name. Axes such as ``past + steps`` are
            computed from these.
    """

    name: str
    ranges: Mapping[str, Range]

    def shapes(self, spec: GraphSpec) -> dict[str, Shapes]:
        """Returns the smallest, best and largest shape of every input with a dynamic axis, by input name."""
        found: dict[str, Shapes] = {}
        for tensor in spec.inputs:
            if any(isinstance(dim, Axis) for dim in tensor.dims):
                low, best, high = (
                    tensor.shape({name: bounds[end] for name, bounds in self.ranges.items()}) for end in range(3)
                )
                found[tensor.name] = (low, best, high)
        return found


PROMPT = 40  # tokens of a prompt, if the number of visual tokens is not known

DECODER_PROFILES: dict[str, dict[str, Range]] = {
    "prefill": {"past": (0, 0, 0), "steps": (1, PROMPT, 1 << 30), "asked": (1, 1, 1)},
    "decode": {"past": (1, 64, 1 << 30), "steps": (1, 1, 1), "asked": (1, 1, 1)},
    "verify": {"past": (1, 64, 1 << 30), "steps": (2, 4, LONGEST_DRAFT), "asked": (2, 4, LONGEST_DRAFT)},
}
"""Profiles of a decoder's engine: for each profile the (smallest, best, largest) length of its axes.

``past``: filled slots of the KV cache; ``steps``: new tokens; ``asked``: new tokens whose logits are computed. Each
range is clipped to the range of the graph's axis.
"""


def profiles_of(spec: GraphSpec, prompt: int = PROMPT) -> list[Profile]:
    """Makes the optimization profiles of a graph: three profiles for a decoder, one profile for any other graph.

    Args:
        spec: The graph's inputs and outputs.
        prompt: Usual number of tokens in a prefill, with visual tokens; TensorRT chooses kernels for this length.
    """
    axes = spec.axes()
    uses = DECODER_PROFILES if spec.name == DECODER else {"default": {}}
    found = []
    for use, wanted in uses.items():
        ranges = dict(wanted)
        if use == "prefill":
            low, _, high = ranges["steps"]
            ranges["steps"] = (low, max(low, prompt), high)
        found.append(Profile(use, {name: _clipped(axis, ranges.get(name)) for name, axis in axes.items()}))
    return found


def with_rows(spec: GraphSpec, most_rows: int | None) -> GraphSpec:
    """Returns ``spec`` with the largest length of the axis ``batch`` set to ``most_rows``; None changes nothing."""
    if most_rows is None:
        return spec

    def resized(tensor: TensorSpec) -> TensorSpec:
        dims = tuple(
            replace(dim, max=most_rows) if isinstance(dim, Axis) and dim.name == "batch" else dim for dim in tensor.dims
        )
        return replace(tensor, dims=dims)

    return GraphSpec(spec.name, tuple(map(resized, spec.inputs)), tuple(map(resized, spec.outputs)))


def _clipped(axis: Axis, wanted: Range | None) -> Range:
    if wanted is None:
        return axis.min, axis.opt, axis.max
    low, best, high = (min(max(length, axis.min), axis.max) for length in wanted)
    return low, best, high
