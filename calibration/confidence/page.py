"""Renders the section of ``report.html`` about the confidence: measured values, reliability diagram, coverage curve."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from blip2edge.charts import element, html_page, html_table, label, svg

BEGIN, END = "<!--confidence-->", "<!--/confidence-->"
SIDE, LEFT, TOP = 240, 52, 14  # px of a square chart, its left and upper margins


def with_section(page: str | None, title: str, confidence: Mapping[str, Any]) -> str:
    """Returns a report page with the section about the confidence, which replaces an older one.

    Args:
        page: The report of the calibration; None for a page with this section alone.
        title: The bundle's name.
        confidence: The manifest's ``confidence`` object.
    """
    part = BEGIN + "".join(_task(task, record) for task, record in confidence.items()) + END
    if page is None:
        head = f"<header><h1>{escape(title)}</h1><p>The bundle is a copy; only its confidence was fitted.</p></header>"
        return html_page(f"{title}: confidence", head + part)
    if BEGIN in page and END in page:
        return page[: page.index(BEGIN)] + part + page[page.index(END) + len(END) :]
    return page.replace("</main>", f"{part}</main>", 1)


def _task(task: str, record: Mapping[str, Any]) -> str:
    found = record["figures"]
    auroc = "–" if found["auroc"] is None else f"{found['auroc']:.3f}"
    half = dict(map(tuple, found["coverage"])).get(0.5, found["accuracy"])
    tiles = (
        (f"{found['accuracy']:.1%}", f"of {record['pictures']} texts are right ({record['right_if']})"),
        (f"{found['calibration_error']:.2%}", "expected calibration error, on pictures left out of the fit"),
        (f"{half:.1%}", "of the half with the higher confidence are right"),
        (auroc, "AUROC: chance that a right text has a higher confidence than a wrong one"),
    )
    cards = "".join(f"<div><b>{escape(figure)}</b><span>{escape(text)}</span></div>" for figure, text in tiles)
    charts = _reliability(found["reliability"]) + _coverage(found["coverage"], found["accuracy"])
    brier = html_table(
        ("map", "Brier score"),
        "lr",
        (
            (f"<b>{escape(kind)}</b>" if kind == record["kind"] else escape(kind), f"{value:.4f}")
            for kind, value in record["brier"].items()
        ),
    )
    return (
        f"<section><h2>Confidence: {escape(task)}</h2><div class=tiles>{cards}</div>"
        "<p class=note>Left: share of right texts by confidence; on the dashed line, the confidence is true. Right: "
        "share of right texts among the surest ones, by the share that is answered. Every picture was left out of the "
        "fit that gave its confidence.</p>"
        f"<div class=wide style='display:flex;flex-wrap:wrap'>{charts}</div>{brier}</section>"
    )


def _frame(across: str, up: str) -> list[str]:
    """Returns the SVG elements of two axes from 0 to 1 with their titles."""
    bottom = TOP + SIDE
    shapes = [element("path", class_="axisline", fill="none", d=f"M{LEFT} {TOP}V{bottom}H{LEFT + SIDE}")]
    for value in (0.0, 0.5, 1.0):
        shapes += [
            label(f"{value:g}", LEFT + value * SIDE, bottom + 16, anchor="middle"),
            label(f"{value:g}", LEFT - 6, bottom - value * SIDE + 4, anchor="end"),
        ]
    return [*shapes, label(f"{up}, by {across}", LEFT, bottom + 34)]


def _place(x: float, y: float) -> tuple[float, float]:
    return LEFT + x * SIDE, TOP + SIDE - y * SIDE


def _reliability(rows: list[Mapping[str, float]]) -> str:
    shapes = _frame("confidence", "right texts")
    shapes.append(element("path", class_="axisline", d=f"M{LEFT} {TOP + SIDE}L{LEFT + SIDE} {TOP}"))
    most = max(row["texts"] for row in rows)
    for row in rows:
        x, y = _place(row["confidence"], row["right"])
        size = 3 + 6 * (row["texts"] / most) ** 0.5
        title = element("title", f"{row['texts']} texts: confidence {row['confidence']:.3f}, right {row['right']:.3f}")
        shapes.append(element("circle", title, class_="now", cx=x, cy=y, r=size))
    return svg(LEFT + SIDE + 30, TOP + SIDE + 40, shapes)


def _coverage(rows: list[list[float]], accuracy: float) -> str:
    places = [_place(share, right) for share, right in rows]
    level = _place(0.0, accuracy)[1]
    shapes = _frame("share of texts that are answered", "right texts")
    shapes += [
        element("path", class_="limit", d=f"M{LEFT} {level:.1f}h{SIDE}"),
        element("polyline", class_="line", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places)),
    ]
    return svg(LEFT + SIDE + 30, TOP + SIDE + 40, shapes)
