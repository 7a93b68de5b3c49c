"""Writes ``report.json`` and ``report.html``: all measurements of a calibration, as data and as a page.

The manifest holds what the runtime and other commands need. The reports also hold the histograms, the largest value of
every tensor, the error of every matrix and the captions of all pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2edge.bundle.dtypes import NUMPY_DTYPES
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE
from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.agreement import CaptionAgreement
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.pictures import CalibrationPicture
from blip2edge.calibration.report.files import REPORT, REPORT_PAGE, SCHEMA
from blip2edge.calibration.report.page import report_page, shown_pictures, thumbnail
from blip2edge.calibration.results import StagedGraph
from blip2edge.picture_files import printable


def write_reports(
    context: CalibrationContext,
    title: str,
    pictures: Sequence[CalibrationPicture],
    record: Mapping[str, Any],
    graphs: Mapping[str, StagedGraph],
    captions: CaptionAgreement | None,
    search: Mapping[str, Any] | None = None,
) -> dict[str, FileRecord]:
    """Writes ``report.json`` and the HTML report to the staging directory.

    Args:
        context: The calibration.
        title: The new bundle's name.
        pictures: The pictures, in order.
        record: The manifest's ``calibration`` object.
        graphs: The graphs, by name.
        captions: Agreement of the captions with those of the original bundle; None if the model generates no captions.
        search: The results of ``--search``, the object ``search`` of the report; None without a search.

    Returns:
        Hash and size of each file, by name.

    Raises:
        ValueError: A measurement is infinite or NaN.
    """
    values = report_document(record, graphs)
    values["captions"] = _captions(pictures, captions)
    values["token_table"] = {
        "bytes": _bytes(context.staging / EMBEDDINGS_FILE),
        "parent_bytes": _bytes(context.parent.path / EMBEDDINGS_FILE),
    }
    values["decode"] = _decode(context, graphs)
    if search is not None:
        values["search"] = dict(search)
    text = json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n"
    (context.staging / REPORT).write_text(text, encoding="utf-8")
    thumbnails = {at: thumbnail(pictures[at].image()) for at in shown_pictures(values["captions"])}
    (context.staging / REPORT_PAGE).write_text(report_page(values, title, thumbnails), encoding="utf-8")
    return {name: FileRecord.of(context.staging / name) for name in (REPORT, REPORT_PAGE)}


def report_document(record: Mapping[str, Any], graphs: Mapping[str, StagedGraph]) -> dict[str, Any]:
    """Makes the object of ``report.json``, without the entries that need files.

    :func:`write_reports` adds ``captions`` (for each picture: its name ``picture``, the original bundle's caption
    ``parent``, and the new bundle's caption ``ours``), ``token_table`` (``bytes`` and ``parent_bytes``), ``decode``
    (bytes that are read for one token; null if nothing is generated) and, after a search, ``search``
    (:func:`blip2edge.calibration.search.pipeline.search_json`).

    Args:
        record: The manifest's ``calibration`` object.
        graphs: The graphs, by name.

    Returns:
        ``schema_version``, ``calibration`` (the record), and ``graphs``: for each graph its ``precision``, ``bytes``
        and ``parent_bytes``, ``left`` (matrix multiplications kept in floating point, with the reason), ``activations``
        (:func:`blip2edge.calibration.activations.quantize.activation_details`), ``weights`` (matrices whose weights
        alone are integers: :class:`blip2edge.calibration.results.MatrixSummary`) and ``headroom``
        (:func:`blip2edge.calibration.activations.headroom.headroom_json`; null if the graph was not run).
    """
    return {
        "schema_version": SCHEMA,
        "calibration": dict(record),
        "graphs": {
            name: {
                "precision": graph.record.precision,
                "bytes": graph.summary.bytes,
                "parent_bytes": graph.summary.parent_bytes,
                "left": dict(graph.summary.kept_float),
                "activations": [dict(detail) for detail in graph.details],
                "weights": {weight: dict(vars(matrix)) for weight, matrix in graph.summary.matrices.items()},
                "headroom": None if graph.headroom is None else dict(graph.headroom),
            }
            for name, graph in graphs.items()
        },
    }


def _captions(pictures: Sequence[CalibrationPicture], captions: CaptionAgreement | None) -> list[dict[str, str]]:
    if captions is None:
        return []
    names = [printable(Path(picture.member or picture.path).name) for picture in pictures[: captions.pictures]]
    return [
        {"picture": name, "parent": parent, "ours": ours}
        for name, parent, ours in zip(names, captions.parent, captions.ours, strict=True)
    ]


def _decode(context: CalibrationContext, graphs: Mapping[str, StagedGraph]) -> dict[str, int] | None:
    """Counts the bytes that the decoder reads from memory to generate one token.

    The KV cache is counted as full as after the first recorded run of the decoder (a prompt and its caption).

    Returns:
        Bytes of the weights and the KV cache, of this bundle and of the original bundle; None if no inputs of the
        decoder were recorded.
    """
    manifest, cache = context.parent.manifest, context.parent.manifest.cache
    if cache is None or DECODER not in graphs or not context.feeds.count(DECODER):
        return None
    dtypes = {tensor.name: tensor.dtype for tensor in graphs[DECODER].record.spec.inputs}
    size = NUMPY_DTYPES[dtypes[cache.past_names()[0]]].itemsize
    per_position = 2 * cache.num_layers * cache.num_heads * cache.head_dim * size
    positions = int(next(context.feeds.runs(DECODER, 1))["attention_mask"].shape[1])
    now = sum(_bytes(context.staging / file) for file in graphs[DECODER].record.data_files)
    before = sum(manifest.files[file].size for file in manifest.graphs[DECODER].data_files)
    return {
        "positions": positions,
        "cache_bytes_per_position": per_position,
        "weight_bytes": now,
        "parent_weight_bytes": before,
        "bytes": now + positions * per_position,
        "parent_bytes": before + positions * per_position,
    }


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
