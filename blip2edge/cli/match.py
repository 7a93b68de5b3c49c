"""``blip2edge match``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blip2edge.cli.flag_groups import add_batch_size, add_bundle_option

if TYPE_CHECKING:
    import argparse

    from blip2edge.runtime.captioning.matcher import Matcher, MatchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``match``."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="picture file")
    parser.add_argument(
        "--text",
        metavar="T",
        action="append",
        required=True,
        help="text to compare with each picture; may be repeated",
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per line for each pair of picture and text"
    )


def run(options: argparse.Namespace) -> int:
    """Compare every picture with every text, in the order given."""
    images: list[str] = options.images
    many = len(images) > 1 or len(options.text) > 1
    for result in load_matcher(options).match_many(images, options.text, batch_size=options.batch_size):
        label = f"{result.image}: {result.text}: " if many else ""
        print(json.dumps(result.to_json()) if options.json else f"{label}{_scores(result)}", flush=True)
    return 0


def _scores(result: MatchResult) -> str:
    """Both scores, or the one that the model gives."""
    cosine = f"cosine {result.cosine:.4f}"
    return cosine if result.probability is None else f"probability {result.probability:.4f}, {cosine}"


def load_matcher(options: argparse.Namespace) -> Matcher:
    """The matcher that the flags name."""
    from blip2edge.runtime.captioning.matcher import Matcher

    return Matcher.load(options.bundle, backend=options.backend, threads=options.threads)
