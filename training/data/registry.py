"""Opens the data that a recipe's section `[data]` describes; the key `kind` selects the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from blip2edge.errors import UsageError
from blip2edge.training.data.coco import read_captions, read_vqa
from blip2edge.training.data.config import DataConfig
from blip2edge.training.data.entries import BrokenSamples, Entry
from blip2edge.training.data.folder import read_folder
from blip2edge.training.data.list_source import ListSource
from blip2edge.training.data.scene_source import SceneSource
from blip2edge.training.data.shard_source import ShardSource
from blip2edge.training.data.shards import read_shards, shard_paths
from blip2edge.training.data.sources import SampleSource


def _path(base: Path, text: str) -> Path | None:
    """A path of the configuration; None if it is empty."""
    return base / text if text else None


def _captions(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    return read_captions(base / config.path, _path(base, config.images), config.max_broken)


def _vqa(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    annotations, images = _path(base, config.annotations), _path(base, config.images)
    return read_vqa(base / config.path, annotations, images, config.max_broken)


def _folder(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    return read_folder(base / config.path, config.max_broken)


def _shards(config: DataConfig, base: Path) -> tuple[Iterable[Entry], BrokenSamples]:
    broken = BrokenSamples(config.path, config.max_broken)
    return read_shards(shard_paths(base / config.path), broken), broken


LIST_READERS: dict[str, Callable[[DataConfig, Path], tuple[list[Entry], BrokenSamples]]] = {
    "coco-captions": _captions,
    "coco-vqa": _vqa,
    "folder": _folder,
}
"""Reads all entries of a kind; paths are relative to the given directory."""


def _listed(config: DataConfig, seed: int, base: Path) -> SampleSource:
    entries, broken = LIST_READERS[config.kind](config, base)
    return ListSource(entries, broken, config.path, config, seed)


SOURCE_MAKERS: dict[str, Callable[[DataConfig, int, Path], SampleSource]] = {
    "scenes": lambda config, seed, base: SceneSource(config, seed),
    "shards": lambda config, seed, base: ShardSource(shard_paths(base / config.path), config, seed),
    **dict.fromkeys(LIST_READERS, _listed),
}
"""Makes a source from its configuration, the seed of its order, and the directory that paths are relative to."""


def open_sample_source(config: DataConfig, *, seed: int, base: Path) -> SampleSource:
    """Opens the training data that a recipe describes, as a source of samples.

    Args:
        config: The section [data] of the recipe.
        seed: Seed of the order; each phase of a recipe has its own.
        base: Directory of the recipe; relative paths start there.

    Returns:
        The source, at its first sample.

    Raises:
        DataError: A file is missing or cannot be parsed.
    """
    return SOURCE_MAKERS[config.kind](config, seed, base)


def read_entries(config: DataConfig, *, base: Path) -> tuple[Iterable[Entry], BrokenSamples]:
    """Reads all entries once, in the order of the files, for evaluation or filtering.

    Args:
        config: The section [data] of the recipe; any kind except "scenes".
        base: Directory that relative paths start from.

    Returns:
        The entries and the broken samples. Shards are read during the iteration, so their broken samples are complete
        at its end.

    Raises:
        DataError: A file is missing or cannot be parsed.
        UsageError: The kind is "scenes", which have no end.
    """
    if config.kind == "scenes":
        raise UsageError("expected data from files, got the generated scenes", "give a file or folder")
    return (_shards if config.kind == "shards" else LIST_READERS[config.kind])(config, base)
