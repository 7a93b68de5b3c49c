"""Writes what is not quantized in a calibrated bundle: copied files, the manifest, and its ``calibration`` object."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest
from blip2edge.bundle.trust.integrity import STAMPS, FileRecord
from blip2edge.calibration.agreement import CaptionAgreement
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.pictures import PictureSet
from blip2edge.calibration.results import CalibratedGraph, StagedGraph
from blip2edge.runtime.bench.certificate import reference_outputs
from blip2edge.version import __version__


def copied_graph(context: CalibrationContext, record: GraphRecord) -> StagedGraph:
    """Copies the files of a graph, unchanged, to the staging directory."""
    for file in record.files:
        shutil.copyfile(context.parent.file(file), context.staging / file)
    size = context.parent.manifest.graph_bytes(record)
    summary = CalibratedGraph(record.spec.name, record.precision, size, size, 0.0, 0, {}, {})
    return StagedGraph(record, {file: context.parent.manifest.files[file] for file in record.files}, summary)


def copy_rest(parent: Bundle, staging: Path) -> None:
    """Copies the files that belong to no graph (token embedding table, tokenizers), unless ``staging`` has them."""
    manifest = parent.manifest
    of_graphs = {file for record in manifest.graphs.values() for file in record.files}
    for file in manifest.files:
        if file not in of_graphs and file != reference_outputs.REFERENCE_OUTPUTS and not (staging / file).exists():
            shutil.copyfile(parent.file(file), staging / file)


def seal(context: CalibrationContext, graphs: Mapping[str, StagedGraph]) -> Manifest:
    """Returns the new manifest, with hash and size of each file of the staging directory; writes nothing."""
    seals = {file: seal for graph in graphs.values() for file, seal in graph.seals.items()}
    for path in sorted(context.staging.iterdir()):
        if path.name not in (*seals, MANIFEST, STAMPS):
            seals[path.name] = FileRecord.of(path)
    manifest = context.parent.manifest
    return replace(
        manifest,
        graphs={name: graph.record for name, graph in graphs.items()},
        files=seals,
        versions={**manifest.versions, "calibrated_by": __version__},
        confidence={},  # it was fitted on the parent
    )


def calibration_record(
    context: CalibrationContext,
    pictures: PictureSet,
    graphs: Mapping[str, StagedGraph],
    agreement: CaptionAgreement | None,
) -> dict[str, Any]:
    """Makes the manifest's ``calibration`` object: method, pictures, and the measured values of each graph."""
    return {
        "method": context.method,
        "pictures": len(pictures),
        "data_sha256": pictures.sha256,
        "parent_sha256": context.parent.sha256,
        "cosine": {
            name: {output: value.to_json() for output, value in graph.summary.cosine.items()}
            for name, graph in graphs.items()
            if graph.summary.cosine
        },
        "weights": {
            name: entry for name, graph in graphs.items() if (entry := graph.summary.weights_json()) is not None
        },
        "left_in_float": {
            name: dict(graph.summary.kept_float) for name, graph in graphs.items() if graph.summary.kept_float
        },
        "fp16": {
            name: {key: graph.headroom[key] for key in ("lowest", "keep_fp32")}
            for name, graph in graphs.items()
            if graph.headroom is not None
        },
        "captions": None if agreement is None else agreement.to_json(),
    }
