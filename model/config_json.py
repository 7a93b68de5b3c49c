"""Reads and writes the sections of a ``config.json``.

A config class lists its keys as :class:`Key` rows. One table serves both directions: :meth:`Fields.read` and
:func:`write_keys`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from blip2edge.errors import CheckpointError
from blip2edge.model.layers import ACTIVATIONS


@dataclass(frozen=True)
class Key:
    """A key of a section, and the field of our config class that it fills.

    Attributes:
        field: Name of the field.
        name: Name of the key in ``config.json``.
        kind: Method of :class:`Fields` that checks the value.
        default: Value where the key is missing or null; None if the key is required.
    """

    field: str
    name: str
    kind: Literal["integer", "number", "flag", "activation"]
    default: Any = None


def transformer_keys(hidden: int, intermediate: int, layers: int, heads: int) -> tuple[Key, ...]:
    """The four sizes of a transformer under transformers' usual names, with their defaults."""
    return (
        Key("hidden_size", "hidden_size", "integer", hidden),
        Key("intermediate_size", "intermediate_size", "integer", intermediate),
        Key("num_layers", "num_hidden_layers", "integer", layers),
        Key("num_heads", "num_attention_heads", "integer", heads),
    )


def write_keys(config: Any, keys: Iterable[Key]) -> dict[str, Any]:
    """The inverse of :meth:`Fields.read`: the fields of ``config`` under their names in ``config.json``."""
    return {key.name: getattr(config, key.field) for key in keys}


class Fields:
    """A section of ``config.json``. Errors name the section and the key.

    Args:
        section: Name of the section, for errors.
        values: Its content.

    Raises:
        CheckpointError: ``values`` is not an object.
    """

    def __init__(self, section: str, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise CheckpointError(
                f"config.json: {section} must be an object, not {type(values).__name__}",
                "save the checkpoint again with transformers' save_pretrained",
            )
        self.section = section
        self.values: Mapping[str, Any] = values

    def read(self, keys: Iterable[Key], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Reads several keys.

        Args:
            keys: What to read.
            defaults: Replaces the keys' own defaults, by the key's name in ``config.json``.

        Returns:
            The checked values by field name, as arguments of a config class.

        Raises:
            CheckpointError: A required key is missing, or a value has a wrong type.
        """
        defaults = defaults or {}
        return {key.field: getattr(self, key.kind)(key.name, defaults.get(key.name, key.default)) for key in keys}

    def integer(self, key: str, default: int | None) -> int:
        """A positive integer. A pair of equal integers counts as one."""
        value = self._get(key, default)
        if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {self.section}.{key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float | None) -> float:
        """A finite number."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise CheckpointError(f"config.json: {self.section}.{key} must be a finite number, not {value!r}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {self.section}.{key} must be true or false, not {value!r}")
        return value

    def activation(self, key: str, default: str) -> str:
        """The name of an activation, a key of :data:`ACTIVATIONS`."""
        value = self._get(key, default)
        if value not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json: {self.section}.{key} is {value!r}, which is not one of {', '.join(sorted(ACTIVATIONS))}"
            )
        return str(value)

    def token_id(self, key: str, default: int | None) -> int | None:
        """A token id, or None. Some configs write a negative number for none."""
        ids = self.token_ids(key, default)
        if len(ids) > 1:
            raise CheckpointError(f"config.json: {self.section}.{key} must be one token id, not {len(ids)}")
        return ids[0] if ids else None

    def token_ids(self, key: str, default: int | None) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self.values.get(key, default)
        ids = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise CheckpointError(f"config.json: {self.section}.{key} must be a token id, not {value!r}")
        return tuple(token for token in ids if token >= 0)

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key, default)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"config.json: {self.section} has no {key}")
        return value


def check_heads(section: str, width: int, heads: int) -> None:
    """Raises CheckpointError unless ``heads`` divides ``width``."""
    if width % heads:
        raise CheckpointError(f"config.json: {section}: the number of heads {heads} does not divide the width {width}")
