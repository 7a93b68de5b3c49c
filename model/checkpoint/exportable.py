"""Checks whether `export` accepts a config or a checkpoint, with the same errors, before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from blip2edge.model.checkpoint.adapters.folder import has_adapter
from blip2edge.model.checkpoint.config_keys import check_values
from blip2edge.model.checkpoint.directory import Checkpoint
from blip2edge.model.families.registry import read_config
from blip2edge.reading import naming_config


def check_exportable(values: Any, source: str, directory: Path | None = None) -> None:
    """Checks a config with the code of `export`.

    Args:
        values: Content of the ``config.json``.
        source: Path or name of the config, for errors.
        directory: The checkpoint directory of the config; None for a config alone. If the directory has weights, the
            names and shapes of its tensors must fit the config too.

    Raises:
        UnsupportedModelError: The model is of a kind that is not exported.
        CheckpointError: A key has a wrong value or one that is not supported, or the tensors do not fit the config.
    """
    if directory is not None and _has_tensors(directory) and not has_adapter(directory):
        Checkpoint(directory).files.close()
    else:
        with naming_config(source):
            read_config(values)
    check_values(source, values)


def _has_tensors(directory: Path) -> bool:
    """Returns whether a directory has safetensors files and none of these is empty.

    An unfinished download can leave an empty file.
    """
    sizes = [path.stat().st_size for path in directory.glob("*.safetensors")]
    return bool(sizes) and all(sizes)
