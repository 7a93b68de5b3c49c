"""``blip2edge export``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.optimize import optimized
from blip2edge.cli.optimize import report_table as copy_table
from blip2edge.cli.table import difference, size, table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.bundle.schema import MergingRecord
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
            merge_tokens=options.merge_tokens,
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
    what the tolerance bounds. Where patches are merged, torch merges them too, and a line tells how near that is to
    the model without.
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
    merging = f"{merging_line(report.merging)}\n" if report.merging is not None else ""
    peak = f", peak memory {size(report.peak_memory_bytes)}" if report.peak_memory_bytes else ""
    return f"{text}\n\n{merging}{report.bundle}: verified ({report.verify}) against torch, {report.seconds:.1f} s{peak}"


def merging_line(merging: MergingRecord) -> str:
    """What merging patches made of the vision encoder's output, and how near it is to the model without."""
    counts = f"{merging.merge_tokens} a layer, {merging.embeds_before} embeddings become {merging.embeds}"
    if merging.cosine is None or merging.lowest is None:
        return f"merged patches: {counts}; not compared with the model that merges none (--verify full does)"
    return (
        f"merged patches: {counts}; {merging.output} without merging: cosine {merging.cosine:.4f} "
        f"(lowest {merging.lowest:.4f}) on {merging.pictures} drawn pictures"
    )
