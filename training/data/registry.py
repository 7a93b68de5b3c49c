"""The kinds of sources: one row a `[data] kind`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.scene_source import SceneSource
from blip2edge.training.data.sources import Source

SOURCES: dict[str, Callable[[DataConfig, int, Path], Source]] = {
    "scenes": lambda config, seed, base: SceneSource(config, seed),
}
"""What makes a source of its configuration, the seed of its order, and the directory that paths are relative to."""


def open_source(config: DataConfig, *, seed: int, base: Path) -> Source:
    """The source that a configuration describes.

    Args:
        config: The section [data].
        seed: Of the order; each phase of a recipe has its own.
        base: The configuration file's directory: relative paths start there.

    Returns:
        The source, at its first sample.

    Raises:
        DataError: Its files are missing or cannot be parsed.
    """
    return SOURCES[config.kind](config, seed, base)
