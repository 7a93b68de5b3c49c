"""Writes the report of ``bench`` as Markdown, and as one HTML page with charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from blip2edge.charts import Bar, bars, curve, html_page, html_table
from blip2edge.runtime.bench.measure import BenchReport, StageTimes

STAGE_COLUMNS = ("stage", "p50 ms", "p90 ms", "p99 ms", "CPU ms", "share of the roofline")
UNITS = {
    "batch": ("pictures in a batch", "pictures per CPU second", "batch", "pictures_per_cpu_s"),
    "prompt": ("tokens of the prompt", "CPU ms of the prefill", "slots", "prefill_cpu_ms"),
    "caption": ("tokens of the caption", "CPU ms per token", "tokens", "decode_cpu_ms_per_token"),
}
"""For each sweep: label of the x axis, label of the y axis, and the keys of x and y in the sweep's rows."""


def markdown(report: BenchReport) -> str:
    """Formats the report as Markdown: a table of stages, then single measured values, then the sweeps."""
    lines = [
        f"| {' | '.join(STAGE_COLUMNS)} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    lines += [f"| {' | '.join(row)} |" for row in _stage_rows(report)]
    lines += ["", *(f"- {line}" for line in facts(report))]
    for name, rows in report.sweeps.items():
        if rows:
            lines += ["", *_table(name, rows)]
    return "\n".join(lines)


def facts(report: BenchReport) -> list[str]:
    """Returns the measured values that are in no table (such as memory and energy) as sentences."""
    memory = {name: f"{count / 1e6:.0f} MB" for name, count in report.memory.items()}
    found = [
        f"{report.tokens_per_s:.1f} tokens/s while decoding, {report.options.tokens} tokens per caption",
        (
            f"loaded in {report.start_s:.2f} s; peak memory {memory['loading']} while loading, {memory['captioning']} "
            f"while single pictures are captioned, {memory['peak']} in the whole run; {memory['resident']} at the end; "
            f"weights {memory['graphs']}"
        ),
        f"{report.machine['processor']}, backend {report.machine['backend']}, "
        f"threads {report.machine['threads'] or 'all'}; "
        + ", ".join(f"{name} {version}" for name, version in report.versions.items()),
    ]
    if roof := report.roofline:
        speed = f"{roof['gigaflops_fp32']} GFLOP/s in fp32, {roof['gigaops_int8']} GOP/s in int8"
        reading = f"{roof['gigabytes_per_s']} GB/s read"
        found.append(f"one core: {reading}, {speed}, measured with backend {roof['backend']}")
    found.append(f"graphs of the optimized copy: {', '.join(report.bundle['optimised']) or 'none'}")
    if report.energy is not None:
        found.append(f"{report.energy['joules_per_caption']:.2f} J per caption ({report.energy['source']})")
    if report.draft is not None:
        found.append(f"{report.draft['tokens_per_pass']:.2f} tokens per pass (draft model: {report.draft['kind']})")
    return found + [f"not measured: {what} ({why})" for what, why in report.left_out.items()]


def _share(stage: StageTimes) -> str:
    return "" if stage.share is None else f"{stage.share:.0%} ({stage.bound})"


def _table(name: str, rows: Sequence[Mapping[str, float]]) -> list[str]:
    across, up, x, y = UNITS[name]
    return [f"| {across} | {up} |", "|---:|---:|", *(f"| {row[x]:g} | {row[y]:.2f} |" for row in rows)]


def bench_page(report: BenchReport) -> str:
    """Formats the report as an HTML page, with bars for the stages and a curve for each sweep."""
    table = html_table(STAGE_COLUMNS, "lrrrrr", _stage_rows(report))
    parts = [
        f"<header><h1>{escape(str(report.bundle['family']))}</h1></header>",
        f"<section><ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts(report))}</ul></section>",
        (
            f"<section><h2>Time of each stage</h2>{table}{bars(_stage_bars(report))}"
            "<p class=note>Grey: wall time, median. Blue: CPU time; the red line is its roofline bound.</p>"
            "</section>"
        ),
    ]
    for name, rows in report.sweeps.items():
        if rows:
            across, up, x, y = UNITS[name]
            points = [(row[x], row[y]) for row in rows]
            parts.append(f"<section><h2>{escape(up)} by {escape(across)}</h2>{curve(points)}</section>")
    return html_page("blip2edge bench", "".join(parts))


def _stage_rows(report: BenchReport) -> list[tuple[str, ...]]:
    """Returns the table cells of each stage, in the order of :data:`STAGE_COLUMNS`."""
    return [
        (name, *(f"{stage.ms[key]:.1f}" for key in ("p50", "p90", "p99")), f"{stage.cpu_ms:.1f}", _share(stage))
        for name, stage in report.stages.items()
    ]


def _stage_bars(report: BenchReport) -> list[Bar]:
    """Makes two bars for each stage: wall time, and CPU time with a mark at the shortest time by the roofline."""
    found = []
    for name, stage in report.stages.items():
        if name != "total":
            least = None if stage.share is None else stage.share * stage.least_cpu_ms
            found.append(Bar(name, "before", stage.ms["p50"], f"{stage.ms['p50']:.1f} ms"))
            found.append(Bar("", "now", stage.cpu_ms, f"{stage.cpu_ms:.1f} ms CPU", least))
    return found
