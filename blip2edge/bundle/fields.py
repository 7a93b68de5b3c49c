"""Checks the values of a parsed JSON file against a description of its fields.

A description is built with the functions below, such as ``record({"size": whole(0, 10)})``. Each function returns a
check: a function that raises ``ValueError`` with the key, the value and what was expected. Keys that a description does
not name are allowed by default, so that an older version of blip2edge reads the files of a newer version.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Check = Callable[[Any, str], None]
"""Checks a value; the second argument is the place of the value in the file, such as ``prompt.frames``.

Raises ValueError if the value is not valid.
"""

MAX_BYTES = 1 << 50  # of a file
MAX_NAME = 255  # bytes of a file's name on Linux
MAX_TEXT = 1 << 20  # characters
MAX_ITEMS = 100_000  # of a list or an object

_NOTHING: Mapping[str, Check] = {}


def check_that(holds: Callable[[Any], bool], expected: str) -> Check:
    """Makes a check from the function ``holds``, which returns whether a value is valid.

    The error text says that ``expected`` was expected.
    """

    def check(value: Any, where: str) -> None:
        if not holds(value):
            raise ValueError(f"{where or 'the file'}: expected {expected}, got {_shown(value)}")

    return check


def _shown(value: Any) -> str:
    """Formats a value for a message, cut to 60 characters."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = "null" if value is None else repr(value[:61] if isinstance(value, str) else value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def whole(least: int, most: int) -> Check:
    """Returns a check for a whole number from ``least`` to ``most``; true and false do not pass."""
    return check_that(
        lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"
    )


def finite_number(least: float = -math.inf, most: float = math.inf) -> Check:
    """Returns a check for a finite number from ``least`` to ``most``."""
    span = "" if math.isinf(least) and math.isinf(most) else f" from {least:g} to {most:g}"
    return check_that(
        lambda value: type(value) in (int, float) and abs(value) < 2.0**1023 and least <= value <= most,
        f"a finite number{span}",
    )


flag: Check = check_that(lambda value: isinstance(value, bool), "true or false")

text: Check = check_that(
    lambda value: isinstance(value, str) and len(value) <= MAX_TEXT and "\0" not in value,
    f"a text of at most {MAX_TEXT} characters without NUL",
)


def is_file_name(value: Any) -> bool:
    """Whether a value is a plain file name: not a path, and allowed on every system."""
    return (
        isinstance(value, str)
        and value.isprintable()
        and 0 < len(value.encode("utf-8", "surrogatepass")) <= MAX_NAME
        and not set(value) & set("/\\")
        and value not in (".", "..")
    )


file_name: Check = check_that(is_file_name, "the name of a file, without a folder")


def full_match(pattern: str, expected: str) -> Check:
    """Returns a check for a text that matches a regular expression as a whole."""
    compiled = re.compile(pattern)
    return check_that(lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None, expected)


def one_of_texts(*choices: str) -> Check:
    """Returns a check for a text that is one of the given texts."""
    return check_that(lambda value: isinstance(value, str) and value in choices, f"one of {', '.join(choices)}")


sha256: Check = full_match("[0-9a-f]{64}", "a SHA-256, 64 hexadecimal digits")


def nullable(check: Check) -> Check:
    """Returns a check that also accepts null."""
    return lambda value, where: None if value is None else check(value, where)


def list_of(item: Check, least: int = 0, most: int = MAX_ITEMS) -> Check:
    """Returns a check for a list of ``least`` to ``most`` items that each pass ``item``."""
    whole_list = check_that(
        lambda value: isinstance(value, (list, tuple)) and least <= len(value) <= most,
        f"a list of {least} to {most} items",
    )

    def check(value: Any, where: str) -> None:
        whole_list(value, where)
        for index, one in enumerate(value):
            item(one, f"{where}[{index}]")

    return check


_object = check_that(
    lambda value: isinstance(value, Mapping) and len(value) <= MAX_ITEMS, f"an object of at most {MAX_ITEMS} keys"
)


def mapped(key: Check, value: Check) -> Check:
    """Returns a check for an object whose keys pass ``key`` and whose values pass ``value``."""

    def check(given: Any, where: str) -> None:
        _object(given, where)
        for name, each in given.items():
            key(name, f"a key of {where}")
            value(each, f"{where}.{name}")

    return check


def record(
    required: Mapping[str, Check],
    optional: Mapping[str, Check] = _NOTHING,
    *,
    closed: bool = False,
    rules: Sequence[Check] = (),
) -> Check:
    """Returns a check for an object with known keys.

    Args:
        required: A check for each key that must be there.
        optional: A check for each key that may be there.
        closed: Whether other keys are refused.
        rules: Checks of the whole object, which run after the checks of its keys.
    """

    def check(value: Any, where: str) -> None:
        _object(value, where)
        prefix = f"{where}." if where else ""
        for key in required:
            if key not in value:
                raise ValueError(f"{prefix}{key} is missing")
        for key, each in value.items():
            known = required.get(key) or optional.get(key)
            if known is not None:
                known(each, prefix + key)
            elif closed:
                raise ValueError(f"{prefix}{_shown(key)} is no known key")
        for rule in rules:
            rule(value, where)

    return check


def either(key: str, with_key: Check, without: Check) -> Check:
    """Returns a check that calls ``with_key`` for an object with the key ``key``, else ``without``."""
    return lambda value, where: (with_key if isinstance(value, Mapping) and key in value else without)(value, where)


FILE_RECORD = record({"sha256": sha256, "size": whole(0, MAX_BYTES)}, closed=True)
"""Size and hash of a file, as a manifest lists them."""

anything: Check = lambda value, where: None  # noqa: E731 - a check like the others
any_object: Check = _object
