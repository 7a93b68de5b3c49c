"""``blip2edge calibrate``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blip2edge.cli.optimize import optimized
from blip2edge.cli.optimize import report_table as copy_table
from blip2edge.cli.table import size, table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.calibration.results import CalibrationReport

HEADER = (
    "graph",
    "precision",
    "size",
    "of the parent",
    "INT8 products",
    "left",
    "cosine",
    "lowest",
    "seconds",
)


def calibrate(options: argparse.Namespace) -> int:
    """Calibrate a bundle and print what came out."""
    from blip2edge.calibration.pipeline import W8A8, calibrate
    from blip2edge.training.metrics.captions import cider_d

    with Progress() as progress:
        report = calibrate(
            options.bundle,
            options.output,
            images=options.images,
            method=options.method,
            activations=(*W8A8, *options.int8_activations),
            weights=None if options.weights == "none" else options.weights,
            drop_limit=options.drop_limit,
            cider=cider_d,
            count=options.count,
            force=options.force,
            threads=options.threads,
            progress=progress,
        )
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
    print(report_table(report))
    if not options.no_optimize:
        print(f"\n{copy_table(optimized(report.bundle))}")
    return 0


def report_table(report: CalibrationReport) -> str:
    """A line a graph, and what the captions say."""
    rows = []
    for name, graph in report.graphs.items():
        cosines = list(graph.cosine.values())
        rows.append(
            [
                name,
                graph.precision,
                size(graph.bytes),
                f"{graph.bytes / graph.parent_bytes:.2f}",
                str(graph.products) if graph.products else "",
                str(len(graph.kept_float)) if graph.products else "",
                f"{min(value.mean for value in cosines):.5f}" if cosines else "",
                f"{min(value.lowest for value in cosines):.5f}" if cosines else "",
                f"{graph.seconds:.1f}",
            ]
        )
    lines = [table(HEADER, rows, right=range(2, len(HEADER)))]
    if report.captions is not None:
        same, pictures = report.captions.same, report.captions.pictures
        lines.append(f"\ncaptions as the parent's: {same:.1%} of {pictures} pictures")
    peak = f", peak memory {size(report.peak_memory_bytes)}" if report.peak_memory_bytes else ""
    lines.append(f"{report.bundle}: calibrated on {report.pictures} pictures, {report.seconds:.1f} s{peak}")
    return "\n".join(lines)
