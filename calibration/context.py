"""Data shared by the steps of one calibration: the original bundle, staging directory, recorded inputs and options."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.schema import EMBEDDINGS_FILE
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.agreement import Cosine, compare_graphs
from blip2edge.calibration.batches import Feeds
from blip2edge.calibration.results import CalibratedGraph, MatrixSummary, StagedGraph
from blip2edge.progress import ProgressCallback


@dataclass(frozen=True)
class CalibrationContext:
    """Data that all steps of one calibration share: inputs, output directory and options.

    Attributes:
        parent: The bundle that is calibrated.
        staging: Directory in which the new bundle is written.
        feeds: The recorded inputs of each graph.
        method: How activation ranges are chosen (``--method``).
        threads: CPU threads; None for all cores.
        progress: Called with a stage's name, steps done and steps in all.
        warn: Called with a warning of one line.
        pictures_sha256: Hash of the pictures, in order.
    """

    parent: Bundle
    staging: Path
    feeds: Feeds
    method: str
    threads: int | None
    progress: ProgressCallback
    warn: Callable[[str], None]
    pictures_sha256: str

    @property
    def feeds_sha256(self) -> str:
        """Hash of the pictures and the original bundle, which together determine the recorded inputs."""
        return hashlib.sha256(f"{self.parent.sha256} {self.pictures_sha256}".encode()).hexdigest()

    def stage(
        self,
        model: ir.Model,
        record: GraphRecord,
        precision: str,
        data: Mapping[str, FileRecord],
        *,
        start: float,
        products: int,
        kept_float: Mapping[str, str],
        matrices: Mapping[str, MatrixSummary] | None = None,
    ) -> StagedGraph:
        """Writes a changed graph to the staging directory, checks it with onnx, and compares its outputs.

        The outputs are compared with those of the original graph on the recorded inputs.

        Args:
            model: The changed graph; its external weights are in the staging directory already.
            record: The graph's record in the manifest of the original bundle.
            precision: The graph's new precision. If ``products`` is 0, the graph keeps the original precision.
            data: Hash and size of the graph's weight files, by name.
            start: ``time.perf_counter()`` when work on the graph began.
            products: Number of quantized matrix multiplications (MatMul nodes).
            kept_float: Why a matrix multiplication is kept in floating point, by the name of its node or weight.
            matrices: Results for the matrices with weight-only quantization, by the initializer's name.
        """
        path = self.staging / record.spec.file
        ir.save(model, path)
        onnx.checker.check_model(str(path))
        seals = {path.name: FileRecord.of(path), **data}
        precision = precision if products else record.precision
        cosine = self._compare(record)
        summary = CalibratedGraph(
            name=record.spec.name,
            precision=precision,
            bytes=sum(seal.size for name, seal in seals.items() if name != EMBEDDINGS_FILE),
            parent_bytes=self.parent.manifest.graph_bytes(record),
            seconds=time.perf_counter() - start,
            products=products,
            kept_float=kept_float,
            cosine=cosine,
            matrices=matrices or {},
        )
        changed = replace(record, precision=precision, parity=(), data_files=tuple(data))
        return StagedGraph(changed, seals, summary)

    def _compare(self, record: GraphRecord) -> dict[str, Cosine]:
        """Returns the cosines of a new graph's outputs to the original outputs; empty if no inputs were recorded."""
        if not self.feeds.count(record.spec.name):
            return {}
        return compare_graphs(
            record.spec,
            self.parent.file(record.spec.file),
            self.staging / record.spec.file,
            self.feeds,
            threads=self.threads,
            progress=partial(self.progress, f"{record.spec.name}: compare"),
        )
