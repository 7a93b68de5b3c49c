"""The whole command line. No command's heavy packages are imported here: `--help` does not wait for numpy."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, NoReturn, Protocol

from blip2edge import __version__
from blip2edge.cli import (
    ask,
    bench,
    build,
    calibrate,
    capfilt,
    caption,
    demo,
    doctor,
    embed,
    evaluate,
    export,
    inspect,
    match,
    optimize,
    serve,
    train,
    watch,
)

if TYPE_CHECKING:
    from collections.abc import Mapping


class Command(Protocol):
    """A module of `blip2edge.cli` that holds one command."""

    SUMMARY: str
    """One line for `blip2edge --help`."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's flags."""

    def run(self, options: argparse.Namespace) -> int:
        """Runs the command; the exit status."""


# In the order of `blip2edge --help`.
COMMANDS: Mapping[str, Command] = {
    "export": export,
    "calibrate": calibrate,
    "optimize": optimize,
    "caption": caption,
    "ask": ask,
    "match": match,
    "embed": embed,
    "watch": watch,
    "serve": serve,
    "inspect": inspect,
    "build": build,
    "bench": bench,
    "doctor": doctor,
    "demo": demo,
    "train": train,
    "eval": evaluate,
    "capfilt": capfilt,
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors read like all others: one line `error: …`, status 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line with exit status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def build_parser() -> Parser:
    """The parser of all commands. Every parsed result has `run`, the command's function."""
    parser = Parser(
        prog="blip2edge",
        description="From a trained BLIP-2-style captioner to captions on an edge device.",
        epilog="exit status: 0 done, 1 an error (one line on standard error), 2 wrong usage",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"blip2edge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser
    )
    for name, command in COMMANDS.items():
        summary = command.SUMMARY
        one = commands.add_parser(
            name, help=summary, description=summary[0].upper() + summary[1:], allow_abbrev=False
        )
        one.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        command.add_arguments(one)
        one.set_defaults(run=command.run)
    return parser
