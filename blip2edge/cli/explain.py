"""The command ``blip2edge explain``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from blip2edge.cli.flag_groups import (
    BUNDLE,
    add_limits,
    add_number,
    add_output,
    add_queries,
    add_require_signature,
    add_threads,
    given_limits,
)
from blip2edge.cli.flag_types import any_text, non_negative_int
from blip2edge.cli.messages import Failures
from blip2edge.cli.picture_arguments import IMAGE_HELP, find_pictures
from blip2edge.cli.table import table
from blip2edge.errors import ImageError, plural
from blip2edge.limits import PICTURE_LIMITS, Limits
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

HEADER = ("layer", "patches a query looks at", "strongest patch", "other tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``explain``."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGE_HELP)
    parser.add_argument("-b", "--bundle", metavar="BUNDLE", type=Path, required=True, help=BUNDLE)
    add_output(parser, "DIR", "directory for explain.html, explain.json and the PNG files")
    parser.add_argument(
        "--prompt", metavar="P", type=any_text, help="instruction, for a model whose bridge reads it (InstructBLIP)"
    )
    add_queries(parser, "of an elastic bundle (default: all)")
    add_number(
        parser,
        "--maps",
        "number of pictures that heat maps are drawn of, the first ones; the others count for the similarity of the "
        "queries",
        8,
        kind=non_negative_int,
    )
    add_threads(parser)
    add_require_signature(parser)
    parser.add_argument("--json", action="store_true", help="print the object of explain.json")
    add_limits(parser, Limits, PICTURE_LIMITS)


def run(options: argparse.Namespace) -> int:
    """Explain the bridge on the pictures; a picture that cannot be read does not end the command."""
    from blip2edge.explanation.pipeline import explain

    pictures = find_pictures(options.images)
    with Progress() as progress:
        report = explain(
            [picture.source for picture in pictures],
            options.bundle,
            options.output,
            prompt=options.prompt,
            queries=options.queries,
            maps=options.maps,
            force=options.force,
            threads=options.threads,
            require_signature=options.require_signature,
            limits=given_limits(options, Limits),
            progress=progress,
        )
    failures = Failures(ImageError)
    for error in report.failures:
        failures.add(error)
    print(json.dumps(report.document) if options.json else summary(report.document, report.page), flush=True)
    return failures.exit_status(len(pictures))


def summary(document: dict[str, Any], page: Path) -> str:
    """Formats the result: a table of the layers (medians over queries and pictures), the similarity, gates and page."""
    lines = []
    if document["pictures"]:
        lines += [table(HEADER, [_row(document, at) for at in range(len(document["layers"]))], right=range(4)), ""]
    similarity = document["similarity"]
    if similarity is not None and similarity["most_alike"] is not None:
        pair = similarity["most_alike"]
        one, other = pair["queries"]
        lines.append(
            f"cosine of two queries: {similarity['mean']:.2f} over {plural(similarity['pictures'], 'picture')}; most "
            f"alike: {one} and {other} ({pair['cosine']:.2f})"
        )
    for gate in document["gates"]:
        lines.append(
            f"gate before layer {gate['before']}: attention {gate['attention']:.3f}, feed-forward "
            f"{gate['feed_forward']:.3f}"
        )
    return "\n".join([*lines, str(page)])


def _row(document: dict[str, Any], at: int) -> list[str]:
    """Returns the table row of one layer: medians over all queries of all pictures."""
    queries = [query for picture in document["pictures"] for query in picture["layers"][at]["queries"]]
    others = median(query["before"] + query["queries"] for query in queries)
    spread, weight = (median(query[key] for query in queries) for key in ("spread", "weight"))
    patches = document["grid"]["rows"] * document["grid"]["columns"]
    return [str(document["layers"][at]), f"{spread:.1f} of {patches}", f"{weight:.1%}", f"{others:.1%}"]
