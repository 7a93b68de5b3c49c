"""``report.json``: everything that a calibration measured, for people and for ``report.html``.

The manifest keeps what a runtime or a later command reads; this file keeps the histograms and every tensor's reach.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2edge.calibration.results import Made

REPORT = "report.json"
SCHEMA = 1


def document(record: Mapping[str, Any], graphs: Mapping[str, Made]) -> dict[str, Any]:
    """The report's object.

    Args:
        record: The manifest's ``calibration`` object.
        graphs: By name.

    Returns:
        ``schema_version``, ``calibration`` (the record), and ``graphs``: for each its ``precision``, ``bytes`` and
        ``parent_bytes``, ``left`` (what stayed in floating point, with the reason), ``activations``
        (:func:`blip2edge.calibration.activations.details_of`) and ``headroom``
        (:func:`blip2edge.calibration.headroom.to_json`; null where the graph was not run).
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
                "headroom": None if made.headroom is None else dict(made.headroom),
            }
            for name, made in graphs.items()
        },
    }


def write_report(path: Path, values: Mapping[str, Any]) -> None:
    """Writes the object as JSON; infinities and NaN have no place in it."""
    path.write_text(json.dumps(values, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
