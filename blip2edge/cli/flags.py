"""What the flags of all commands are made of: types, errors that read alike, commands that load when they run."""

from __future__ import annotations

import argparse
import importlib
import math
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable

    Commands = argparse._SubParsersAction["Parser"]

BACKENDS = ("auto", "cpu", "openvino", "cuda", "tensorrt", "rtx", "ort-tensorrt")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors read like all others: one line `error: …`, status 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line with exit status 2."""
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def positive_int(text: str) -> int:
    """A whole number of at least 1."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """A whole number of at least 0."""
    return _whole(text, 0)


def number(text: str) -> float:
    """A finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a number is expected, not {text!r}")
    return value


def positive_number(text: str) -> float:
    """A finite number above 0."""
    value = number(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"a number above 0 is expected, not {text}")
    return value


def non_negative_number(text: str) -> float:
    """A finite number of at least 0."""
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"a number of at least 0 is expected, not {text}")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"a number above 0 and at most 1 is expected, not {text}")
    return value


def share_or_zero(text: str) -> float:
    """A number from 0 to 1."""
    value = number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"a number from 0 to 1 is expected, not {text}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"a whole number of at least {least} is expected, not {text!r}")
    return value


def _command(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """The function of a command, imported only when the command runs."""

    def run(options: argparse.Namespace) -> int:
        status: int = getattr(importlib.import_module(f"blip2edge.cli.{module}"), function)(options)
        return status

    return run


def add_command(commands: Commands, name: str, says: str, module: str, function: str) -> Parser:
    """A command whose module is imported when it runs."""
    parser = commands.add_parser(name, help=says, description=says[0].upper() + says[1:], allow_abbrev=False)
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.set_defaults(run=_command(module, function))
    return parser
