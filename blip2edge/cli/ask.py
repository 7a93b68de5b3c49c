"""The command ``blip2edge ask``: its flags, and the function that runs it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.caption import Item, check, load_captioner, open_bundle, print_captions, takes_videos
from blip2edge.cli.flag_groups import add_batch_size, add_bundle_option, add_generation, add_limits, add_stream_or_json
from blip2edge.cli.flag_types import any_text
from blip2edge.cli.picture_arguments import IMAGE_HELP, find_pictures
from blip2edge.limits import FILE_LIMITS, Limits

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ask``."""
    parser.add_argument("image", metavar="IMAGE", help=IMAGE_HELP)
    parser.add_argument(
        "question", metavar="QUESTION", type=any_text, help="question about the picture, or about each picture"
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    add_stream_or_json(parser)
    add_generation(parser)
    add_limits(parser, Limits, FILE_LIMITS)


def run(options: argparse.Namespace) -> int:
    """Answer one question about one picture, or about each picture of a folder."""
    check(options)
    bundle = open_bundle(options)
    pictures = find_pictures([options.image], videos=takes_videos(bundle))
    captioner = load_captioner(options, bundle)
    prompt = captioner.prompts.question(options.question)
    items = [Item((picture,)) for picture in pictures]
    return print_captions(captioner, options, items, [prompt] * len(items))
