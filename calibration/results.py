"""What a calibration tells of itself: a record a graph, and one for the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.integrity import FileRecord
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.calibration.activations.qdq import Plan
from blip2edge.calibration.search.agreement import Captions, Cosine


@dataclass(frozen=True)
class RoundedMatrix:
    """A matrix whose weights alone became integers.

    Attributes:
        bits, block: Its format.
        shape: K and N.
        error: Share of its output that rounding changed on the calibration's activations; None where none were seen.
        plain_error: The same for rounding to the nearest.
    """

    bits: int
    block: int
    shape: tuple[int, ...]
    error: float | None
    plain_error: float | None


@dataclass(frozen=True)
class CalibratedGraph:
    """What became of a graph.

    Attributes:
        name: Its name.
        precision: As in the manifest.
        bytes, parent_bytes: Of graph and weights, now and before.
        seconds: To range and write it.
        products: Products that became INT8, or whose weights became integers.
        left: Products that stayed in floating point, with the reason.
        cosine: To the parent's outputs on the parent's inputs, by output.
        matrices: Those of which the weights alone are integers, by the initializer's name.
    """

    name: str
    precision: str
    bytes: int
    parent_bytes: int
    seconds: float
    products: int
    left: Mapping[str, str]
    cosine: Mapping[str, Cosine]
    matrices: Mapping[str, RoundedMatrix] = field(default_factory=dict)

    def weights_json(self) -> dict[str, Any] | None:
        """The manifest's entry of a graph whose weights alone are integers; None for others.

        ``bits``, how many matrices have each ``block``, and the mean ``error`` and ``plain_error`` of those whose
        activations were seen.
        """
        if not self.matrices:
            return None
        told = list(self.matrices.values())
        seen = [(item.error, item.plain_error) for item in told if item.error is not None]
        means: list[float | None] = [None, None]
        if seen:
            means = [round(float(np.mean(column)), 6) for column in zip(*seen, strict=True)]
        return {
            "bits": told[0].bits,
            "blocks": {
                str(block): count for block, count in sorted(Counter(item.block for item in told).items())
            },
            "error": means[0],
            "plain_error": means[1],
        }


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration made.

    Attributes:
        bundle: The published directory.
        graphs: By name.
        captions: Agreement with the parent; None where the model captions nothing.
        pictures: How many were used.
        warnings: One line each.
        seconds: From start to end.
        peak_memory_bytes: Largest anonymous and shared memory of this process; 0 where it cannot be told.
    """

    bundle: Path
    graphs: Mapping[str, CalibratedGraph]
    captions: Captions | None
    pictures: int
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Made:
    """A graph in the staging directory.

    Attributes:
        record: Its entry in the new manifest.
        seals: Its files.
        summary: What became of it.
        details: An object an activation, for the report; empty where none became INT8.
        plan: What became INT8 in it; None where the weights alone are integers, or nothing.
        headroom: How far its tensors are from the largest fp16 number (``headroom.py``); None where it was not run.
    """

    record: GraphRecord
    seals: Mapping[str, FileRecord]
    summary: CalibratedGraph
    details: Sequence[Mapping[str, Any]] = ()
    headroom: Mapping[str, Any] | None = None
    plan: Plan | None = None
