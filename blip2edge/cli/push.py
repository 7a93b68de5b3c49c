"""The command ``blip2edge push``: its flags, and the function that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flag_groups import add_bundle
from blip2edge.cli.messages import print_note
from blip2edge.cli.next_steps import print_next, try_command
from blip2edge.cli.table import size
from blip2edge.errors import plural
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``push``."""
    add_bundle(parser)
    parser.add_argument("repository", metavar="ORG/NAME", help="repository on the Hugging Face hub; made if it is new")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch; it is made if it does not exist (default: main)")
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    parser.add_argument(
        "--derived",
        action="store_true",
        help="also upload the optimized copies and engines in BUNDLE; whoever downloads them uses them only if the "
        "bundle is signed",
    )
    parser.add_argument(
        "--license", metavar="ID", help="license in the model card, such as mit (default: that of the checkpoint)"
    )
    parser.add_argument("--card", action="store_true", help="print the model card and upload nothing")


def run(options: argparse.Namespace) -> int:
    """Upload a bundle with its model card, or print the card."""
    from blip2edge.bundle.bundle import Bundle
    from blip2edge.bundle.hub.card import model_card
    from blip2edge.bundle.hub.upload import push_bundle, push_name

    name = push_name(options.repository, options.revision, options.license)
    manifest = Bundle.open(options.bundle).manifest
    if options.card:
        print(model_card(manifest, name.repository, name.revision, options.license or ""), end="")
        return 0
    with Progress() as progress:
        report = push_bundle(
            options.bundle,
            options.repository,
            private=options.private,
            revision=options.revision,
            message=options.message,
            derived=options.derived,
            license_id=options.license,
            progress=lambda _, done, total: progress("hashing", done, total),
        )
    if report.card_kept:
        print_note("note: README.md of the repository was edited, so it is kept; --card prints the new one")
    if report.removed:
        print_note(f"note: removed, because this bundle does not have it: {', '.join(report.removed)}")
    print(f"{report.name}: {plural(len(report.files), 'file')}, {size(sum(report.files.values()))}: {report.url}")
    print_next(try_command(Path(str(report.name)), manifest))
    return 0
