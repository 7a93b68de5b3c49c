"""The flags that all commands share which run a bundle, and those that generate with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.bundle.schema import DRAFTS
from blip2edge.cli.flags import (
    BACKENDS,
    non_negative_int,
    non_negative_number,
    number,
    positive_int,
    positive_number,
    share,
)

if TYPE_CHECKING:
    from argparse import Namespace
    from argparse import _ArgumentGroup as ArgumentGroup
    from collections.abc import Callable, Iterable

    from blip2edge.cli.flags import Parser

# Field of GenerationOptions -> the flag's placeholder, type and help.
GENERATION: dict[str, tuple[str, Callable[[str], float], str]] = {
    "max_new_tokens": ("N", positive_int, "stop after N tokens"),
    "min_new_tokens": ("N", non_negative_int, "no end before N tokens"),
    "num_beams": ("K", positive_int, "beam search with K beams"),
    "length_penalty": ("X", number, "exponent of the length, for beams"),
    "repetition_penalty": ("X", positive_number, "above 1: repeat less"),
    "temperature": ("T", non_negative_number, "draw tokens; 0 is greedy"),
    "top_p": ("P", share, "draw from the likeliest tokens, P together"),
    "top_k": ("K", non_negative_int, "draw from the K likeliest; 0: all"),
    "seed": ("S", non_negative_int, "of the random numbers"),
}


def add_bundle(parser: Parser) -> None:
    """Which bundle runs, and where."""
    parser.add_argument(
        "-b", "--bundle", metavar="BUNDLE", type=Path, required=True, help="what `export` wrote"
    )
    add_where(parser)


def add_where(parser: Parser) -> None:
    """The backend and its threads."""
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="where to run (auto)")
    parser.add_argument("--threads", metavar="N", type=positive_int, help="CPU threads (all cores)")


def add_generation(parser: Parser) -> None:
    """The flags of GenerationOptions; one that is not given leaves the bundle's own default."""
    group = add_some_generation(parser, "generation", "what is not given is as the bundle says", GENERATION)
    group.add_argument(
        "--draft", choices=DRAFTS, default="auto", help="who guesses tokens that one pass verifies; same text"
    )


def add_some_generation(parser: Parser, title: str, said: str, names: Iterable[str]) -> ArgumentGroup:
    """A group of those rows of :data:`GENERATION` that ``names`` names."""
    group = parser.add_argument_group(title, said)
    for name in names:
        metavar, kind, told = GENERATION[name]
        group.add_argument(f"--{name.replace('_', '-')}", metavar=metavar, type=kind, help=told)
    return group


def given_generation(options: Namespace) -> dict[str, Any]:
    """The generation flags that were given, under the names of GenerationOptions."""
    given = {name: getattr(options, name, None) for name in GENERATION}
    return {name: value for name, value in given.items() if value is not None}
