"""``blip2edge export``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.optimize import optimized
from blip2edge.cli.optimize import report_table as copy_table
from blip2edge.cli.table import difference, size, table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.export.pipeline import ExportReport

HEADER = ("graph", "size", "seconds", "max difference", "relative", "tolerance")


def export(options: argparse.Namespace) -> int:
    """Export a checkpoint and print what came out."""
    from blip2edge.export.pipeline import export_checkpoint

    with Progress() as progress:
        report = export_checkpoint(
            options.checkpoint,
            options.output,
            precision=options.precision,
            verify=options.verify,
            base=options.base,
            force=options.force,
            progress=progress,
        )
    print(report_table(report))
    if not options.no_optimize:
        print(f"\n{copy_table(optimized(report.bundle))}")
    return 0


def report_table(report: ExportReport) -> str:
    """A line a graph, and one for the whole.

    The largest difference to torch stands as it is, and relative to the largest value of the output, which is
    what the tolerance bounds.
    """
    rows = [
        [
            graph.name,
            size(graph.bytes),
            f"{graph.seconds:.1f}",
            difference(graph.max_difference),
            difference(graph.relative),
            difference(graph.tolerance),
        ]
        for graph in report.graphs
    ]
    text = table(HEADER, rows, right=range(1, len(HEADER)))
    peak = f", peak memory {size(report.peak_memory_bytes)}" if report.peak_memory_bytes else ""
    return (
        f"{text}\n\n{report.bundle}: verified ({report.verify}) against torch, {report.seconds:.1f} s{peak}"
    )
