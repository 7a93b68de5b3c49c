"""The parser of the whole command line. It imports only the module of the given command, so `--help` is quick."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from blip2edge import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

# A command is the module of that name in `blip2edge.cli`, with `add_arguments(parser)` and `run(options)`.
COMMANDS = {
    "export": "export a checkpoint to a verified ONNX bundle",
    "calibrate": "make an INT8 bundle, calibrated on pictures",
    "optimize": "make a faster copy of a bundle for one backend",
    "caption": "caption pictures",
    "ask": "answer a question about a picture",
    "match": "score how well pictures and texts match",
    "embed": "print the vectors of pictures or of texts",
    "watch": "caption a camera, a video or a folder live",
    "serve": "caption over HTTP, with a page for the camera",
    "inspect": "show what a bundle holds",
    "build": "build TensorRT engines of a bundle",
    "bench": "measure how fast a bundle is on this machine",
    "doctor": "check what this machine can run",
    "demo": "export, calibrate and caption with the checkpoint that comes with the package",
    "train": "train the bridge on a frozen language model",
    "eval": "score a checkpoint or a bundle",
    "capfilt": "clean the captions of a data set: write new ones with a captioner, filter all with a matching head",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors have the form of all other errors: one line `error: …`, status 2."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse unknown arguments here: the error then names the command's own --help."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Refuse the command line with exit status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def build_parser(words: Sequence[str] | None = None) -> Parser:
    """The parser of all commands. Every parsed result has `run`, the command's function.

    Args:
        words: What will be parsed. Commands that are not among these words get no flags, and their modules are not
            imported. None: all commands get their flags.
    """
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
    for name, summary in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:], allow_abbrev=False)
        one.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        if words is None or name in words:
            module = import_module(f"blip2edge.cli.{name}")
            module.add_arguments(one)
            one.set_defaults(run=module.run)
    return parser
