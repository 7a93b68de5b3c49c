"""The command ``blip2edge match``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blip2edge.cli.flag_groups import add_batch_size, add_bundle_option, add_limits, given_limits, print_unsigned
from blip2edge.cli.flag_types import any_text
from blip2edge.cli.messages import Failures
from blip2edge.cli.picture_arguments import IMAGE_HELP, find_pictures
from blip2edge.errors import Blip2EdgeError, ImageError
from blip2edge.limits import PICTURE_LIMITS, Limits

if TYPE_CHECKING:
    import argparse

    from blip2edge.runtime.captioning.matcher import Matcher
    from blip2edge.runtime.captioning.request import MatchResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``match``."""
    parser.add_argument("images", metavar="IMAGE", nargs="+", help=IMAGE_HELP)
    parser.add_argument(
        "--text",
        metavar="T",
        type=any_text,
        action="append",
        required=True,
        help="text to compare with each picture; may be repeated",
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    add_limits(parser, Limits, PICTURE_LIMITS)
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each pair of picture and text")


def run(options: argparse.Namespace) -> int:
    """Compare every picture with every text, in the order given; a broken picture does not end the command."""
    pictures = find_pictures(options.images)
    texts: list[str] = options.text
    many = len(pictures) > 1 or len(texts) > 1 or pictures[0].found
    failures = Failures(ImageError)
    results = load_matcher(options).match_many(
        [picture.source for picture in pictures], texts, batch_size=options.batch_size, return_exceptions=True
    )
    for picture in pictures:
        for place in range(len(texts)):
            result = next(results)
            if isinstance(result, Blip2EdgeError):
                failures.add(result)
                break
            label = f"{picture.name}: {texts[place]}: " if many else ""
            line = json.dumps({**result.to_json(), "image": picture.name}) if options.json else label + _scores(result)
            print(line, flush=True)
        picture.release()
    return failures.exit_status(len(pictures))


def _scores(result: MatchResult) -> str:
    """Formats the scores of a pair: the match probability (if the model computes it), then the cosine."""
    cosine = f"cosine {result.cosine:.4f}"
    return cosine if result.probability is None else f"probability {result.probability:.4f}, {cosine}"


def load_matcher(options: argparse.Namespace) -> Matcher:
    """Loads the matcher of the bundle that the flags name."""
    from blip2edge.runtime.captioning.matcher import Matcher

    matcher = Matcher.load(
        options.bundle,
        backend=options.backend,
        threads=options.threads,
        require_signature=options.require_signature,
        limits=given_limits(options, Limits),
    )
    print_unsigned(matcher.bundle)
    return matcher
