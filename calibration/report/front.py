"""Renders the section of ``report.html`` about a search: charts of the Pareto front, a table of format combinations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from blip2edge.charts import Mark, html_table, scatter

MOST_ROWS = 60
"""Largest number of combinations of formats in the table, unless more were measured.

All measured combinations are shown, then the predicted combinations with the least loss.
"""

HEADER = ("", "loss", "nats a token", "ms", "MB", "loss is", "vision", "bridge", "language", "flags of calibrate")


def search_section(search: Mapping[str, Any] | None) -> str:
    """Renders the results of a search as HTML; an empty text without a search.

    Args:
        search: The object ``search`` of ``report.json``.
    """
    if not search:
        return ""
    points, front = search["points"], set(search["front"])
    measured = [point for point in points if point["drop"] is not None]
    others = sorted((point for point in points if point["drop"] is None), key=lambda point: point["nats"])
    shown = measured + others[: max(MOST_ROWS - len(measured), 0)]
    by_ms = scatter(_marks(search, measured, front, "ms", 1.0), "ms of a caption", "nats a token")
    by_size = scatter(_marks(search, measured, front, "bytes", 1e-6), "MB", "nats a token")
    shown.sort(key=lambda point: (point["drop"] is None, point["ms"]))
    rows = (_row(search, point, front) for point in shown)
    hidden = f" {len(points) - len(shown)} predicted points are not shown." if len(points) > len(shown) else ""
    return (
        f"<p>{escape(_how(search))}</p><div class=wide>{by_ms}</div><div class=wide>{by_size}</div>"
        "<p class=note>Blue: the front, points that no measured point beats in loss, time and size. Grey: "
        "other measured points. Red: the published point. Hollow: what plain flags make. Axes are logarithmic.</p>"
        f"<details open><summary>{len(measured)} measured and {len(points) - len(measured)} predicted points</summary>"
        f"{html_table(HEADER, 'lrrrrlllll', rows)}</details><p class=note>{hidden}</p>"
    )


def _how(search: Mapping[str, Any]) -> str:
    changed = "% of the captions that differ from the original bundle's"
    loss = changed if search["loss"] == "captions" else "points of CIDEr"
    time = (
        f"CPU time on one thread of this machine ({search['processor']}), measured by stage, the least "
        f"of several turns, {'with' if search['optimized'] else 'without'} the optimized copies"
        if search["time"] == "measured"
        else f"predicted for {search['processor']} by its roofline; nothing was run there"
    )
    return (
        f"Loss: {loss}, on {search['pictures']} pictures; then the change of the next token in nats. Time: a caption "
        f"of {search['tokens']} tokens, {time}. Size: graphs and token table. Published: {search['rule']}."
    )


def _marks(
    search: Mapping[str, Any], points: Sequence[Mapping[str, Any]], front: set[str], key: str, unit: float
) -> list[Mark]:
    marks = []
    for point in points:
        flags = point["flags"]
        style = "bad" if flags == search["chosen"] else "now" if flags in front else "before"
        marks.append(Mark(point[key] * unit, point["nats"], style, point["preset"], f"{_figures(point)}: {flags}"))
    return marks


def _figures(point: Mapping[str, Any]) -> str:
    return f"{point['drop']:.1f} %, {point['ms']:.1f} ms, {point['bytes'] / 1e6:.1f} MB"


def _row(search: Mapping[str, Any], point: Mapping[str, Any], front: set[str]) -> tuple[str, ...]:
    flags, drop, names = point["flags"], point["drop"], point["names"]
    role = "published" if flags == search["chosen"] else "front" if flags in front else ""
    slower = "" if point["proven"] else "a part is not faster than in the original bundle"
    notes = [note for note in (point["preset"], slower) if note]
    return (
        f"<b>{role}</b>",
        "" if drop is None else f"{drop:.1f}",
        f"{point['nats']:.2g}",
        f"{point['ms']:.2f}",
        f"{point['bytes'] / 1e6:.2f}",
        "predicted" if drop is None else "measured",
        *(escape(names.get(part, "")) for part in ("vision_encoder", "bridge", "language")),
        f"<small>{escape(flags)}{''.join(f'<br>{escape(note)}' for note in notes)}</small>",
    )
