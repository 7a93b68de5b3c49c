"""What a calibration tells of itself: a record a graph, and one for the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from blip2edge.calibration.agreement import Captions, Cosine
from blip2edge.manifest import FileRecord, GraphRecord


@dataclass(frozen=True)
class CalibratedGraph:
    """What became of a graph.

    Attributes:
        name: Its name.
        precision: As in the manifest.
        bytes, parent_bytes: Of graph and weights, now and before.
        seconds: To range and write it.
        products: Products that became INT8.
        left: Products that stayed in floating point, with the reason.
        cosine: To the parent's outputs on the parent's inputs, by output.
    """

    name: str
    precision: str
    bytes: int
    parent_bytes: int
    seconds: float
    products: int
    left: Mapping[str, str]
    cosine: Mapping[str, Cosine]


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
    """

    record: GraphRecord
    seals: Mapping[str, FileRecord]
    summary: CalibratedGraph
