"""``report.json`` and ``report.html``: everything that a calibration measured, for programs and for people.

The manifest keeps what a runtime or a later command reads; these keep the histograms, every tensor's reach, every
matrix's error and the captions of all pictures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blip2edge.bundle.dtypes import NUMPY_DTYPES
from blip2edge.bundle.integrity import FileRecord
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE
from blip2edge.calibration.activations.quantise import Job
from blip2edge.calibration.pictures import Picture
from blip2edge.calibration.report.page import REPORT_PAGE, page, shown_pictures, thumbnail
from blip2edge.calibration.results import Made
from blip2edge.calibration.search.agreement import Captions
from blip2edge.runtime.images.preprocess import load_image

REPORT = "report.json"
SCHEMA = 1


def tell(
    job: Job,
    title: str,
    pictures: Sequence[Picture],
    record: Mapping[str, Any],
    graphs: Mapping[str, Made],
    captions: Captions | None,
) -> dict[str, FileRecord]:
    """Writes both files to the staging directory.

    Args:
        job: The calibration.
        title: The new bundle's name.
        pictures: In order.
        record: The manifest's ``calibration`` object.
        graphs: By name.
        captions: How they agree; None where the model captions nothing.

    Returns:
        Their seals.
    """
    values = document(record, graphs)
    values["captions"] = _captions(pictures, captions)
    values["token_table"] = {
        "bytes": _bytes(job.staging / EMBEDDINGS_FILE),
        "parent_bytes": _bytes(job.parent.file(EMBEDDINGS_FILE)),
    }
    values["decode"] = _decode(job, graphs)
    write_report(job.staging / REPORT, values)
    thumbnails = {at: thumbnail(load_image(pictures[at].read())) for at in shown_pictures(values["captions"])}
    (job.staging / REPORT_PAGE).write_text(page(values, title, thumbnails), encoding="utf-8")
    return {name: FileRecord.of(job.staging / name) for name in (REPORT, REPORT_PAGE)}


def document(record: Mapping[str, Any], graphs: Mapping[str, Made]) -> dict[str, Any]:
    """The report's object.

    :func:`tell` adds ``captions`` (``picture``, ``parent`` and ``ours`` of each), ``token_table`` (``bytes`` and
    ``parent_bytes``) and ``decode`` (what a token reads, in bytes; null where nothing is generated).

    Args:
        record: The manifest's ``calibration`` object.
        graphs: By name.

    Returns:
        ``schema_version``, ``calibration`` (the record), and ``graphs``: for each its ``precision``, ``bytes`` and
        ``parent_bytes``, ``left`` (what stayed in floating point, with the reason), ``activations``
        (:func:`blip2edge.calibration.activations.quantise.details_of`), ``weights`` (the matrices of which the
        weights alone are integers: :class:`blip2edge.calibration.results.RoundedMatrix`) and ``headroom``
        (:func:`blip2edge.calibration.activations.headroom.to_json`; null where the graph was not run).
    """
    return {
        "schema_version": SCHEMA,
        "calibration": dict(record),
        "graphs": {
            name: {
                "precision": made.record.precision,
                "bytes": made.summary.bytes,
                "parent_bytes": made.summary.parent_bytes,
                "left": dict(made.summary.left),
                "activations": [dict(detail) for detail in made.details],
                "weights": {weight: dict(vars(matrix)) for weight, matrix in made.summary.matrices.items()},
                "headroom": None if made.headroom is None else dict(made.headroom),
            }
            for name, made in graphs.items()
        },
    }


def write_report(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the object as JSON; infinities and NaN have no place in it."""
    path.write_text(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _captions(pictures: Sequence[Picture], captions: Captions | None) -> list[dict[str, str]]:
    if captions is None:
        return []
    names = [Path(picture.member or picture.path).name for picture in pictures[: captions.pictures]]
    return [
        {"picture": name, "parent": parent, "ours": ours}
        for name, parent, ours in zip(names, captions.parent, captions.ours, strict=True)
    ]


def _decode(job: Job, graphs: Mapping[str, Made]) -> dict[str, int] | None:
    """What a token reads at the last position of the first caption; None where nothing is generated."""
    manifest, cache = job.parent.manifest, job.parent.manifest.cache
    if cache is None or DECODER not in graphs or not job.feeds.count(DECODER):
        return None
    dtypes = {tensor.name: tensor.dtype for tensor in graphs[DECODER].record.spec.inputs}
    size = NUMPY_DTYPES[dtypes[cache.past_names()[0]]].itemsize
    a_position = 2 * cache.num_layers * cache.num_heads * cache.head_dim * size
    positions = int(next(job.feeds.runs(DECODER, 1))["attention_mask"].shape[1])
    now = sum(_bytes(job.staging / file) for file in graphs[DECODER].record.data_files)
    before = sum(manifest.files[file].size for file in manifest.graphs[DECODER].data_files)
    return {
        "positions": positions,
        "cache_bytes_per_position": a_position,
        "weight_bytes": now,
        "parent_weight_bytes": before,
        "bytes": now + positions * a_position,
        "parent_bytes": before + positions * a_position,
    }


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
