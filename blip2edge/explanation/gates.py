"""Reads the gates of a Flamingo decoder: the tanh that multiplies what a gated layer adds (arXiv 2204.14198, 3.1.2)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

GATE = re.compile(r"^language\.cross_layers\.(?P<number>\d+)\.(?P<part>attention|feed_forward)_gate$")


@dataclass(frozen=True)
class Gate:
    """The gates of one gated layer: ``tanh(alpha)``, by which the layer's output is multiplied before it is added.

    A layer has one gate, or one gate for each channel. In the second case, the values here are the means of the
    absolute values of the gates.

    Attributes:
        layer: Number of the gated layer, from 0.
        before: Number of the language model's layer that follows the gated layer.
        attention: Gate of the attention to the pictures.
        feed_forward: Gate of the feed-forward.
        channels: Number of gates of the attention, and of the feed-forward.
    """

    layer: int
    before: int
    attention: float
    feed_forward: float
    channels: int

    def to_json(self) -> dict[str, Any]:
        """Returns the object for the list ``gates`` in ``explain.json``."""
        return dict(vars(self))


def read_gates(decoder: ir.Model, layers: int) -> list[Gate]:
    """Reads the gates from a decoder's graph; an empty list for a decoder without gated layers.

    Args:
        decoder: The decoder's graph.
        layers: Number of layers of the language model, without the gated layers.
    """
    found: dict[int, dict[str, Any]] = {}
    for name, value in decoder.graph.initializers.items():
        match = GATE.match(name)
        if match is not None and value.const_value is not None:
            opened = np.tanh(np.asarray(value.const_value.numpy(), np.float64)).ravel()
            found.setdefault(int(match["number"]), {})[match["part"]] = opened
    every = layers // max(len(found), 1)
    return [
        Gate(number, number * every, _one(parts["attention"]), _one(parts["feed_forward"]), parts["attention"].size)
        for number, parts in sorted(found.items())
    ]


def _one(values: Any) -> float:
    """Returns the only gate of a layer, or the mean of the absolute values of several gates."""
    return float(values[0]) if values.size == 1 else float(np.abs(values).mean())
