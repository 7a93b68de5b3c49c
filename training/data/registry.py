"""Opens the data that a recipe's section `[data]` describes; the key `kind` selects the reader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import ConfigError, UsageError
from blip2edge.picture_files import is_address
from blip2edge.training.data.coco import read_captions, read_vqa
from blip2edge.training.data.config import MIXTURE, DataConfig
from blip2edge.training.data.entries import BrokenSamples, Entry
from blip2edge.training.data.folder import read_folder
from blip2edge.training.data.list_source import ListSource
from blip2edge.training.data.readers.copies import LocalCopies, ReadFile, remote_files
from blip2edge.training.data.readers.rows import RowReader
from blip2edge.training.data.readers.tables import ROWS_BY_SUFFIX, Numbered, karpathy, parquet, parquet_rows, table_file
from blip2edge.training.data.scene_source import SceneSource
from blip2edge.training.data.shard_source import ShardSource
from blip2edge.training.data.shards import SHARD_SUFFIXES, read_shard, shard_names, shard_paths
from blip2edge.training.data.sources import SampleSource
from blip2edge.training.data.streams.mixture import MixtureSource, set_probabilities

_GIB = 1 << 30

Part = tuple[int, int]
"""The stream that is read, if the data is split into several: (number of the stream, from 0; number of all streams)."""
WHOLE: Part = (0, 1)


def _path(base: Path, text: str) -> Path | None:
    """Joins a path of a recipe to the directory `base`; returns None for an empty text."""
    return base / text if text else None


def _captions(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    return read_captions(base / config.path, _path(base, config.images), config.max_broken)


def _vqa(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    annotations, images = _path(base, config.annotations), _path(base, config.images)
    return read_vqa(base / config.path, annotations, images, config.max_broken)


def _folder(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    return read_folder(base / config.path, config.max_broken)


def _of_rows(config: DataConfig, base: Path, path: Path, rows: Numbered) -> tuple[list[Entry], BrokenSamples]:
    broken = BrokenSamples(str(path), config.max_broken)
    images = base / config.images if config.images else path.parent
    reader = RowReader(images, broken, config.image_column, config.text_column)
    return [entry for number, row in rows for entry in reader.entries(number, row)], broken


def _table(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    path = table_file(base / config.path)
    return _of_rows(config, base, path, ROWS_BY_SUFFIX[path.suffix.lower()](path))


def _karpathy(config: DataConfig, base: Path) -> tuple[list[Entry], BrokenSamples]:
    path = base / config.path
    return _of_rows(config, base, path, karpathy(path, config.splits))


LIST_READERS: dict[str, Callable[[DataConfig, Path], tuple[list[Entry], BrokenSamples]]] = {
    "coco-captions": _captions,
    "coco-vqa": _vqa,
    "karpathy": _karpathy,
    "table": _table,
    "folder": _folder,
}
"""By the kind of data: the function that reads all entries into memory.

Its arguments are the section `[data]`, and the directory that relative paths start from.
"""


@dataclass(frozen=True)
class ShardFormat:
    """A data format with many files, which are read one after the other.

    Attributes:
        suffixes: Endings of the files' names.
        reader: From the section `[data]` and the directory of the recipe, makes a function that reads one file.
        size: Counts the samples of a file; None if counting would mean reading the whole file.
    """

    suffixes: tuple[str, ...]
    reader: Callable[[DataConfig, Path], ReadFile]
    size: Callable[[Path], int] | None = None


def _parquet_reader(config: DataConfig, base: Path) -> ReadFile:
    def read(path: Path, broken: BrokenSamples, name: str) -> Iterator[Entry]:
        images = base / config.images if config.images else path.parent
        reader = RowReader(images, broken, config.image_column, config.text_column, f"{name}:")
        for number, row in parquet(path):
            yield from reader.entries(number, row)

    return read


SHARD_FORMATS = {
    "shards": ShardFormat(SHARD_SUFFIXES, lambda config, base: read_shard),
    "parquet": ShardFormat((".parquet",), _parquet_reader, parquet_rows),
}
"""The formats of data in many files, by the kind of data.

These files are read in blocks of samples, so that only one block is in memory.
"""


def _files(config: DataConfig, base: Path) -> list[Path | str]:
    """Returns the data files that a section `[data]` names: local paths, or addresses."""
    suffixes = SHARD_FORMATS[config.kind].suffixes
    if is_address(config.path):
        return [*remote_files(config.path, suffixes)]
    return [*shard_paths(base / config.path, suffixes)]


def _file_reader(config: DataConfig, base: Path) -> Callable[[Any, BrokenSamples, str], Iterator[Entry]]:
    """Returns a function that reads one file; the function first copies a packed file or one in an object store."""
    copies = LocalCopies(cache_directory() / "shards", config.copies_gib * _GIB)
    return copies.reader(SHARD_FORMATS[config.kind].reader(config, base))


def _sharded(config: DataConfig, seed: int, base: Path, part: Part) -> tuple[SampleSource, int | None]:
    every = _files(config, base)
    if len(every) < part[1]:
        raise ConfigError(
            f"[data] {config.path}: expected at least {part[1]} files for the {part[1]} data streams, got {len(every)}",
            "lower data_streams ([loop] in a recipe), or write smaller files",
        )
    files = every[part[0] :: part[1]]
    size = SHARD_FORMATS[config.kind].size
    local = [path for path in files if isinstance(path, Path)]
    known = sum(map(size, local)) if size is not None and len(local) == len(files) else None
    return ShardSource(files, config, seed, _file_reader(config, base)), known


def _listed(config: DataConfig, seed: int, base: Path, part: Part) -> tuple[SampleSource, int]:
    every, broken = LIST_READERS[config.kind](config, base)
    if 0 < len(every) < part[1]:
        raise ConfigError(
            f"[data] {config.path}: expected at least {part[1]} samples for the {part[1]} data streams, got"
            f" {len(every)}",
            "lower data_streams ([loop] in a recipe)",
        )
    entries = every[part[0] :: part[1]]
    return ListSource(entries, broken, config.path, config, seed), len(entries)


def _mixed(config: DataConfig, seed: int, base: Path, part: Part) -> tuple[SampleSource, int | None]:
    """Opens a mixture of data sets. The sets get different seeds, so two sets with the same files differ in order."""
    sets = config.sets
    opened = [SOURCE_MAKERS[each.kind](each, seed * len(sets) + number, base, part) for number, each in enumerate(sets)]
    probabilities = set_probabilities(config.sets, [size for _, size in opened])
    return MixtureSource([source for source, _ in opened], probabilities, seed * part[1] + part[0]), None


SOURCE_MAKERS: dict[str, Callable[[DataConfig, int, Path, Part], tuple[SampleSource, int | None]]] = {
    # a stream of scenes has a seed of its own, and with `count` shows all of them in an order of its own
    "scenes": lambda config, seed, base, part: (SceneSource(config, seed * part[1] + part[0]), config.count or None),
    MIXTURE: _mixed,
    **dict.fromkeys(SHARD_FORMATS, _sharded),
    **dict.fromkeys(LIST_READERS, _listed),
}
"""By the kind of data: the function that makes a source of samples.

The arguments of the function are the section `[data]`, the seed of the order, the directory that relative paths start
from, and which stream of the data is read (:data:`Part`). The function returns the source, and the number of samples in
one pass (None if not known).
"""


def open_sample_source(config: DataConfig, *, seed: int, base: Path, part: Part = WHOLE) -> SampleSource:
    """Opens the training data that a recipe describes, as a source of samples.

    Args:
        config: The section [data] of the recipe.
        seed: Seed of the order; each phase of a recipe has its own.
        base: Directory of the recipe; relative paths start there.
        part: (number of the stream, number of all streams): the data is split into that many streams.

    Returns:
        The source, at its first sample.

    Raises:
        DataError: A file is missing or cannot be parsed, or there is no usable sample.
        ConfigError: The sizes of a mixture without ratios are not known, or there are fewer files than streams.
    """
    return SOURCE_MAKERS[config.kind](config, seed, base, part)[0]


def read_entries(config: DataConfig, *, base: Path) -> tuple[Iterable[Entry], BrokenSamples]:
    """Returns all entries of a data set, each once, in the order of the files, for evaluation or filtering.

    Args:
        config: The section [data] of the recipe; any kind except "scenes" and mixtures.
        base: Directory that relative paths start from.

    Returns:
        The entries and the broken samples. Shards are read while the entries are iterated; then the list of broken
        samples is complete only after the last entry.

    Raises:
        DataError: A file is missing or cannot be parsed, or a list has no usable sample.
        UsageError: The kind is "scenes", which have no end, or a mixture.
    """
    if config.kind == "scenes":
        raise UsageError("expected data from files, got the generated scenes", "give a file or folder")
    if config.kind == MIXTURE:
        raise UsageError("expected one data set, got a mixture of several", "give the path of one of the data sets")
    if config.kind in SHARD_FORMATS:
        broken = BrokenSamples(config.path, config.max_broken)
        files, read = _files(config, base), _file_reader(config, base)
        named = zip(files, shard_names(files), strict=True)
        return (entry for path, name in named for entry in read(path, broken, name)), broken
    entries, broken = LIST_READERS[config.kind](config, base)
    if not entries:
        raise broken.none_usable("sample with its picture and text")
    return entries, broken
