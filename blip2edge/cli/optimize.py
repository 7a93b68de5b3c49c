"""``blip2edge optimize``, and what ``export`` and ``calibrate`` do at their end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.table import table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from blip2edge.optimization.pipeline import OptimizedReport

HEADER = ("graph", "portable ms", "optimised ms", "times", "cosine", "passes")


def optimize(options: argparse.Namespace) -> int:
    """Make a bundle's copy for a backend and print what came out."""
    print(report_table(optimized(options.bundle, options.backend)))
    return 0


def optimized(bundle: Path, backend: str = "cpu") -> OptimizedReport:
    """Makes the copy, with progress on stderr."""
    from blip2edge.optimization.pipeline import optimize as run

    with Progress() as progress:
        return run(bundle, backend, progress=progress)


def report_table(report: OptimizedReport) -> str:
    """A line a graph; those that stay as they are below, with the reason."""
    rows = []
    for name, graph in report.record.graphs.items():
        before, after = graph.milliseconds
        times = f"{before / after:.2f}" if after else ""
        rows.append(
            [name, f"{before:.1f}", f"{after:.1f}", times, f"{graph.cosine:.5f}", ", ".join(graph.passes)]
        )
    lines = [table(HEADER, rows, right=range(1, 5))] if rows else []
    lines += [f"{name} runs as it is: {why}" for name, why in report.record.left.items()]
    lines.append(f"{report.directory}: checked against the bundle's own graphs, {report.seconds:.1f} s")
    return "\n".join(lines)
