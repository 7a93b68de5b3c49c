"""Reads sections of a configuration file into frozen dataclasses, and checks every key and value."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import sys
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from blip2edge.errors import ConfigError

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class ValidValues:
    """The valid values of a recipe's key, as metadata of its field: ``steps: Annotated[int, POSITIVE]``.

    Attributes:
        holds: Function that returns whether a value is valid.
        expected: What a valid value must be, for the error.
        choices: All valid values, if they are names; the error suggests the nearest.
    """

    holds: Callable[[Any], bool]
    expected: str
    choices: tuple[str, ...] = ()

    def check(self, key: str, value: Any) -> None:
        """Raises ConfigError unless ``value`` is valid; ``key`` is for the message."""
        if not self.holds(value):
            near = difflib.get_close_matches(str(value), self.choices, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else None
            raise ConfigError(f"{key} must {self.expected}, not {value!r}", hint)


def at_least(least: int) -> ValidValues:
    """Returns the rule that a number must be at least `least`."""
    return ValidValues(lambda value: bool(value >= least), f"be at least {least}")


def up_to(most: int) -> ValidValues:
    """Returns the rule that a number must be at most `most`."""
    return ValidValues(lambda value: bool(value <= most), f"be at most {most}")


def one_of(*choices: str) -> ValidValues:
    """Returns the rule that a text must be one of `choices`."""
    shown = ", ".join(choice or '""' for choice in choices)
    return ValidValues(lambda value: value in choices, f"be one of {shown}", choices)


_TABLE_OF_SEVERAL = re.compile(r"(\w+)\[(\d+)\]")
_WRITTEN = "_written"  # attribute of a section with the keys that the recipe has

NOT_NEGATIVE = at_least(0)
POSITIVE = ValidValues(lambda value: bool(value > 0), "be greater than 0")
EXACT = 1 << 53
"""Largest whole number that JSON and a float hold exactly; the limit of keys that have no smaller limit."""
SIZES = up_to(1 << 20)
"""Upper limit of widths, positions, tokens and rows. With larger values torch cannot compute the shapes of tensors, and
so the memory cannot be predicted."""
OBJECTS = up_to(1 << 10)
"""Upper limit of layers, heads, threads and other counts of objects that are made one by one."""
SHARE = ValidValues(lambda value: bool(0 <= value <= 1), "lie between 0 and 1")


class RecipeSection:
    """Base of the dataclasses of a recipe: checks each field by the :class:`ValidValues` in its type.

    Raises:
        ConfigError: A value is not valid.
    """

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            for rule in getattr(kind, "__metadata__", ()):
                rule.check(f"[{self.section}] {name}" if self.section else name, getattr(self, name))

    @property
    def written(self) -> tuple[str, ...]:
        """Returns the keys that the recipe has in this section, also those with the value of their default.

        For a section that was made without a recipe file, these are the keys whose values differ from the defaults.
        """
        given = getattr(self, _WRITTEN, None)
        if given is None:
            default = type(self)()
            given = [key for key in self.key_names() if getattr(self, key) != getattr(default, key)]
        return tuple(given)

    @classmethod
    def key_names(cls) -> tuple[str, ...]:
        """Returns all keys of the section, in the order of its fields."""
        return tuple(each.name for each in dataclasses.fields(cls))  # type: ignore[arg-type]  # subclasses are dataclasses

    @property
    def section(self) -> str:
        """Returns the section's name in the recipe, made from the class name; empty for the top of the file."""
        return type(self).__name__.removesuffix("Phase").removesuffix("Config").lower()


def _value(path: str, kind: Any, value: Any) -> Any:
    """Checks one value and converts it to the type of its field."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, list) and hasattr(kind, "of_tables"):
            return kind.of_tables([_value(f"{path}[{number}]", kind, each) for number, each in enumerate(value)])
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a table [{path}], not {value!r}")
        return read_section(path, kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= sys.float_info.max else math.inf
    if typing.get_origin(kind) is tuple:
        (item_kind, *_) = typing.get_args(kind)
        if dataclasses.is_dataclass(item_kind):
            raise ConfigError(f"unknown key {path!r}", f"write [[{path.rpartition('.')[0]}]] for each data set")
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise ConfigError(f"{path} must be a list of strings, not {value!r}")
        for item in value:
            _check_characters(path, item)
        return tuple(value)
    if type(value) is not kind:
        names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
        raise ConfigError(f"{path} must be {names[kind]}, not {value!r}")
    if type(value) is int and abs(value) > EXACT:
        raise ConfigError(f"{path} must be a whole number of at most {EXACT}, not {value}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} must be a finite number, not {value}")
    _check_characters(path, value)
    return value


def _check_characters(path: str, value: object) -> None:
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{path} contains a NUL character: {value!r}", "remove it: no file name contains one")


def table_title(path: str) -> str:
    """Returns the title of a table in messages: ``[model.vision]``; ``[[data]] set 2`` for the path ``data[1]``."""
    found = _TABLE_OF_SEVERAL.fullmatch(path)
    return f"[[{found[1]}]] set {int(found[2]) + 1}" if found else f"[{path}]"


def read_section(path: str, kind: type[Kind], table: Mapping[str, Any]) -> Kind:
    """Reads a table of the recipe file into a dataclass.

    Args:
        path: Name of the table in messages; empty at the top.
        kind: A dataclass whose fields are int, float, str, bool, tuples of str or such dataclasses.
        table: The parsed table.

    Returns:
        An instance; keys that the table does not have get the defaults of the dataclass.

    Raises:
        ConfigError: A key is unknown (the error suggests the nearest one), or a value has the wrong type or range.
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
    try:
        made = kind(**values)
    except ConfigError as error:
        if not path:
            raise
        # `[model]` and `[data]` are the sections of the class; the table of the recipe may be one of several
        raise error.with_problem(lambda problem: re.sub(r"^\[+\w+\]+ ", f"{table_title(path)} ", problem)) from error
    object.__setattr__(made, _WRITTEN, tuple(key for key in known if key in values))  # frozen, like its fields
    return made
