"""The command ``blip2edge export``: its flags, and the function that runs it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blip2edge.choices import PRECISIONS, VERIFICATIONS
from blip2edge.cli.flag_groups import add_anyway, add_no_optimize, add_number, add_output
from blip2edge.cli.flag_types import non_negative_int
from blip2edge.cli.messages import print_note
from blip2edge.cli.next_steps import calibrate_command, print_next, try_command
from blip2edge.cli.optimize import optimized
from blip2edge.cli.optimize import report_table as copy_table
from blip2edge.cli.table import difference, size, table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.bundle.manifest import MergingRecord
    from blip2edge.export.pipeline import ExportReport

HEADER = ("graph", "size", "seconds", "max difference", "relative", "tolerance")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``export``."""
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="checkpoint directory, hub name, PEFT adapter or .pth file of LAVIS"
    )
    add_output(parser, "BUNDLE", "directory of the new bundle")
    parser.add_argument(
        "--base",
        metavar="DIRECTORY",
        help="checkpoint with the frozen parts of the model; required for a .pth file of LAVIS and for a PEFT adapter "
        "whose base is not on this machine",
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="precision of the graphs")
    parser.add_argument(
        "--verify",
        choices=VERIFICATIONS,
        help="how the graphs are compared with torch. full: the whole model; sample: some of its layers, with fewer "
        "sizes of inputs (default: full if the weights have at most 1 GiB, otherwise sample)",
    )
    add_number(
        parser,
        "--merge-tokens",
        "number of patches to merge in each layer of the vision encoder; faster, but the captions may differ from "
        "those of transformers; 0: none",
        0,
        kind=non_negative_int,
        metavar="R",
    )
    add_no_optimize(parser)
    add_anyway(parser)


def run(options: argparse.Namespace) -> int:
    """Export a checkpoint and print a table of its graphs."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.manifest import MANIFEST
    from blip2edge.bundle.outputs.publishing import check_output

    check_output(options.output, options.force, MANIFEST, options.checkpoint, options.base)
    from blip2edge.model.checkpoint.stored.files import find_checkpoint, local_checkpoint
    from blip2edge.model.checkpoint.stored.layouts import check_layout

    for given in (options.checkpoint, *([] if options.base is None else [options.base])):
        path = local_checkpoint(given) or find_checkpoint(given)
        if path.is_dir():  # a wrong one is refused before torch is imported, which takes seconds
            check_layout(path)
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
            anyway=options.anyway,
            progress=progress,
            notify=print_note,
        )
    for warning in report.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print(report_table(report))
    if not options.no_optimize:
        print(f"\n{copy_table(optimized(report.bundle))}")
    bundle, manifest = report.bundle, Bundle.open(report.bundle).manifest
    smaller = calibrate_command(bundle, manifest)
    print_next(try_command(bundle, manifest), *([] if smaller is None else [smaller]))
    return 0


def report_table(report: ExportReport) -> str:
    """Makes a table with a line for each graph and a line for the whole bundle.

    The table has the largest absolute difference from torch, and this difference relative to the largest value of the
    output, which the tolerance limits. If patches are merged, torch merges the same patches, and one more line compares
    the output with that of the model without merging.
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
    """Returns a line with the number of merged patches, and the cosine between the outputs with and without merging."""
    counts = f"{merging.merge_tokens} a layer, {merging.embeds_before} embeddings become {merging.embeds}"
    if merging.cosine is None or merging.lowest is None:
        return f"merged patches: {counts}; not compared with the model that merges none (--verify full does)"
    return (
        f"merged patches: {counts}; {merging.output} without merging: cosine {merging.cosine:.4f} (lowest "
        f"{merging.lowest:.4f}) on {merging.pictures} drawn pictures"
    )
