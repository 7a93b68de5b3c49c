"""Holds the results of a calibration: a record of each graph, and the report of the whole run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.activations.qdq import ActivationPlan
from blip2edge.calibration.agreement import CaptionAgreement, Cosine
from blip2edge.calibration.confidence.pipeline import ConfidenceReport


@dataclass(frozen=True)
class MatrixSummary:
    """The result of weight-only quantization for one matrix.

    Attributes:
        bits: Bits of an integer, 4 or 8.
        block: Number of rows that share a scale.
        shape: K and N, number of inputs and outputs.
        error: Relative change of the matrix's output that rounding causes, on the recorded activations; None if no
            activations were recorded.
        plain_error: The same relative change if the matrix is rounded to nearest, as a baseline.
    """

    bits: int
    block: int
    shape: tuple[int, ...]
    error: float | None
    plain_error: float | None


@dataclass(frozen=True)
class CalibratedGraph:
    """How one graph was calibrated.

    Attributes:
        name: The graph's name.
        precision: The graph's precision in the new manifest.
        bytes: Size of graph and weights in bytes.
        parent_bytes: Size of the original graph and weights in bytes.
        seconds: Time to quantize, write and compare the graph.
        products: Number of matrix multiplications (MatMul nodes) that became INT8, or whose weights became integers.
        kept_float: Why a matrix multiplication is kept in floating point, by the name of its node or weight.
        cosine: Similarity to the original graph's outputs on the original graph's inputs, by output name.
        matrices: Results for the matrices with weight-only quantization, by the initializer's name.
    """

    name: str
    precision: str
    bytes: int
    parent_bytes: int
    seconds: float
    products: int
    kept_float: Mapping[str, str]
    cosine: Mapping[str, Cosine]
    matrices: Mapping[str, MatrixSummary] = field(default_factory=dict)

    def weights_json(self) -> dict[str, Any] | None:
        """Returns the manifest's entry of a graph with weight-only quantization; None for other graphs.

        The entry has ``bits`` (of the matrix with the fewest bits), the number of matrices of each block size
        (``blocks``), and the mean ``error`` and ``plain_error`` of the matrices whose activations were observed.
        """
        if not self.matrices:
            return None
        matrices = list(self.matrices.values())
        errors = [(item.error, item.plain_error) for item in matrices if item.error is not None]
        means: list[float | None] = [None, None]
        if errors:
            means = [round(float(np.mean(column)), 6) for column in zip(*errors, strict=True)]
        return {
            "bits": min(item.bits for item in matrices),
            "blocks": {str(block): count for block, count in sorted(Counter(item.block for item in matrices).items())},
            "error": means[0],
            "plain_error": means[1],
        }


@dataclass(frozen=True)
class CalibrationReport:
    """The result of :func:`calibrate`.

    Attributes:
        bundle: The directory of the new bundle.
        graphs: The graphs, by name.
        captions: Agreement with the captions of the original bundle; None if the model generates no captions.
        pictures: Number of pictures used.
        warnings: Warnings, one line each.
        seconds: Wall time of the calibration.
        peak_memory_bytes: Largest anonymous and shared memory of this process; 0 if it cannot be measured.
        confidence: The fitted confidence; None if no references were given.
    """

    bundle: Path
    graphs: Mapping[str, CalibratedGraph]
    captions: CaptionAgreement | None
    pictures: int
    warnings: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    confidence: ConfidenceReport | None = None


@dataclass(frozen=True)
class StagedGraph:
    """A calibrated graph in the staging directory.

    Attributes:
        record: The graph's record in the new manifest.
        seals: Hash and size of each of the graph's files, by name.
        summary: How the graph was calibrated.
        details: One object per INT8 activation, for the report.
        headroom: The ``headroom`` object of the report (``headroom.py``); None if the headroom was not measured.
        plan: The graph's INT8 activations; None if no activation became INT8.
    """

    record: GraphRecord
    seals: Mapping[str, FileRecord]
    summary: CalibratedGraph
    details: Sequence[Mapping[str, Any]] = ()
    headroom: Mapping[str, Any] | None = None
    plan: ActivationPlan | None = None
