"""``blip2edge ask``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.cli.caption import check, load_captioner, print_pieces, print_result
from blip2edge.cli.flag_groups import add_bundle_option, add_generation, add_stream_or_json, given_generation

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``ask``."""
    parser.add_argument("image", metavar="IMAGE", help="picture file")
    parser.add_argument("question", metavar="QUESTION", help="question about the picture")
    add_bundle_option(parser)
    add_stream_or_json(parser)
    add_generation(parser)


def run(options: argparse.Namespace) -> int:
    """Answer one question about one picture."""
    check(options)
    captioner = load_captioner(options)
    flags = given_generation(options)
    if options.stream:
        prompt = captioner.prompts.question(options.question)
        print_pieces("", captioner.stream(options.image, prompt=prompt, **flags))
        return 0
    print_result(captioner.ask(options.image, options.question, **flags), as_json=options.json, label="")
    return 0
