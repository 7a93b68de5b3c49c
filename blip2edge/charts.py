"""Makes charts as inline SVG, and an HTML page for them, without scripts and external files, in light and dark style.

Colours are CSS classes of the page: ``now`` (new value), ``before`` (old value), ``bad`` (value beyond a limit),
``limit`` (line), ``axis`` and ``figure`` (texts).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

ROW = 22  # px of a bar and the gap to the next one
LABEL = 190  # px of a bar's label
FIGURE = 92  # px of the figure after a bar
CELL = 16  # px of a square
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Bar:
    """A horizontal bar.

    Attributes:
        label: Text before the bar.
        style: CSS class of the bar.
        length: Length of the bar; all bars of a chart have the same unit.
        figure: Text after the bar.
        limit: Position of a vertical line, in the unit of ``length``; None for no line.
    """

    label: str
    style: str
    length: float
    figure: str
    limit: float | None = None


def html_page(title: str, body: str) -> str:
    """Makes a whole HTML page with the common style.

    Args:
        title: Title of the page, not yet escaped.
        body: HTML inside ``<main>``.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>{body}</main></body></html>\n"
    )


def html_table(header: Sequence[str], align: str, rows: Iterable[Sequence[str]]) -> str:
    """Makes an HTML table.

    Args:
        header: Titles of the columns, as HTML.
        align: ``l`` or ``r`` (numbers) for each column.
        rows: Cells, as HTML.
    """
    classes = [" class=n" if side == "r" else "" for side in align]

    def line(tag: str, cells: Sequence[str]) -> str:
        inner = (f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(classes, cells, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', row) for row in rows)}</table>"


def element(tag: str, content: str = "", **attributes: str | float) -> str:
    """Makes an SVG element.

    Args:
        tag: Name of the element.
        content: Content of the element, already escaped.
        **attributes: Attributes of the element. In their names, a final ``_`` is removed, and every other ``_`` becomes
            ``-``. Numbers are rounded to 0.1.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(value) if isinstance(value, str) else f"{value:.1f}"}"'
        for name, value in attributes.items()
    )
    return f"<{tag}{written}>{content}</{tag}>"


def label(text: str, x: float, y: float, *, anchor: str = "start", style: str = "axis") -> str:
    """Makes an SVG text at ``(x, y)`` in px; ``text`` is escaped. ``anchor`` is ``start``, ``middle`` or ``end``."""
    return element("text", escape(text), class_=style, x=x, y=y, text_anchor=anchor)


def svg(width: float, height: float, shapes: Sequence[str]) -> str:
    """Makes an inline SVG picture, with the colours of the page."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img">{"".join(shapes)}</svg>'
    )


def svg_file(width: float, height: float, shapes: Sequence[str]) -> str:
    """Makes the content of an SVG file: black text on white."""
    background = element("rect", width=width, height=height, fill="#fff")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'font-family="sans-serif" font-size="12" fill="#222">\n{background}\n' + "\n".join([*shapes, "</svg>", ""])
    )


def bars(rows: Sequence[Bar], width: int = 640) -> str:
    """Draws horizontal bars that begin at zero; ``width`` is in px."""
    longest = max((row.length for row in rows), default=0.0) or 1.0
    scale = (width - LABEL - FIGURE) / longest
    shapes = []
    for at, row in enumerate(rows):
        top, size = at * ROW, max(1.0, row.length * scale)
        shapes += [
            label(row.label, LABEL - 8, top + 15, anchor="end"),
            element("rect", class_=row.style, x=LABEL, y=top + 4, width=size, height=14, rx=2),
            label(row.figure, LABEL + size + 6, top + 15, style="figure"),
        ]
        if row.limit is not None:
            shapes.append(element("path", class_="limit", d=f"M{LABEL + row.limit * scale:.1f} {top}v{ROW}"))
    return svg(width, len(rows) * ROW, shapes)


def curve(points: Sequence[tuple[float, float]], width: int = 640, height: int = 150) -> str:
    """Draws a line through points ``(x, y)``; both axes begin at zero; ``width`` and ``height`` are in px."""
    left, top = 60, 25
    most_x = max(x for x, _ in points) or 1.0
    most_y = max(y for _, y in points) or 1.0
    places = [(left + x / most_x * (width - left - 60), height - y / most_y * (height - top)) for x, y in points]
    shapes = [
        element("path", class_="axisline", d=f"M{left} {height}H{width}"),
        element("polyline", class_="line", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in places)),
    ]
    for (x, y), (across, up) in zip(places, points, strict=True):
        shapes += [
            element("circle", class_="now", cx=x, cy=y, r=4),
            label(f"{up:.2f}", x, y - 9, anchor="middle", style="figure"),
            label(f"{across:g}", x, height + 18, anchor="middle"),
        ]
    return svg(width, height + 24, shapes)


@dataclass(frozen=True)
class Mark:
    """A point of a scatter plot.

    Attributes:
        x: Value on the horizontal axis, above 0.
        y: Value on the vertical axis, at least 0.
        style: CSS class of the point.
        text: Text beside the point; a point with a text is hollow.
        tooltip: Text that is shown on hovering.
    """

    x: float
    y: float
    style: str
    text: str
    tooltip: str


def scatter(marks: Sequence[Mark], across: str, up: str, width: int = 760, height: int = 300) -> str:
    """Draws a scatter plot with two logarithmic axes; points whose vertical value is 0 are at the bottom.

    Args:
        marks: The points.
        across: Title of the horizontal axis.
        up: Title of the vertical axis.
        width: Width in px.
        height: Height in px.
    """
    left, top, bottom = 64, 22, 34
    least = min((mark.y for mark in marks if mark.y > 0), default=1.0) / 3  # where a value of 0 is drawn
    columns = _log_axis([mark.x for mark in marks], left, width - 110)
    rows = _log_axis([max(mark.y, least) for mark in marks], height - bottom, top)
    shapes = [
        element("path", class_="axisline", d=f"M{left} {height - bottom + 8}H{width - 100}"),
        label(across, width - 100, height + 10, anchor="end"),
        label(up, 0, 12),
    ]
    shapes += [
        label(f"{value:.3g}", columns(value), height - bottom + 24, anchor="middle")
        for value in _ticks([mark.x for mark in marks])
    ]
    shapes += [
        label("0" if value == least else f"{value:.0e}", left - 12, rows(value) + 4, anchor="end")
        for value in _ticks([max(mark.y, least) for mark in marks])
    ]
    for mark in marks:
        x, y = columns(mark.x), rows(max(mark.y, least))
        hollow = {"style": "fill-opacity:.25;stroke:currentColor"} if mark.text else {}
        title = element("title", escape(mark.tooltip))
        shapes.append(element("circle", title, class_=mark.style, cx=x, cy=y, r=6, **hollow))
        if mark.text:
            shapes.append(label(mark.text, x + 9, y + 4))
    return svg(width, height + 18, shapes)


def _log_axis(values: Sequence[float], start: float, end: float) -> Callable[[float], float]:
    """Returns a function that converts a value to its place on a logarithmic axis from ``start`` to ``end`` in px."""
    first, last = math.log(min(values)), math.log(max(values))
    return lambda value: start + (end - start) * (math.log(value) - first) / ((last - first) or 1.0)


def _ticks(values: Sequence[float]) -> list[float]:
    """Returns the labelled values of a logarithmic axis: both ends, and two values between the ends."""
    first, last = math.log(min(values)), math.log(max(values))
    return [min(values), *(math.exp(first + (last - first) * share) for share in (1 / 3, 2 / 3)), max(values)]


def grid(cells: Mapping[tuple[str, int], float], unit: str) -> str:
    """Draws a grid of squares, darker for larger values: a row for each kind of matrix, a column for each layer.

    Args:
        cells: Values of at least 0, by kind and layer.
        unit: Text after a value in the tooltip; values are shown in percent.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    columns = sorted({layer for _, layer in cells})
    most = max(cells.values(), default=0.0) or 1.0
    shapes = [label(kind, LABEL - 8, at * CELL + 12, anchor="end") for at, kind in enumerate(kinds)]
    for (kind, layer), value in cells.items():
        shapes.append(
            element(
                "rect",
                element("title", f"layer {layer}, {escape(kind)}: {value:.2%} {escape(unit)}"),
                class_="now",
                x=LABEL + columns.index(layer) * CELL,
                y=kinds.index(kind) * CELL,
                width=CELL - 2,
                height=CELL - 2,
                rx=2,
                fill_opacity=f"{0.08 + 0.92 * value / most:.2f}",
            )
        )
    height = len(kinds) * CELL
    shapes += [
        label(str(columns[at]), LABEL + (at + 0.5) * CELL - 1, height + 12, anchor="middle")
        for at in range(0, len(columns), 1 if len(columns) <= 12 else 5)
    ]
    return svg(LABEL + len(columns) * CELL, height + 18, shapes)


def histogram(counts: Sequence[int], end: float, threshold: float | None, width: int = 150, height: int = 34) -> str:
    """Draws a histogram with equal bins from 0 on and logarithmic heights; empty bins at the end are left out.

    Args:
        counts: Count of each bin.
        end: Upper end of the last bin.
        threshold: Value beyond which values saturate; None for no line.
        width: Width in px.
        height: Height in px.
    """
    used = max((at + 1 for at, count in enumerate(counts) if count), default=1)
    most = max(end * used / max(len(counts), 1), threshold or 0.0) or 1.0
    step = width * end / max(len(counts), 1) / most
    tall = math.log1p(max(counts, default=0)) or 1.0
    outline = "".join(
        f"M{at * step:.1f} {height}v{-height * math.log1p(count) / tall:.1f}h{step:.1f}V{height}z"
        for at, count in enumerate(counts)
        if count
    )
    shapes = [element("path", class_="now", d=outline)]
    if threshold is not None:
        x = width * threshold / most
        shapes += [
            element("rect", class_="beyond", x=x, y=0, width=width - x, height=height),
            element("path", class_="limit", d=f"M{x:.1f} 0V{height}"),
        ]
    return svg(width, height, shapes)


def spread(values: Sequence[float], limit: float, spare: float, width: int = 640, height: int = 90) -> str:
    """Draws the number of tensors by headroom: one bar for each half power of ten.

    The headroom of a tensor is the largest number of the dtype, divided by the tensor's largest value.

    Args:
        values: Headroom of each tensor.
        limit: Headroom below which a value overflows.
        spare: Headroom below which a value may overflow on other pictures.
        width: Width in px.
        height: Height of the bars in px.
    """
    least, most = -1.0, 8.0  # powers of ten
    half = [min(max(math.log10(value), least), most - 0.5) if value > 0 else least for value in values]
    counts = [0] * int((most - least) * 2)
    for value in half:
        counts[int((value - least) * 2)] += 1
    tall, step = max(counts, default=1) or 1, width / len(counts)
    shapes = []
    for at, count in enumerate(counts):
        style = "bad" if least + at / 2 + 0.5 <= math.log10(limit) else "now"
        size = (height - 14) * count / tall
        if count:
            shapes += [
                element("rect", class_=style, x=at * step + 1, y=height - size, width=step - 2, height=size, rx=2),
                label(str(count), (at + 0.5) * step, height - size - 3, anchor="middle"),
            ]
    for power in range(int(least), int(most) + 1):
        anchor = "start" if power == least else "end" if power == most else "middle"
        text = f"×{10**power:g}" if power < 4 else f"×10{str(power).translate(SUPERSCRIPTS)}"
        shapes.append(label(text, (power - least) * 2 * step, height + 14, anchor=anchor))
    for value, style in ((limit, "limit"), (spare, "axisline")):
        x = (math.log10(value) - least) * 2 * step
        shapes.append(element("path", class_=style, d=f"M{x:.1f} 0V{height}"))
    return svg(width, height + 20, shapes)


CSS = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5c6579; --line: #dde1ea; --page: #f6f7fa; --card: #fff;
  --now: #3b5bdb; --before: #b4bccb; --bad: #d6336c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #9aa3b5; --line: #313848; --page: #14171f;
  --card: #1c212c; --now: #748ffc; --before: #566077; --bad: #f06595; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 8px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
h3 span { font-weight: 400; color: var(--soft); margin-left: 6px; }
p { margin: 0 0 10px; max-width: 74ch; }
header p, .note, small, section > p { color: var(--soft); }
.note { font-size: 13px; margin: 6px 0; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px;
  margin-top: 16px; overflow-x: auto; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin-top: 14px; }
.tiles div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.tiles b { display: block; font-size: 25px; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: 13px; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px; margin: 6px 0; }
th { text-align: left; color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--line);
  padding: 4px 8px 4px 0; }
td { border-bottom: 1px solid var(--line); padding: 5px 8px 5px 0; vertical-align: middle; }
tr:last-child td { border-bottom: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: var(--soft); font-size: 12.5px; overflow-wrap: anywhere; }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(280px, 1fr)); gap: 10px; }
.captions figure { display: flex; gap: 12px; margin: 0; border: 1px solid var(--line); border-radius: 8px;
  padding: 8px; }
.captions img { width: 76px; height: 76px; object-fit: cover; border-radius: 6px; flex: none; }
figcaption { min-width: 0; overflow-wrap: anywhere; }
figcaption p { margin: 0; font-size: 13.5px; line-height: 1.35; }
figcaption small { display: block; font-size: 11.5px; }
.differs { border-color: var(--bad); }
.was { color: var(--soft); text-decoration: line-through; }
.is { color: var(--bad); }
.wide { overflow-x: auto; }
details { margin: 8px 0; }
summary { cursor: pointer; font-weight: 500; }
svg { display: block; max-width: none; overflow: visible; }
svg text { font: 12px system-ui, sans-serif; }
.now { fill: var(--now); } .before { fill: var(--before); } .bad { fill: var(--bad); }
.beyond { fill: var(--bad); fill-opacity: .14; }
.line { fill: none; stroke: var(--now); stroke-width: 2; }
.axis { fill: var(--soft); } .figure { fill: var(--ink); font-variant-numeric: tabular-nums; }
.limit { stroke: var(--bad); stroke-width: 1.5; } .axisline { stroke: var(--soft); stroke-dasharray: 3 3; }
"""
