"""The flags that all commands share which run a bundle, and those that generate with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flags import (
    BACKENDS,
    non_negative_int,
    non_negative_number,
    number,
    positive_int,
    positive_number,
    share,
)
from blip2edge.contract import DRAFTS

if TYPE_CHECKING:
    from blip2edge.cli.flags import Parser


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
    group = parser.add_argument_group("generation", "what is not given is as the bundle says")
    group.add_argument("--max-new-tokens", metavar="N", type=positive_int, help="stop after N tokens")
    group.add_argument("--min-new-tokens", metavar="N", type=non_negative_int, help="no end before N tokens")
    group.add_argument("--num-beams", metavar="K", type=positive_int, help="beam search with K beams")
    group.add_argument("--length-penalty", metavar="X", type=number, help="exponent of the length, for beams")
    group.add_argument("--repetition-penalty", metavar="X", type=positive_number, help="above 1: repeat less")
    group.add_argument(
        "--temperature", metavar="T", type=non_negative_number, help="draw tokens; 0 is greedy"
    )
    group.add_argument("--top-p", metavar="P", type=share, help="draw from the likeliest tokens, P together")
    group.add_argument(
        "--top-k", metavar="K", type=non_negative_int, help="draw from the K likeliest; 0: all"
    )
    group.add_argument("--seed", metavar="S", type=non_negative_int, help="of the random numbers")
    group.add_argument(
        "--draft", choices=DRAFTS, default="auto", help="who guesses tokens that one pass verifies; same text"
    )
