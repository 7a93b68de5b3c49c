"""The command ``blip2edge verify``: its flags, and the function that runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flag_groups import add_bundle
from blip2edge.errors import plural
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``verify``."""
    add_bundle(parser)
    parser.add_argument(
        "--key",
        metavar="PUBLIC_KEY",
        type=Path,
        required=True,
        help="public key of the signer in PEM format; or the certificates, in PEM format, of the authority that issued "
        "the signer's certificate",
    )
    parser.add_argument(
        "--signature",
        metavar="FILE",
        type=Path,
        help="file of the signature (default: model.sig in BUNDLE, or else BUNDLE.sig beside it)",
    )


def run(options: argparse.Namespace) -> int:
    """Check that a bundle has exactly the signed files, and that none was changed."""
    from blip2edge.bundle.trust.signing import verify_bundle

    with Progress() as progress:
        report = verify_bundle(
            options.bundle,
            options.key,
            signature=options.signature,
            progress=lambda _, done, total: progress("hashing", done, total),
        )
    print(
        f"verified: {report.signature} is a signature of {options.key}, and lists {plural(len(report.files), 'file')}"
    )
    return 0
