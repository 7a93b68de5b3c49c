"""The command ``blip2edge sign``: its flags, and the function that runs it."""

from __future__ import annotations

import os
import sys
from getpass import getpass
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flag_groups import add_bundle
from blip2edge.cli.next_steps import print_next, quoted
from blip2edge.errors import UsageError, plural

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser

PASSWORD = "BLIP2EDGE_KEY_PASSWORD"
"""Environment variable with the password of a private key."""


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``sign``."""
    add_bundle(parser)
    parser.add_argument(
        "--key",
        metavar="KEY",
        type=Path,
        required=True,
        help="private key in PEM format, of the elliptic curve P-256, P-384 or P-521; the password of a protected key "
        f"is taken from the environment variable {PASSWORD}, or asked for",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="file of the signature; it is replaced if it exists (default: model.sig in BUNDLE)",
    )


def run(options: argparse.Namespace) -> int:
    """Sign every file of a bundle, with its optimized copies and engines."""
    from blip2edge.bundle.trust.signing import sign_bundle

    report = sign_bundle(
        options.bundle, options.key, output=options.output, ask_password=lambda: _password(options.key)
    )
    print(f"{report.signature}: a signature of {plural(len(report.files), 'file')}")
    place = "" if options.output is None else f" --signature {quoted(options.output)}"
    print_next(f"blip2edge verify {quoted(options.bundle)} --key PUBLIC_KEY{place}")
    return 0


def _password(key: Path) -> str:
    """Returns the password of a private key, from the environment or asked on the terminal.

    Raises:
        UsageError: The environment variable is not set, and there is no terminal.
    """
    given = os.environ.get(PASSWORD)
    if given is not None:
        return given
    if not sys.stdin.isatty():
        raise UsageError(f"{key} is protected by a password", f"set the environment variable {PASSWORD}")
    return getpass(f"password of {key}: ")
