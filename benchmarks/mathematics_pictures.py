"""Draws the pictures of docs/mathematics.md as SVG, from the formulas of the page.

    python benchmarks/mathematics_pictures.py --write | --check

All numbers are computed without random draws, so that the files are the same on every machine.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from reporting import ROOT, parser_of

from blip2edge.calibration.weights.blocks import BlockFormat
from blip2edge.charts import element, label, svg_file
from blip2edge.cli import run_script

FOLDER = ROOT / "docs" / "mathematics"
COLOURS = ("#2f6f9f", "#c9762b", "#4b8f55", "#8a5a9e", "#777777")
PALE = "#eef1f4"
Points = Sequence[tuple[float, float]]


class Plot:
    """A plot of lines over two linear axes.

    Args:
        x: Smallest and largest value of the horizontal axis.
        y: Smallest and largest value of the vertical axis.
        marks: Values that are labelled with their number, on the horizontal and on the vertical axis.
        names: Texts at the two axes.
    """

    left, top, width, height = 60, 24, 460, 220  # px of the area inside the axes

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        marks: tuple[Sequence[float], Sequence[float]],
        names: tuple[str, str],
    ) -> None:
        self._x, self._y = x, y
        bottom = self.top + self.height
        axes = f"M{self.left} {self.top}V{bottom}H{self.left + self.width}"
        self.shapes = [element("path", d=axes, fill="none", stroke="#999")]
        for value in marks[0]:
            self.shapes.append(label(f"{value:g}", self.place(value, y[0])[0], bottom + 16, anchor="middle"))
        for value in marks[1]:
            self.shapes.append(label(f"{value:g}", self.left - 6, self.place(x[0], value)[1] + 4, anchor="end"))
        self.shapes.append(label(names[0], self.left + self.width, bottom + 34, anchor="end"))
        self.shapes.append(label(names[1], 4, 14))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Returns the position of a point in the picture, in pixels."""
        (left, right), (low, high) = self._x, self._y
        return (
            self.left + (x - left) / (right - left) * self.width,
            self.top + (high - y) / (high - low) * self.height,
        )

    def line(self, points: Points, colour: str, name: str, *, at: int = -1) -> None:
        """Adds a line, with its name beside the point number ``at``."""
        places = [self.place(*point) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        self.shapes.append(element("polyline", points=path, fill="none", stroke=colour, stroke_width=2))
        x, y = places[at]
        self.shapes.append(element("text", name, x=x + 6, y=y - 4, fill=colour))

    def file(self, right: int = 150) -> str:
        """Returns the SVG text; ``right`` is the free space to the right of the axes, in pixels."""
        return svg_file(self.left + self.width + right, self.top + self.height + 44, self.shapes)


def similarity() -> str:
    """Draws stage 1, ITC: the cosines of a text's vector and the queries of each picture; the largest cosine counts."""
    queries, pictures, cell = 8, 4, 30
    shapes = [label("cosine of the text “a red ring” with the queries of four pictures", 8, 18)]
    for row in range(pictures):
        # A smooth pattern; the second picture shows the ring, which its query 5 has found.
        values = [
            0.15 + 0.12 * math.sin(1.7 * query + 2.3 * row) + (0.5 if (row, query) == (1, 4) else 0.0)
            for query in range(queries)
        ]
        best = max(range(queries), key=values.__getitem__)
        y = 48 + row * (cell + 6)
        shapes.append(label(f"picture {row + 1}", 8, y + 19))
        for query, value in enumerate(values):
            x = 80 + query * (cell + 4)
            edge: dict[str, Any] = {"stroke": COLOURS[1], "stroke_width": 3} if query == best else {}
            shade = f"{0.1 + 0.9 * max(value, 0.0) / 0.8:.2f}"
            shapes.append(
                element("rect", x=x, y=y, width=cell, height=cell, fill=COLOURS[0], fill_opacity=shade, **edge)
            )
            if row == 0:
                shapes.append(label(f"q{query + 1}", x + cell / 2, 42, anchor="middle"))
        shapes.append(label(f"largest: {values[best]:.2f}", 80 + queries * (cell + 4) + 8, y + 19))
    return svg_file(480, 48 + pictures * (cell + 6) + 8, shapes)


def ranges() -> str:
    """Draws the squared error of INT8 rounding and the squared error of saturation, as functions of the threshold t.

    The values have the density exp(-|x|) / 2 (Laplace); in addition, 1 in 10,000 values is an outlier at 40. The error
    of rounding is step² / 12 with step = t / 127. The error of saturation is the integral of (x - t)² exp(-x) beyond t,
    which is 2 exp(-t), plus the squared error of the outliers.
    """
    rare, outlier = 1e-4, 40.0

    def rounding(t: float) -> float:
        return (t / 127) ** 2 / 12

    def saturation(t: float) -> float:
        return 2 * math.exp(-t) + rare * max(outlier - t, 0.0) ** 2

    def points(error: Callable[[float], float]) -> Points:
        return [(t, 10 * math.log10(error(t))) for t in (2 + 0.5 * step for step in range(77)) if error(t) > 10**-4.5]

    plot = Plot(
        (0.0, 40.0), (-45.0, 0.0), (range(0, 41, 10), range(-40, 1, 10)), ("threshold t", "squared error in dB")
    )
    plot.line(points(lambda t: 2 * math.exp(-t)), COLOURS[2], "saturation, without outliers", at=8)
    plot.line(points(saturation), COLOURS[1], "saturation, 1 outlier in 10,000 at 40", at=38)
    plot.line(points(rounding), COLOURS[0], "rounding: (t / 127)² / 12")
    return plot.file()


def blocks() -> str:
    """Draws, for INT4, two blocks of weights with one scale for each block, and with one scale for both blocks."""
    size, high = 16, BlockFormat(4, 16).high
    weights = [
        (0.9 if at < size else 0.14) * math.sin(2.1 * at + 0.4) * (0.6 + 0.4 * math.cos(0.7 * at))
        for at in range(2 * size)
    ]
    plot = Plot(
        (-1.0, 2.0 * size), (-1.0, 1.0), ((0, 8, 16, 24), (-1, 0, 1)), ("input k", "weight and its 4-bit value")
    )
    whole = max(map(abs, weights)) / high
    error = {"one scale": 0.0, "a scale a block": 0.0}
    for at, weight in enumerate(weights):
        block = weights[at // size * size : (at // size + 1) * size]
        scale = max(map(abs, block)) / high
        if at >= size:
            for name, step in (("one scale", whole), ("a scale a block", scale)):
                error[name] += (weight - round(weight / step) * step) ** 2
        x, y = plot.place(at, weight)
        _, rounded = plot.place(at, round(weight / scale) * scale)
        _, coarse = plot.place(at, round(weight / whole) * whole)
        plot.shapes += [
            element("rect", x=x - 3, y=coarse - 3, width=6, height=6, fill="none", stroke=COLOURS[1]),
            element("circle", cx=x, cy=rounded, r=5, fill="none", stroke=COLOURS[0]),
            element("circle", cx=x, cy=y, r=2, fill="#222"),
        ]
    x, _ = plot.place(size - 0.5, 0.0)
    plot.shapes.append(element("path", d=f"M{x:.1f} {plot.top}V{plot.top + plot.height}", stroke="#bbb"))
    total = sum(weight * weight for weight in weights[size:])
    notes = (
        ("#222", "weight"),
        (COLOURS[0], f"a scale a block: error {error['a scale a block'] / total:.1%}"),
        (COLOURS[1], f"one scale for all: error {error['one scale'] / total:.1%}"),
        ("#222", "(of the second block's power)"),
    )
    for number, (colour, note) in enumerate(notes):
        plot.shapes.append(element("text", note, x=plot.left + plot.width + 12, y=44 + 20 * number, fill=colour))
    return plot.file(210)


def tokens_per_pass(rate: float, proposed: int) -> float:
    """Returns the expected tokens of a verifying pass: 1 + a + a² + … + a^k (arXiv 2211.17192, equation 1).

    a is ``rate``, the acceptance rate; k is ``proposed``, the number of proposed tokens.
    """
    return sum(rate**power for power in range(proposed + 1))


def acceptance() -> str:
    """Draws the expected tokens per pass of speculative decoding, as a function of the acceptance rate."""
    plot = Plot(
        (0.0, 1.0),
        (1.0, 9.0),
        ((0, 0.25, 0.5, 0.75, 1), (1, 3, 5, 7, 9)),
        ("share of proposed tokens that are accepted", "tokens per pass"),
    )
    for number, proposed in enumerate((1, 2, 4, 8)):
        points = [(rate / 50, tokens_per_pass(rate / 50, proposed)) for rate in range(51)]
        plot.line(points, COLOURS[number], f"k = {proposed}")
    return plot.file(80)


def cache_bytes(layers: int, heads: int, width: int, bytes_each: int = 2) -> int:
    """Returns the bytes of one token's keys and values: 2 x layers x heads x width of a head x bytes of a number."""
    return 2 * layers * heads * width * bytes_each


CACHES: Mapping[str, tuple[int, int, int]] = {
    "OPT-2.7b": (32, 32, 80),
    "OPT-6.7b, Vicuna-7b": (32, 32, 128),
    "SmolLM2-135M (3 key heads)": (30, 3, 64),
}
"""Number of layers, number of key heads, and width of a head, by the language model's name in the picture."""


def cache() -> str:
    """Draws the size of an fp16 KV cache: 30 text tokens and the visual tokens of a Q-Former (32) or an MLP (576)."""
    longest = max(cache_bytes(*shape) for shape in CACHES.values()) * (576 + 30)
    shapes = [label("KV cache of one picture and 30 text tokens, fp16", 8, 18)]
    for row, (name, shape) in enumerate(CACHES.items()):
        for part, (visual, what) in enumerate(((32, "Q-Former, 32"), (576, "MLP, 576"))):
            size = cache_bytes(*shape) * (visual + 30)
            y = 34 + row * 50 + part * 20
            length = size / longest * 280
            if part == 0:
                shapes.append(label(name, 8, y + 12))
            shapes += [
                element("rect", x=250, y=y, width=max(length, 1), height=15, fill=COLOURS[part]),
                label(f"{size / 1e6:.1f} MB ({what})", 256 + length, y + 12),
            ]
    return svg_file(680, 34 + len(CACHES) * 50, shapes)


PICTURES: Mapping[str, Callable[[], str]] = {
    "similarity": similarity,
    "ranges": ranges,
    "blocks": blocks,
    "acceptance": acceptance,
    "cache": cache,
}
"""The function that draws each file of docs/mathematics."""


def main() -> None:
    """Writes the pictures of docs/mathematics.md, or compares them with the existing files."""
    parser = parser_of(__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", action="store_true", help="write the pictures")
    how.add_argument("--check", action="store_true", help="exit 1 unless the pictures are up to date")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        path = FOLDER / f"{name}.svg"
        if options.write:
            path.write_text(draw(), encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != draw():
            sys.exit(f"{path.relative_to(ROOT)} is not what this script draws; run: make docs")


if __name__ == "__main__":
    run_script(main)
