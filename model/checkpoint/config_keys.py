"""Finds the keys of a ``config.json`` that would change the captions and that this project does not read.

:class:`RecordedObject` records the keys that this project reads. Then transformers makes two config objects: one from
all keys, and one from only the recorded keys. A key that makes no difference between the two objects has no effect. A
key that transformers does not read either is named in a warning. Any other key is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from blip2edge.errors import CheckpointError, one_line
from blip2edge.model.checkpoint.side_keys import CONFIG, refused, unread_warning
from blip2edge.model.checkpoint.stored.files import read_checkpoint_json
from blip2edge.model.families.registry import read_config

TRANSFORMERS_TYPES = {"minigpt4": "blip-2"}
"""For a ``model_type`` that transformers does not support: a supported ``model_type`` with the same config keys."""


class RecordedObject(Mapping[str, Any]):
    """A JSON object that records which of its keys were read; the objects inside it are recorded in the same way.

    Args:
        values: The object.

    Attributes:
        keys_read: The keys that were read.
        sections: The objects inside this object that were read, by key.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.content = values
        self.keys_read: set[str] = set()
        self.sections: dict[str, RecordedObject] = {}

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        value = self.content[key]
        if isinstance(value, Mapping):
            return self.sections.setdefault(key, RecordedObject(value))
        return value

    def read_part(self) -> dict[str, Any]:
        """Returns only the keys that were read, and ``model_type``, because it selects transformers' config class."""
        kept = {key: value for key, value in self.content.items() if key in self.keys_read or key == "model_type"}
        return kept | {name: section.read_part() for name, section in self.sections.items()}

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


def check_config(directory: Path) -> list[str]:
    """Checks those keys of a directory's ``config.json`` that this project does not read (:func:`check_values`)."""
    path = directory / "config.json"
    return check_values(str(path), read_checkpoint_json(path))


def check_values(source: str, values: Mapping[str, Any]) -> list[str]:
    """Checks those keys of a config that are not read by this project.

    Args:
        source: Path or name of the config, for messages.
        values: Its content.

    Returns:
        Warnings: one for each section that has keys which transformers does not read either.

    Raises:
        CheckpointError: A key has a value that changes captions and is not supported.
    """
    from transformers import CONFIG_MAPPING

    recorded = RecordedObject(values)
    read_config(recorded)
    model_type = TRANSFORMERS_TYPES.get(values["model_type"], values["model_type"])
    if model_type not in CONFIG_MAPPING:
        return _unread_keys(source, recorded)
    try:
        config_class: Any = CONFIG_MAPPING[model_type]
        whole, without = (
            config_class.from_dict({**deepcopy(part), "model_type": model_type})
            for part in (values, recorded.read_part())
        )
    except Exception as error:  # each config class raises its own
        raise CheckpointError(
            f"transformers cannot read {source} ({one_line(error)})", "correct the value, or download the file again"
        ) from error
    return _check_section(source, recorded, whole, without)


def _unread_keys(where: str, section: RecordedObject) -> list[str]:
    """Returns warnings for a ``model_type`` that transformers does not have: they name all keys that were not read."""
    unread = [
        key
        for key, value in section.content.items()
        if key not in section.keys_read and value is not None and CONFIG.effect(key) != "neutral"
    ]
    warnings = unread_warning(where, unread)
    for name, part in section.sections.items():
        warnings += _unread_keys(f"{where}, {name}", part)
    return warnings


def _check_section(where: str, section: RecordedObject, whole: Any, without: Any) -> list[str]:
    """Checks the keys of a section, and of the sections inside it, that this project did not read; returns warnings.

    Args:
        where: Name of the section, for messages.
        section: The section, with its record of the keys that were read.
        whole: transformers' config object, made from all keys of the section.
        without: transformers' config object, made from only the keys that were read.
    """
    unread = []
    for key, value in section.content.items():
        if key in section.keys_read or value is None or CONFIG.effect(key) == "neutral":
            continue
        if hasattr(getattr(whole, key, None), "to_dict"):
            continue  # a section that the model does not use, as perceiver_config without a resampler
        if not hasattr(without, key):
            unread.append(key)
        elif getattr(without, key) != getattr(whole, key):
            raise refused(where, key, value)
    warnings = unread_warning(where, unread)
    for name, part in section.sections.items():
        inner = getattr(whole, name, None)
        if hasattr(inner, "to_dict"):
            warnings += _check_section(f"{where}, {name}", part, inner, getattr(without, name))
    return warnings
