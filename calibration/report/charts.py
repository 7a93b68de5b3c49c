"""Small pictures for a page without scripts: inline SVG, coloured by the page's own CSS classes.

Classes: ``now`` (what was made), ``before`` (the parent), ``bad`` (beyond a limit), ``axis`` (lines and labels).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

ROW = 22  # px a bar
LABEL = 190  # px of a bar's name
FIGURE = 92  # px of the figure behind it
CELL = 16  # px of a square


def bars(rows: Sequence[tuple[str, str, float, str]], width: int = 640) -> str:
    """Horizontal bars from zero.

    Args:
        rows: Label, class, length and the figure that stands behind the bar.
        width: px.
    """
    longest = max((row[2] for row in rows), default=0.0) or 1.0
    room = width - LABEL - FIGURE
    parts = []
    for at, (label, kind, length, figure) in enumerate(rows):
        top, size = at * ROW, max(1.0, room * length / longest)
        parts.append(
            f'<text class="axis" x="{LABEL - 8}" y="{top + 15}" text-anchor="end">{escape(label)}</text>'
            f'<rect class="{kind}" x="{LABEL}" y="{top + 4}" width="{size:.1f}" height="14" rx="2"/>'
            f'<text class="figure" x="{LABEL + size + 6:.1f}" y="{top + 15}">{escape(figure)}</text>'
        )
    return _svg(width, len(rows) * ROW, "".join(parts))


def grid(cells: Mapping[tuple[str, int], float], unit: str) -> str:
    """Squares, darker for more: kinds of matrices downwards, layers to the right.

    Args:
        cells: By kind and layer; from 0 on.
        unit: What a figure is, for the text that shows when a square is pointed at; figures are percent.
    """
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    columns = sorted({layer for _, layer in cells})
    most = max(cells.values(), default=0.0) or 1.0
    parts = [
        f'<text class="axis" x="{LABEL - 8}" y="{at * CELL + 12}" text-anchor="end">{escape(kind)}</text>'
        for at, kind in enumerate(kinds)
    ]
    for (kind, layer), value in cells.items():
        left, top = LABEL + columns.index(layer) * CELL, kinds.index(kind) * CELL
        parts.append(
            f'<rect class="now" x="{left}" y="{top}" width="{CELL - 2}" height="{CELL - 2}" rx="2" '
            f'fill-opacity="{0.08 + 0.92 * value / most:.2f}">'
            f"<title>layer {layer}, {escape(kind)}: {value:.2%} {escape(unit)}</title></rect>"
        )
    height = len(kinds) * CELL
    for at in range(0, len(columns), 1 if len(columns) <= 12 else 5):
        x = LABEL + at * CELL + (CELL - 2) / 2
        parts.append(
            f'<text class="axis" x="{x}" y="{height + 12}" text-anchor="middle">{columns[at]}</text>'
        )
    return _svg(LABEL + len(columns) * CELL, height + 18, "".join(parts))


def histogram(
    counts: Sequence[int], end: float, threshold: float | None, width: int = 150, height: int = 34
) -> str:
    """Counts in equal bins from 0 on, on a logarithmic scale; empty bins at the end are cut off.

    Args:
        counts: A bin each.
        end: Where the last bin ends.
        threshold: Where values saturate; None for no line.
        width: px.
        height: px.
    """
    used = max((at + 1 for at, count in enumerate(counts) if count), default=1)
    most = max(end * used / max(len(counts), 1), threshold or 0.0) or 1.0
    step = width * end / max(len(counts), 1) / most
    tall = math.log1p(max(counts, default=0)) or 1.0
    shape = "".join(
        f"M{at * step:.1f} {height}v{-height * math.log1p(count) / tall:.1f}h{step:.1f}V{height}z"
        for at, count in enumerate(counts)
        if count
    )
    mark = ""
    if threshold is not None:
        x = width * threshold / most
        mark = (
            f'<rect class="beyond" x="{x:.1f}" y="0" width="{width - x:.1f}" height="{height}"/>'
            f'<path class="limit" d="M{x:.1f} 0V{height}"/>'
        )
    return _svg(width, height, f'<path class="now" d="{shape}"/>{mark}')


def spread(values: Sequence[float], limit: float, spare: float, width: int = 640, height: int = 90) -> str:
    """How many tensors have which headroom, a bar each half power of ten.

    Args:
        values: Headroom of each tensor.
        limit: Below it a value overflows.
        spare: Below it one may.
        width: px.
        height: px of the bars.
    """
    least, most = -1.0, 8.0  # powers of ten
    half = [min(max(math.log10(value), least), most - 0.5) if value > 0 else least for value in values]
    counts = [0] * int((most - least) * 2)
    for value in half:
        counts[int((value - least) * 2)] += 1
    tall, step = max(counts, default=1) or 1, width / len(counts)
    parts = []
    for at, count in enumerate(counts):
        kind = "bad" if least + at / 2 + 0.5 <= math.log10(limit) else "now"
        size = (height - 14) * count / tall
        if count:
            parts.append(
                f'<rect class="{kind}" x="{at * step + 1:.1f}" y="{height - size:.1f}" width="{step - 2:.1f}" '
                f'height="{size:.1f}" rx="2"/><text class="axis" x="{(at + 0.5) * step:.1f}" '
                f'y="{height - size - 3:.1f}" text-anchor="middle">{count}</text>'
            )
    for power in range(int(least), int(most) + 1, 1):
        x = (power - least) * 2 * step
        anchor = "start" if power == least else "end" if power == most else "middle"
        parts.append(
            f'<text class="axis" x="{x:.1f}" y="{height + 14}" text-anchor="{anchor}">{_power(power)}</text>'
        )
    for value, kind in ((limit, "limit"), (spare, "axisline")):
        x = (math.log10(value) - least) * 2 * step
        parts.append(f'<path class="{kind}" d="M{x:.1f} 0V{height}"/>')
    return _svg(width, height + 20, "".join(parts))


def _power(power: int) -> str:
    return (
        f"×{10**power:g}"
        if power < 4
        else f"×10{str(power).translate(str.maketrans('0123456789', '⁰¹²³⁴⁵⁶⁷⁸⁹'))}"
    )


def _svg(width: float, height: float, content: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" '
        f'role="img">{content}</svg>'
    )
