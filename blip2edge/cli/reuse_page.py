"""Makes the HTML report of ``watch --reuse-below auto --reuse-fit FILE.json`` from the JSON object in that file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from blip2edge.charts import element, html_page, html_table, label, svg

WIDTH, HEIGHT = 640, 260  # px of the chart
LEFT, RIGHT, TOP = 56, 20, 16  # px around its axes
COLUMNS = ("picture threshold", "feature threshold", "skipped", "caption kept", "missed", "rate", "at most", "saved")

Point = Mapping[str, Any]


def reuse_page(document: Mapping[str, Any], source: str) -> str:
    """Makes the HTML page of the fitted thresholds: below them, a frame reuses the caption of an earlier frame.

    The page has a chart: the rate of missed changes of the caption, against the share of the work that is saved.

    Args:
        document: The object of :func:`blip2edge.runtime.captioning.reuse.ladder.fit_document`.
        source: Name of the source of the frames.
    """
    chosen, rate = document["chosen"], document["miss_rate"]
    times, whole = document["times"], sum(document["times"].values())
    if chosen is None:
        found = [("none", f"no thresholds keep the rate below {rate:.1%}: every frame is encoded")]
    else:
        found = [
            (f"{chosen['saved']:.0%}", f"of the work saved; {chosen['skipped']:.0%} of the frames are skipped"),
            (f"{chosen['upper']:.1%}", f"missed changes at most; {rate:.1%} is stated"),
            (f"{chosen['rate']:.1%}", f"missed in these frames: {chosen['missed']} of {chosen['reused']} reused"),
        ]
    tiles = "".join(f"<div><b>{escape(figure)}</b><span>{escape(text)}</span></div>" for figure, text in found)
    facts = (
        f"{document['frames']} frames of {source}; the caption changed {document['changes']} times",
        f"the bounds hold with {document['confidence']:.0%} confidence, all together",
        f"{document['processor']}: {times['encode']:.1f} ms a frame for vision encoder and bridge",
        f"{times['decode']:.1f} ms a frame for prefill and decoding, {times['decode'] / (whole or 1):.0%} of both",
        f"prompt: {document['prompt'] or 'the default'}; bundle {document['bundle'][:16]}",
    )
    points = document["curve"]
    rows = [_cells(point) for point in _front(points, "upper")]
    body = (
        f"<header><h1>Reused captions</h1><div class=tiles>{tiles}</div></header>"
        f"<section><ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul></section>"
        f"<section><h2>Missed changes by the work saved</h2>{_chart(points, chosen, rate)}"
        "<p class=note>Each dot is a pair of thresholds. Blue line: lowest rate of missed changes. "
        "Grey line: lowest upper bound. Red line: the stated rate. Large dot: the chosen pair.</p></section>"
        f"<section><h2>Best pairs by their bound</h2>{html_table(COLUMNS, 'r' * len(COLUMNS), rows)}</section>"
    )
    return html_page("blip2edge watch: reuse", body)


def _front(points: Sequence[Point], key: str) -> list[Point]:
    """Returns the threshold pairs for which no other pair saves more work and also misses fewer changes.

    ``key`` is the measure of the missed changes: ``rate``, or its upper bound ``upper``. The pairs are sorted by
    ``saved``, the smallest value first.
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (-one["saved"], one[key])):
        if not found or point[key] < found[-1][key]:
            found.append(point)
    return found[::-1]


def _cells(point: Point) -> tuple[str, ...]:
    thresholds = point["thresholds"]
    shares = (point["skipped"], point["captions"])
    return (
        f"{thresholds['skip']:.4f}",
        f"{thresholds['caption']:.4f}",
        *(f"{share:.0%}" for share in shares),
        str(point["missed"]),
        *(f"{point[key]:.1%}" for key in ("rate", "upper")),
        f"{point['saved']:.0%}",
    )


def _chart(points: Sequence[Point], chosen: Point | None, rate: float) -> str:
    """Draws the rate of missed changes over the saved work.

    A horizontal line shows the largest allowed rate (``--miss-rate``); the vertical axis ends at four times this rate.
    """
    most = 4 * rate

    def place(point: Point, key: str) -> tuple[float, float]:
        across = LEFT + point["saved"] * (WIDTH - LEFT - RIGHT)
        return across, HEIGHT - min(point[key] / most, 1.0) * (HEIGHT - TOP)

    def line(key: str, **style: str) -> str:
        places = (place(point, key) for point in _front(points, key) if point[key] <= most)
        return element("polyline", points=_written(places), fill="none", stroke_width="2", **style)

    limit = HEIGHT - rate / most * (HEIGHT - TOP)
    shapes = [
        element("path", class_="axisline", d=f"M{LEFT} {TOP}V{HEIGHT}H{WIDTH - RIGHT}", fill="none"),
        element("path", class_="limit", d=f"M{LEFT} {limit:.1f}H{WIDTH - RIGHT}"),
        line("upper", stroke="var(--before)"),
        line("rate", stroke="var(--now)"),
    ]
    for point in points:
        x, y = place(point, "rate")
        if point["rate"] <= most:
            shapes.append(element("circle", class_="before", cx=x, cy=y, r=2))
    if chosen is not None:
        for key, style in (("upper", "before"), ("rate", "now")):
            x, y = place(chosen, key)
            shapes.append(element("circle", class_=style, cx=x, cy=y, r=6))
    for step in range(5):
        share = step / 4
        shapes += [
            label(f"{share:.0%}", LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT + 18, anchor="middle"),
            label(f"{share * most:.1%}", LEFT - 8, HEIGHT - share * (HEIGHT - TOP) + 4, anchor="end"),
        ]
    return svg(WIDTH, HEIGHT + 24, shapes)


def _written(places: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
