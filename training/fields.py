"""Reads sections of a configuration file into frozen dataclasses, and checks every key and value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from blip2edge.errors import ConfigError

Section = TypeVar("Section")


def key_name(section: str, key: str) -> str:
    """Name of a key in messages; an empty section is the top of the file."""
    return f"[{section}] {key}" if section else key


def positive(section: str, values: Mapping[str, float]) -> None:
    """Raises ConfigError unless all values exceed 0."""
    for key, value in values.items():
        if value <= 0:
            raise ConfigError(f"{key_name(section, key)} must be greater than 0, not {value}")


def at_least_zero(section: str, values: Mapping[str, float]) -> None:
    """Raises ConfigError if a value is below 0."""
    for key, value in values.items():
        if value < 0:
            raise ConfigError(f"{key_name(section, key)} must be at least 0, not {value}")


def unit_interval(section: str, values: Mapping[str, float]) -> None:
    """Raises ConfigError unless all values lie between 0 and 1."""
    for key, value in values.items():
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{key_name(section, key)} must lie between 0 and 1, not {value}")


def one_of(section: str, key: str, value: str, choices: Sequence[str]) -> None:
    """Raises ConfigError unless the value is one of the choices; names the nearest."""
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else None
    raise ConfigError(f"{key_name(section, key)} must be one of {', '.join(choices)}, not {value!r}", hint)


def _value(path: str, kind: Any, value: Any) -> Any:
    """Checks one value and converts it to the type of its field."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a table [{path}], not {value!r}")
        return read_section(path, kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{path} must be a list of strings, not {value!r}")
        return tuple(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{path} must be {names[kind]}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, not {value}")
    return value


def read_section(path: str, kind: type[Section], table: Mapping[str, Any]) -> Section:
    """Reads a table of the file into a dataclass.

    Args:
        path: Name of the table in messages; empty at the top.
        kind: A dataclass whose fields are int, float, str, bool, tuples of str or such dataclasses.
        table: The parsed table.

    Returns:
        An instance; keys that the table does not have get the defaults of the dataclass.

    Raises:
        ConfigError: An unknown key (the error suggests the nearest one), or a value of the wrong type or range.
    """
    types = typing.get_type_hints(kind)
    known = [each.name for each in dataclasses.fields(kind)]  # type: ignore[arg-type]  # there is no type variable for dataclasses
    values = {}
    for key, value in table.items():
        where = f"{path}.{key}" if path else key
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys here are {', '.join(known)}"
            raise ConfigError(f"unknown key {where!r}", hint)
        values[key] = _value(where, types[key], value)
    return kind(**values)
