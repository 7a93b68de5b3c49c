"""The command ``blip2edge calibrate``: its flags, and the function that runs it."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.choices import FITTED_OPTIONS, RANGE_METHODS, WEIGHT_BITS
from blip2edge.cli.flag_groups import (
    DATA,
    MAX_BROKEN,
    add_anyway,
    add_limits,
    add_no_optimize,
    add_number,
    add_output,
    add_some_generation,
    add_threads,
    check_needed,
    given_limits,
)
from blip2edge.cli.flag_types import any_text, non_negative_number, positive_number, share
from blip2edge.cli.messages import print_note
from blip2edge.cli.next_steps import print_next, quoted, try_command
from blip2edge.cli.optimize import optimized
from blip2edge.cli.optimize import report_table as copy_table
from blip2edge.cli.table import size, table
from blip2edge.errors import UsageError, option, plural
from blip2edge.limits import PICTURE_LIMITS, Limits
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from blip2edge.calibration.confidence.pipeline import ConfidenceReport
    from blip2edge.calibration.confidence.references import References
    from blip2edge.calibration.results import CalibrationReport
    from blip2edge.calibration.search.front import FoundPoints
    from blip2edge.cli.parser import Parser

CONFIDENT = FITTED_OPTIONS
"""Generation flags that ``--references`` accepts: a confidence is fitted on captions that are generated with them."""

QUANTIZES = ("weights", "format", "drop_limit", "method", "int8_activations", "count")
"""Options that have an effect only with ``--images``, without which nothing is quantised."""

HEADER = (
    "graph",
    "precision",
    "size",
    "size / original",
    "INT8 products",
    "kept in float",
    "cosine",
    "lowest",
    "seconds",
)


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``calibrate``."""
    parser.add_positional_or_flag(
        "bundle",
        "-b",
        "--bundle",
        metavar="BUNDLE",
        type=Path,
        help="bundle to calibrate, in fp32 or fp16; without --images, a bundle of any precision",
    )
    add_output(parser, "BUNDLE8", "directory of the new INT8 bundle")
    parser.add_argument(
        "--images",
        metavar="DIR",
        type=Path,
        help="folder of calibration pictures, or of .tar shards with pictures; use pictures like those of the "
        "application. Without it nothing is quantised, and --references is needed",
    )
    _add_formats(parser)
    _add_search(parser)
    add_number(parser, "--count", "largest number of pictures of --images (default: 512)")
    _add_references(parser)
    add_threads(parser)
    add_limits(parser, Limits, PICTURE_LIMITS)
    add_no_optimize(parser)
    add_anyway(parser)


def _add_formats(parser: Parser) -> None:
    """Adds the flags that set the number formats of weights and activations."""
    parser.add_argument(
        "--method",
        choices=RANGE_METHODS,
        help="how the INT8 ranges of activations are chosen: by the error of the layer's output (smooth), or by the "
        "histogram of the activation (all others) (default: smooth)",
    )
    parser.add_argument(
        "--weights",
        choices=(*WEIGHT_BITS, "none"),
        help="precision of the language model's weights, with one scale per block; none: unchanged. TensorRT "
        "supports int4 only, TensorRT for RTX supports int8 and int4 (default: int8)",
    )
    parser.add_argument(
        "--format",
        metavar="GRAPH[:PATTERN]=FORMAT",
        action="append",
        default=[],
        help="number format of a graph, or of its matrices whose names match PATTERN (such as "
        "'decoder:*.layers.0.*=int8'): float (as in BUNDLE), fp16 (weights are stored in FP16, and computed as in "
        "BUNDLE), w8a8 (INT8 weights and activations), int8 or int4 (weights only; int4/32: blocks of at most 32); "
        "overrides --weights and --int8-activations; repeat the flag for several graphs",
    )
    parser.add_argument(
        "--drop-limit",
        metavar="X",
        type=float,
        help="keep the most sensitive layers in floating point until at most X percent of the captions change, or, "
        "if every picture has a .txt file with reference captions, until CIDEr drops by at most X points (default: "
        "no limit)",
    )
    parser.add_argument(
        "--int8-activations",
        metavar="GRAPH",
        action="append",
        default=[],
        help="name of a graph whose activations become INT8 too, in addition to vision_encoder and bridge; repeat "
        "the flag for several graphs",
    )


def _add_references(parser: Parser) -> None:
    """Adds the flag ``--references`` and the flags that belong to it, which fit a confidence."""
    group = parser.add_argument_group(
        "confidence", "a confidence holds for the bundle, the prompt and the generation flags that it is fitted with"
    )
    group.add_argument(
        "--references",
        metavar="FILE",
        help="pictures with known captions or answers, to fit the confidence of the new bundle: pictures like those of "
        f"the application, on which the model was not trained. FILE is {DATA}",
    )
    add_number(
        group,
        "--right-at",
        "a caption is right if its ROUGE-L to the references is at least X (0 to 1), and an answer is right if its VQA "
        "accuracy is at least X (default: 0.5 for answers; a caption must equal a reference apart from case and "
        "punctuation)",
        kind=share,
        metavar="X",
    )
    group.add_argument(
        "--annotations",
        metavar="FILE",
        help="JSON file with the answers to VQA questions (default: the file beside the questions)",
    )
    group.add_argument(
        "--prompt", metavar="P", type=any_text, help="text that the captions continue (default: the model's own prompt)"
    )
    add_some_generation(parser, "generation", "of the captions of --references", CONFIDENT)


def _references(options: argparse.Namespace) -> References | None:
    """Reads the pictures and captions that ``--references`` names; returns None if the flag is not given."""
    given = {name: getattr(options, name) for name in CONFIDENT if getattr(options, name) is not None}
    if options.references is None:
        needless = [
            name for name in ("right_at", "annotations", "prompt", *given) if getattr(options, name) is not None
        ]
        if needless:
            raise UsageError(f"{option(needless[0])} needs {option('references')}", f"give {option('references')} FILE")
        return None
    from blip2edge.calibration.confidence.references import References
    from blip2edge.training.evaluation.references import read_references

    items, rule, warnings = read_references(
        options.references, annotations=options.annotations, max_broken=MAX_BROKEN, right_at=options.right_at
    )
    return References(items, rule, options.prompt, given, warnings=warnings)


def _add_search(parser: Parser) -> None:
    group = parser.add_argument_group(
        "search", "tries the formats of each graph, and publishes one combination; OUT.run holds the state until then"
    )
    group.add_argument(
        "--search",
        action="store_true",
        help="measure combinations of number formats: changed captions, time and size; publish the fastest combination "
        "at which at most 1 percent of the captions change; a killed search goes on when the command is run again",
    )
    loss = "largest loss of captions in percentage points: captions that change, or CIDEr if pictures have .txt files"
    add_number(group, "--max-drop", loss, kind=non_negative_number, metavar="X")
    add_number(group, "--max-ms", "largest time of a caption in milliseconds", kind=positive_number, metavar="X")
    size = "largest size of graphs and token table in millions of bytes"
    add_number(group, "--max-mb", size, kind=positive_number, metavar="X")
    group.add_argument(
        "--device",
        metavar="NAME",
        help="predict the time for a board of `blip2edge plan`, such as orin-nano-8gb (default: this, measured here)",
    )


def run(options: argparse.Namespace) -> int:
    """Calibrate a bundle and print a table of its graphs."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.manifest import MANIFEST
    from blip2edge.bundle.outputs.publishing import check_output
    from blip2edge.calibration.search.journal import run_directory, unfinished_search

    if not (options.search and run_directory(options.output).exists()):  # else a killed search may have published it
        check_output(options.output, options.force, MANIFEST, options.bundle)
    from blip2edge.calibration.formats import INT8_ACTIVATIONS
    from blip2edge.calibration.pipeline import calibrate
    from blip2edge.training.metrics.captions import cider_d

    _check_quantized(options)
    _check_search(options)
    shared: dict[str, Any] = {
        "images": options.images,
        "cider": cider_d,
        "references": _references(options),
        **{name: getattr(options, name) for name in ("method", "count") if getattr(options, name) is not None},
        "force": options.force,
        "anyway": options.anyway,
        "threads": options.threads,
        "limits": given_limits(options, Limits),
        "notify": print_note,
    }
    stopped = None if options.search else unfinished_search(options.output)
    if stopped is not None:
        note = "is of a search that did not end: to go on with it, give its flags and --search --force; else remove it"
        print_note(f"{stopped} {note}")
    if options.search:
        report = _search(options, shared)
    else:
        with Progress() as progress:
            report = calibrate(
                options.bundle,
                options.output,
                activations=(*INT8_ACTIVATIONS, *options.int8_activations),
                weights=None if options.weights == "none" else options.weights or "int8",
                formats=options.format,
                drop_limit=options.drop_limit,
                progress=progress,
                **shared,
            )
    print(report_table(report), flush=True)
    for line in report.warnings:
        print(f"warning: {line}", file=sys.stderr)
    if not options.no_optimize and not options.search:  # a search publishes the copies that it has timed
        print(f"\n{copy_table(optimized(report.bundle))}")
    manifest = Bundle.open(report.bundle).manifest
    print_next(try_command(report.bundle, manifest), f"blip2edge bench {quoted(report.bundle)}")
    return 0


def _check_quantized(options: argparse.Namespace) -> None:
    """Raises UsageError for a flag of the quantisation if only a confidence is fitted, and nothing is quantised."""
    if options.images is None and options.references is not None:
        for name in QUANTIZES:
            given = getattr(options, name)
            check_needed(name, None if given == [] else given, "images", options.images)
        for one in fields(Limits):
            if one.name in PICTURE_LIMITS:
                name = one.metadata["flag"].removeprefix("--").replace("-", "_")
                check_needed(name, getattr(options, f"limit_{one.name}"), "images", options.images)


def _check_search(options: argparse.Namespace) -> None:
    """Raises UsageError for a flag that needs ``--search``, or that contradicts ``--search``.

    The flags of number formats contradict it, because the search chooses the formats.
    """
    only = {name: getattr(options, name) for name in ("max_drop", "max_ms", "max_mb", "device")}
    others = {name: getattr(options, name) for name in ("weights", "format", "drop_limit", "int8_activations")}
    given = [name for name, value in (others if options.search else only).items() if value not in (None, [])]
    if options.search and options.images is None:
        raise UsageError(f"{option('search', on=True)} needs {option('images')}", "give a folder of pictures")
    if given and options.search:
        both = f"{option('search', on=True)} and {option(given[0])}"
        mend = f"leave {option(given[0])} out: the search chooses the formats"
        raise UsageError(f"{both} cannot be combined", mend, field=given[0])
    if given:
        mend = f"give {option('search', on=True)} too"
        raise UsageError(f"{option(given[0])} belongs to a search", mend, field=given[0])


def _search(options: argparse.Namespace, shared: dict[str, Any]) -> CalibrationReport:
    """Searches the formats of each graph, and prints the best combinations of formats."""
    from blip2edge.calibration.search.front import PointLimits
    from blip2edge.calibration.search.pipeline import search
    from blip2edge.calibration.search.points import SearchOptions
    from blip2edge.optimization.pipeline import optimize
    from blip2edge.runtime.bench.devices import THIS, find_device

    wanted = SearchOptions(
        PointLimits(options.max_drop, options.max_ms, options.max_mb),
        None if options.device in (None, THIS) else find_device(options.device),
    )

    def optimizer(bundle: Path, graphs: Sequence[str]) -> None:
        optimize(bundle, "cpu", graphs=graphs)

    with Progress() as progress:
        report, found = search(
            options.bundle,
            options.output,
            options=wanted,
            optimizer=None if options.no_optimize else optimizer,
            progress=progress,
            **shared,
        )
    print(front_table(found, "predicted ms" if wanted.board else "ms"))
    print(f"\n{plural(len(found.points), 'combination')}, {found.cpu_s / 60:.1f} CPU minutes")
    print(f"published: {found.chosen.rule}\nthe same by hand: calibrate … {found.chosen.point.flags}\n")
    return report


def front_table(found: FoundPoints, ms: str) -> str:
    """Makes a table of the best combinations of formats, the fastest first."""
    rows = [
        [
            "→" if point == found.chosen.point else "",
            f"{point.drop:.1f}",
            f"{point.nats:.2g}",
            f"{point.ms:.1f}",
            f"{point.bytes / 1e6:.1f}",
            ", ".join(point.names.values()),
            point.preset,
        ]
        for point in found.front
    ]
    header = ("", "drop", "nats", ms, "MB", "vision, bridge, language", "plain flags")
    return table(header, rows, right=range(1, 5))


def report_table(report: CalibrationReport) -> str:
    """Makes a table with a line for each graph, and a line with the share of captions that did not change."""
    from blip2edge.calibration.report.files import REPORT_PAGE

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
    lines = [table(HEADER, rows, right=range(2, len(HEADER)))] if rows else []
    if report.captions is not None:
        same, pictures = report.captions.same, report.captions.pictures
        lines.append(f"\nsame caption as the original bundle: {same:.1%} of {plural(pictures, 'picture')}")
    peak = f", peak memory {size(report.peak_memory_bytes)}" if report.peak_memory_bytes else ""
    if report.confidence is not None:
        lines.append(confidence_line(report.confidence))
    if rows:
        lines.append(
            f"{report.bundle}: calibrated on {plural(report.pictures, 'picture')}, {report.seconds:.1f} s{peak}"
        )
        lines.append(f"{report.bundle / REPORT_PAGE}: every layer and the captions that differ")
    else:
        lines.append(f"{report.bundle}: a copy with a confidence, {report.seconds:.1f} s{peak}")
        lines.append(f"{report.bundle / REPORT_PAGE}: reliability diagram and coverage")
    return "\n".join(lines)


def confidence_line(fitted: ConfidenceReport) -> str:
    """Writes the measured values of a fitted confidence in one line."""
    found = fitted.figures
    half = dict(map(tuple, found["coverage"]))[0.5]
    return (
        f"confidence ({fitted.task}): {fitted.kind}, on {fitted.pictures} pictures of which {found['accuracy']:.1%} "
        f"are right; held out: calibration error {found['calibration_error']:.2%}, {half:.1%} right in the "
        "half with the higher confidence"
    )
