"""Writes the report of ``bench`` as Markdown, and as one HTML page with charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from blip2edge.runtime.bench.measure import BenchReport, StageTimes

WIDTH, BAR, GAP = 640, 22, 8
LEFT = 110
COLOURS = {"wall": "#7aa6c2", "cpu": "#2f5d7c", "roof": "#d1495b"}
UNITS = {
    "batch": ("pictures at once", "pictures a CPU-second", "batch", "pictures_per_cpu_s"),
    "prompt": ("slots of the prompt", "CPU ms of reading it", "slots", "prefill_cpu_ms"),
    "caption": ("tokens of the caption", "CPU ms a token", "tokens", "decode_cpu_ms_per_token"),
}
"""For each sweep: labels of the x and y axes, and the keys of its rows for x and y."""


def markdown(report: BenchReport) -> str:
    """The report as Markdown: the stages as a table, then single figures, then the sweeps."""
    lines = [
        "| stage | p50 ms | p90 ms | p99 ms | CPU ms | share of the roofline |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, stage in report.stages.items():
        cells = [f"{stage.ms[key]:.1f}" for key in ("p50", "p90", "p99")]
        lines.append(f"| {name} | {' | '.join(cells)} | {stage.cpu_ms:.1f} | {_share(stage)} |")
    lines += ["", *(f"- {line}" for line in facts(report))]
    for name, rows in report.sweeps.items():
        if rows:
            lines += ["", *_table(name, rows)]
    return "\n".join(lines)


def facts(report: BenchReport) -> list[str]:
    """Single figures, one sentence each."""
    found = [
        f"{report.tokens_per_s:.1f} tokens/s while decoding, {report.options.tokens} tokens a caption",
        (
            f"loaded in {report.start_s:.2f} s; {report.memory['peak'] / 1e6:.0f} MB at most while captioning, "
            f"{report.memory['resident'] / 1e6:.0f} MB after all sweeps, weights {report.memory['graphs'] / 1e6:.0f} MB"
        ),
        f"{report.machine['processor']}, backend {report.machine['backend']}, "
        f"threads {report.machine['threads'] or 'all'}; "
        + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    ]
    if roof := report.roofline:
        speed = f"{roof['gigaflops_fp32']} GFLOP/s in fp32, {roof['gigaops_int8']} GOP/s in int8"
        found.append(f"one core: {roof['gigabytes_per_s']} GB/s read, {speed}")
    found.append(f"graphs of the optimised copy: {', '.join(report.bundle['optimised']) or 'none'}")
    if report.energy is not None:
        found.append(f"{report.energy['joules_per_caption']:.2f} J a caption ({report.energy['source']})")
    if report.draft is not None:
        found.append(f"{report.draft['tokens_per_pass']:.2f} tokens a pass (draft: {report.draft['kind']})")
    return found + [f"not measured: {what} ({why})" for what, why in report.left_out.items()]


def _share(stage: StageTimes) -> str:
    return "" if stage.share is None else f"{stage.share:.0%} ({stage.bound})"


def _table(name: str, rows: Sequence[Mapping[str, float]]) -> list[str]:
    across, up, x, y = UNITS[name]
    return [f"| {across} | {up} |", "|---:|---:|", *(f"| {row[x]:g} | {row[y]:.2f} |" for row in rows)]


def page(report: BenchReport) -> str:
    """The report as an HTML page with bars and curves."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>blip2edge bench</title>",
        (
            "<style>body{font:15px/1.5 system-ui;max-width:720px;margin:2em auto;color:#222}"
            "table{border-collapse:collapse}td,th{padding:.2em .8em;border-bottom:1px solid #ddd;text-align:right}"
            "td:first-child,th:first-child{text-align:left}svg{max-width:100%}figcaption{color:#555}</style>"
        ),
        f"<h1>{escape(str(report.bundle['family']))}</h1>",
        "<ul>" + "".join(f"<li>{escape(fact)}</li>" for fact in facts(report)) + "</ul>",
        "<h2>Where the time goes</h2>",
        _stage_table(report),
        _figure(
            _bars(report),
            "Median wall time (light), CPU time (dark), and the time at the roofline (red line).",
        ),
        "<h2>Growth</h2>",
    ]
    for name, rows in report.sweeps.items():
        if rows:
            across, up, x, y = UNITS[name]
            points = [(row[x], row[y]) for row in rows]
            parts.append(_figure(_curve(points), f"{up} over {across}."))
    return "\n".join([*parts, "</html>\n"])


def _stage_table(report: BenchReport) -> str:
    head = "<tr><th>stage<th>p50 ms<th>p90 ms<th>p99 ms<th>CPU ms<th>share of the roofline</tr>"
    rows = [
        f"<tr><td>{name}<td>{stage.ms['p50']:.1f}<td>{stage.ms['p90']:.1f}<td>{stage.ms['p99']:.1f}"
        f"<td>{stage.cpu_ms:.1f}<td>{_share(stage)}</tr>"
        for name, stage in report.stages.items()
    ]
    return f"<table>{head}{''.join(rows)}</table>"


def _figure(picture: str, caption: str) -> str:
    return f"<figure>{picture}<figcaption>{escape(caption)}</figcaption></figure>"


def _bars(report: BenchReport) -> str:
    """Two bars for each stage (wall time, CPU time), and a line at its time at the roofline."""
    stages = {name: stage for name, stage in report.stages.items() if name != "total"}
    longest = max(max(stage.ms["p50"], stage.cpu_ms) for stage in stages.values()) or 1.0
    scale = (WIDTH - LEFT - 90) / longest
    shapes: list[str] = []
    for number, (name, stage) in enumerate(stages.items()):
        top = number * (BAR + GAP)
        shapes.append(f'<text x="{LEFT - 8}" y="{top + 15}" text-anchor="end">{name}</text>')
        for half, (kind, value) in enumerate((("wall", stage.ms["p50"]), ("cpu", stage.cpu_ms))):
            y = top + half * BAR / 2
            width = max(value * scale, 0.5)
            shapes.append(
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR / 2}" fill="{COLOURS[kind]}"/>'
            )
        if stage.share is not None:
            x = LEFT + stage.share * stage.least_cpu_ms * scale
            shapes.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 2}" y2="{top + BAR + 2}" '
                f'stroke="{COLOURS["roof"]}" stroke-width="2"/>'
            )
        end = LEFT + max(stage.ms["p50"], stage.cpu_ms) * scale + 6
        shapes.append(f'<text x="{end:.1f}" y="{top + 15}">{stage.ms["p50"]:.1f} ms</text>')
    return _svg(len(stages) * (BAR + GAP), shapes)


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """A line through points ``(x, y)``; both axes start at zero."""
    height, bottom = 180, 150
    most_x = max(x for x, _ in points) or 1.0
    most_y = max(y for _, y in points) or 1.0
    places = [
        (LEFT + x / most_x * (WIDTH - LEFT - 60), bottom - y / most_y * (bottom - 25)) for x, y in points
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    shapes = [
        f'<line x1="{LEFT}" y1="{bottom}" x2="{WIDTH}" y2="{bottom}" stroke="#999"/>',
        f'<polyline points="{line}" fill="none" stroke="{COLOURS["cpu"]}" stroke-width="2"/>',
    ]
    for (x, y), (across, up) in zip(places, points, strict=True):
        shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{COLOURS["cpu"]}"/>')
        shapes.append(f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{up:.2f}</text>')
        shapes.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{across:g}</text>')
    return _svg(height, shapes)


def _svg(height: float, shapes: Sequence[str]) -> str:
    body = "".join(shapes)
    return (
        f'<svg viewBox="0 -4 {WIDTH} {height + 8:.0f}" width="{WIDTH}" xmlns="http://www.w3.org/2000/svg" '
        f'font-family="system-ui" font-size="12">{body}</svg>'
    )
