"""Reads and writes the sections of a ``config.json``.

A config class is a subclass of :class:`Section`. Each field that is declared with :func:`key` is one key of the
section. :class:`Fields` reads and checks the values.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from blip2edge.errors import CheckpointError
from blip2edge.model.layers import ACTIVATIONS

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_LAYERS = 1000
MAX_INTEGER = 2**31 - 1
MAX_NUMBER = 1e300  # NaN, and integers that are no float, are above it


def layered(*layers: Mapping[str, Any]) -> Mapping[str, Any]:
    """Combines several JSON objects into one: a key has the value of the first object that has the key.

    The objects are not copied. So if an object records which of its keys are read (``checkpoint/config_keys.py``), it
    also records the keys that are read through the combined object.
    """
    return ChainMap(*layers)  # type: ignore[arg-type]  # only read


def _place(section: str) -> str:
    """Returns the name of a section for errors, such as ``config.json: text_config``.

    If ``section`` is the name of a file (the section is the whole file), it is returned as it is.
    """
    return section if section.endswith(".json") else f"config.json: {section}"


class Fields:
    """Reads typed values from a JSON object; wrong values raise CheckpointError with file, section and key.

    Args:
        section: Name of the section, or of the file, for errors.
        values: Content of the section.

    Raises:
        CheckpointError: ``values`` is not an object.
    """

    def __init__(self, section: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"{_place(section)} must be an object, not {type(values).__name__}",
                "save the checkpoint again with transformers' save_pretrained",
            )
        self.section = section
        self.values: Mapping[str, Any] = values

    def integer(self, key: str, default: int | None) -> int:
        """Reads a positive integer. A pair of equal integers is accepted as one integer."""
        value = self._get(key, default)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        most = MAX_LAYERS if "layers" in key else MAX_INTEGER
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise CheckpointError(f"{self._where(key)} must be a positive integer up to {most}, not {value!r:.60}")
        return value

    def count(self, key: str) -> int:
        """Reads an integer of at least 0; 0 for a missing key or null."""
        value = self._get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INTEGER:
            raise CheckpointError(f"{self._where(key)} must be an integer from 0 to {MAX_INTEGER}, not {value!r:.60}")
        return value

    def number(self, key: str, default: float | None) -> float:
        """Reads a finite number. The value of a dropout must be a probability."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_NUMBER:
            raise CheckpointError(f"{self._where(key)} must be a finite number, not {value!r}")
        if "dropout" in key and not 0 <= value <= 1:
            raise CheckpointError(f"{self._where(key)} must be from 0 to 1, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Reads a value that is true or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self._where(key)} must be true or false, not {value!r}")
        return value

    def activation(self, key: str, default: str) -> str:
        """Reads the name of an activation, a key of :data:`ACTIVATIONS`."""
        value = self._get(key, default)
        if not isinstance(value, str) or value not in ACTIVATIONS:
            raise CheckpointError(
                f"{self._where(key)} is {value!r}, which is not one of {', '.join(sorted(ACTIVATIONS))}"
            )
        return str(value)

    def token_id(self, key: str, default: int | None) -> int | None:
        """Reads a token id, or None. In some configs, a negative number means None."""
        ids = self.token_ids(key, default)
        if len(ids) > 1:
            raise CheckpointError(f"{self._where(key)} must be one token id, not {len(ids)} ids")
        return ids[0] if ids else None

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """Reads one token id or a list of token ids."""
        value = self.values.get(key, default)
        ids = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise CheckpointError(f"{self._where(key)} must be a token id or a list of token ids, not {value!r}")
        return tuple(token for token in ids if token >= 0)

    def _where(self, key: str) -> str:
        return f"{_place(self.section)}{': ' if self.section.endswith('.json') else '.'}{key}"

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._where(key)} is missing")
        return value


_READERS: dict[type, Callable[[Fields, str, Any], Any]] = {
    int: Fields.integer,
    float: Fields.number,
    bool: Fields.flag,
    str: Fields.activation,
}
"""The method that reads and checks a value, by the type of the key's default."""


def key(name: str, default: Any) -> Any:
    """Declares a field of a :class:`Section` that is read from a key of ``config.json``.

    Args:
        name: Name of the key.
        default: Value if the key is missing or null, as in transformers. Its type decides which values are valid: a
            positive integer, a finite number, true or false, or the name of an activation.
    """
    return field(default=default, metadata={"key": name})


@dataclass(frozen=True)
class Section:
    """A config class that is read from and written to a section of ``config.json``.

    Attributes:
        section: Name of the section, for errors.
        model_type: Value of the key ``model_type`` that :meth:`to_hf` writes; empty for none.
    """

    section: ClassVar[str] = "text_config"
    model_type: ClassVar[str] = ""

    @classmethod
    def read(cls, values: Any, defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Reads and checks the keys of a section; returns the values by field name.

        Args:
            values: Content of the section.
            defaults: Other defaults for some keys, by the key's name in ``config.json``.

        Raises:
            CheckpointError: A value has a wrong type.
        """
        found, defaults = Fields(cls.section, values), defaults or {}
        return {
            each.name: _READERS[type(each.default)](found, name, defaults.get(name, each.default))
            for each in fields(cls)
            if (name := each.metadata.get("key"))
        }

    @classmethod
    def from_hf(cls, values: Any, **given: Any) -> Self:
        """Makes the config from a section of ``config.json``; ``given`` are values of fields that the section lacks.

        Raises:
            CheckpointError: A value has a wrong type, or the values do not fit together.
        """
        return cls(**cls.read(values) | given)

    def to_hf(self) -> dict[str, Any]:
        """Returns the section of ``config.json`` that :meth:`from_hf` reads."""
        keys = {each.metadata["key"]: getattr(self, each.name) for each in fields(self) if each.metadata}
        return ({"model_type": self.model_type} if self.model_type else {}) | keys


def check_patch_size(section: str, patch: int, image: int) -> None:
    """Raises CheckpointError if the side of a patch is longer than the side of the picture (pixels)."""
    if patch > image:
        raise CheckpointError(f"config.json: {section}: patch_size {patch} exceeds image_size {image}")


def check_heads(section: str, width: int, heads: int) -> None:
    """Raises CheckpointError unless ``heads`` divides ``width``."""
    if width % heads:
        raise CheckpointError(f"{_place(section)}: the number of heads {heads} does not divide the width {width}")
