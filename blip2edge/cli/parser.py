"""The parser of the whole command line. It imports only the module of the given command, so `--help` is quick."""

from __future__ import annotations

import argparse
import os
import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from blip2edge import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

SHOWN = 3  # unknown words that an error names

# A command is the module of that name in `blip2edge.cli`, with `add_arguments(parser)` and `run(options)`.
COMMANDS = {
    "export": "export a checkpoint to a verified ONNX bundle",
    "calibrate": "make an INT8 bundle, calibrated on pictures",
    "optimize": "add a copy of the graphs to a bundle, optimized for one backend and this machine",
    "caption": "caption pictures",
    "ask": "answer a question about a picture",
    "match": "score how well pictures and texts match",
    "embed": "print the vectors of pictures or of texts",
    "bulk": "caption all pictures of folders, shards or tables, and go on after an interruption",
    "watch": "caption the newest picture of a camera or a video, again and again, or each new picture of a folder",
    "serve": "start an HTTP server that captions pictures",
    "triton": "write a bundle as a model for Triton Inference Server",
    "inspect": "show the contents of a bundle",
    "sign": "sign the files of a bundle with a private key",
    "verify": "check the signature of a bundle with a public key",
    "push": "upload a bundle with a model card to the Hugging Face hub",
    "build": "build TensorRT engines from the graphs of a bundle",
    "explain": "show which patches each query looks at, how alike the queries are, and the gates of Flamingo",
    "certify": "compare a bundle on this machine with the reference outputs in it",
    "plan": "compute whether a model fits a board, how fast it is, and which bridge suits it",
    "bench": "measure the speed and memory of a bundle on this machine",
    "doctor": "check which backends run on this machine",
    "completion": "print a script that completes commands, flags and values in bash, zsh or fish",
    "demo": "export, calibrate and caption with the example checkpoint",
    "train": "train the bridge between a frozen vision encoder and a frozen language model",
    "eval": "compute the metrics of a checkpoint or a bundle on a data set",
    "capfilt": "clean a data set (CapFilt): generate captions, and keep those that match their picture",
}


class HelpFormatter(argparse.HelpFormatter):
    """Ends the help of an option with its default: ``(default: 16)``."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        plain = default is None or isinstance(default, bool) or default in ([], argparse.SUPPRESS)
        if plain or not action.option_strings:
            return text
        values = default if isinstance(default, list) else [default]
        return f"{text} (default: {' '.join(f'{v:g}' if isinstance(v, float) else str(v) for v in values)})"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors look like all other errors: one line `error: …`, exit status 2.

    The error of an unknown flag or value also names the most similar known one.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)
        self._or_by_flag: list[tuple[argparse.Action, argparse.Action]] = []

    def add_positional_or_flag(self, name: str, *flags: str, **options: Any) -> None:
        """Adds an argument that is given either by its position or by a flag.

        Args:
            name: Name of the argument's attribute in the parsed result.
            *flags: The flags, such as ``-b`` and ``--bundle``.
            **options: Options of `add_argument` for both.
        """
        positional = self.add_argument(name, **options)
        help_text = f"the same as {options['metavar']}"
        by_flag = self.add_argument(*flags, **{**options, "help": help_text}, dest=name, default=argparse.SUPPRESS)
        self._or_by_flag.append((positional, by_flag))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Refuse unknown arguments here: the error then names the command's own --help."""
        words = sys.argv[1:] if args is None else list(args)
        self._check_flags(words)
        given = ""
        for positional, by_flag in self._or_by_flag:
            if positional in self._actions and any(_gives(word, by_flag.option_strings) for word in words):
                self._remove_action(positional)
                given = f"; {positional.metavar} is given by {by_flag.option_strings[0]}"
        known, unknown = super().parse_known_args(words, namespace)
        if unknown:
            more = f" … ({len(unknown):,} in all)" if len(unknown) > SHOWN else ""
            self.error(f"unrecognized arguments: {' '.join(unknown[:SHOWN])}{more}{given or _pattern_hint(unknown)}")
        return known, unknown

    def _check_flags(self, words: list[str]) -> None:
        """Refuses an unknown flag first; otherwise argparse reports a missing required flag instead."""
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                return  # what follows is no flag, or belongs to the command
            name = word.partition("=")[0]
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"unrecognized argument: {name}{did_you_mean(name, self._option_string_actions)}")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Refuses an empty text for a path, an address or a name.

        A script passes an empty text if one of its variables is not set. Other code would take the empty text for the
        current directory, for all addresses, or for a flag that is not given. A flag whose text may be empty has the
        type ``flag_types.any_text``.
        """
        if not arg_string and action.type in (None, Path) and action.choices is None:
            problem = f"expected {action.metavar}, got an empty text (a variable that is not set?)"
            raise argparse.ArgumentError(action, problem)
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            choices = list(action.choices)
            text = f"invalid choice: {value!r} (choose from {', '.join(map(str, choices))})"
            raise argparse.ArgumentError(action, text + did_you_mean(str(value), map(str, choices)))

    def error(self, message: str) -> NoReturn:
        """Refuse the command line with exit status 2."""
        for positional, by_flag in self._or_by_flag:
            required = f"required: {positional.metavar}"
            message = message.replace(required, f"{required} (or {by_flag.option_strings[0]} {positional.metavar})")
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def _gives(word: str, flags: Sequence[str]) -> bool:
    """Whether a word is one of the flags, also with its value attached: ``-b``, ``-bDIR``, ``--bundle=DIR``."""
    return any(word == flag or word.startswith(f"{flag}=" if flag.startswith("--") else flag) for flag in flags)


def _pattern_hint(words: Sequence[str]) -> str:
    """Returns advice for the case that the shell replaced a glob pattern by file names.

    The advice is empty if one of the words is not an existing file: then the shell did not insert the words.
    """
    if not all(map(os.path.exists, words)):
        return ""
    return "; if the shell replaced a pattern by these names, give the folder, or the pattern in quotes"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns ``; did you mean …?`` with the most similar known word; empty if no word is similar."""
    similar = get_close_matches(word, known, n=1)
    return f"; did you mean {similar[0]}?" if similar else ""


def build_parser(words: Sequence[str] | None = None) -> Parser:
    """Builds the parser of all commands. Every parsed result has `run`, the command's function.

    Args:
        words: What will be parsed. Commands that are not among these words get no flags, and their modules are not
            imported. None: all commands get their flags.
    """
    parser = Parser(
        prog="blip2edge",
        description="From a trained BLIP-2-style captioner to captions on an edge device.",
        epilog="exit status: 0 done, 1 an error (one line on standard error), 2 wrong usage",
    )
    parser.add_argument("--version", action="version", version=f"blip2edge {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", dest="command", required=True, parser_class=Parser
    )
    for name, summary in COMMANDS.items():
        one = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
        one.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        if words is None or name in words:
            module = import_module(f"blip2edge.cli.{name}")
            module.add_arguments(one)
            one.set_defaults(run=module.run)
    return parser
