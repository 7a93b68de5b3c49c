"""Types of flags: functions that convert the text of a flag to a value, or raise an error."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Literal

from blip2edge.choices import METRIC_OF_SCORE, METRICS, NOT_COMPUTED

MAX_PORT = 65_535
MAX_LATIN_1 = 255  # HTTP headers are encoded as Latin-1


def any_text(text: str) -> str:
    """Returns the text. The parser refuses an empty text of a flag without a type, but accepts it for this type."""
    return text


def metric(text: str) -> str:
    """Returns the name of a metric of `eval`; the name of a single score is refused with the metric that has it."""
    score = text.lower().replace("-", "_")
    meant = METRIC_OF_SCORE.get(score)
    if meant is None:
        return text
    missing = f"{text} is not computed, because it needs Java" if score in NOT_COMPUTED else f"{text} is no metric"
    raise argparse.ArgumentTypeError(f"{missing}; did you mean {meant}? (one of {', '.join(METRICS)})")


def number(text: str) -> float:
    """Reads a finite number."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a number, got {text!r}")
    return value


def _number(what: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    """Makes a function that reads a number from a flag.

    The number is refused if ``allowed`` is false for it; the error says that ``what`` was expected.
    """

    def parse(text: str) -> float:
        value = number(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text}")
        return value

    return parse


positive_number = _number("a number above 0", lambda value: value > 0)
non_negative_number = _number("a number of at least 0", lambda value: value >= 0)
share = _number("a number above 0 and at most 1", lambda value: 0 < value <= 1)
share_or_zero = _number("a number from 0 to 1", lambda value: 0 <= value <= 1)


def share_or_auto(text: str) -> float | Literal["auto"]:
    """Reads a number from 0 to 1, or ``auto``."""
    if text == "auto":
        return "auto"
    try:
        return share_or_zero(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"expected auto or a number from 0 to 1, got {text!r}") from error


def positive_int(text: str) -> int:
    """Reads a whole number of at least 1."""
    return _whole(text, 1)


def non_negative_int(text: str) -> int:
    """Reads a whole number of at least 0."""
    return _whole(text, 0)


def port(text: str) -> int:
    """Reads the number of a TCP port, from 0 to 65535."""
    value = _whole(text, 0)
    if value > MAX_PORT:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to {MAX_PORT}, got {text}")
    return value


def _whole(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
    return value


def http_header(text: str) -> tuple[str, str]:
    """Reads an HTTP header ``NAME: VALUE``; returns its name and its value."""
    name, colon, value = text.partition(":")
    if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or not value.strip().isprintable():
        raise argparse.ArgumentTypeError(f"expected NAME:VALUE, got {text!r}")
    if any(ord(character) > MAX_LATIN_1 for character in value):
        raise argparse.ArgumentTypeError(f"expected the value of {name} to have characters of Latin-1 only")
    return name, value.strip()
