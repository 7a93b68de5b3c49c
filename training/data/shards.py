"""Reads and writes WebDataset shards, tar files in which the files of a sample differ in suffix (`1.jpg`, `1.txt`).

Headers and texts are read in order; a picture is read later, from its offset in the shard. Packed shards and shards in
an object store are copied first, see :mod:`blip2edge.training.data.readers.copies`. Only the entries of the current
block are in memory, so memory does not grow with the data.
"""

from __future__ import annotations

import glob
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

from PIL import Image

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.errors import DataError, ImageError
from blip2edge.picture_files import BrokenShardError, ShardFile, add_member, is_address, open_shard, range_of
from blip2edge.reading import parse_json, reading
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.training.data.entries import BrokenSamples, Entry, file_identity
from blip2edge.training.data.folder import captions_of
from blip2edge.training.data.readers.rows import asks, texts_of

SampleFiles = dict[str, tuple[ShardFile, Callable[[], bytes]]]
"""The files of one sample by suffix, each with the function that reads it."""

MAX_TEXT_BYTES = 16 << 20
"""Largest size in bytes of a text or JSON file of one sample."""

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
"""Endings of the file names of shards."""


class ShardPicture(ShardFile):
    """A picture inside a shard, with the interface of :class:`blip2edge.training.data.entries.StoredPicture`."""

    @property
    def identity(self) -> str:
        """Returns a key: path, size and modification time of the shard, and the offset of the picture in the shard."""
        return f"{file_identity(self.shard)}|{self.offset}"

    def open(self) -> Image.Image:
        """Decodes the picture; returns it upright, in RGB. Raises the errors of :meth:`read`."""
        return load_image(self.read())


def shard_paths(pattern: str | Path, suffixes: tuple[str, ...] = SHARD_SUFFIXES) -> list[Path]:
    """Finds the shards that a pattern names; returns their paths, sorted.

    Args:
        pattern: A file, a directory of shards, or a file name with `*` or with a range: `part-{000..127}.tar`.
        suffixes: Endings of the files, in lower case.

    Raises:
        DataError: There is no such shard, a shard of the range is missing, the range is backwards, or a file has
            another ending.
    """
    text = str(pattern)
    if Path(text).is_file():  # also a path that contains characters of a pattern
        paths = [Path(text)]
    elif Path(text).is_dir():
        found = sorted(Path(text).iterdir())
        paths = [path for path in found if path.name.lower().endswith(suffixes) and not path.name.startswith(".")]
    else:
        paths = [Path(path) for path in range_of(text)] or sorted(map(Path, glob.glob(text)))
    missing = [str(path) for path in paths if not path.is_file()]
    expected = " or ".join(suffixes)
    if missing or not paths:
        raise DataError(
            f"expected {expected} files at {text}, {len(missing)} of {len(paths)} are missing: {', '.join(missing[:3])}"
            if missing
            else f"expected {expected} files at {text}, got none",
            "check the path, and the range in braces if the path has one",
        )
    others = [path for path in paths if not path.name.lower().endswith(suffixes)]
    if others:
        raise DataError(f"expected {expected} files, got {others[0].name}", "pack or convert the file again")
    return paths


def shard_names(paths: Sequence[Path | str]) -> list[str]:
    """Returns a unique name for each shard: its file name, or its relative path if two file names are equal.

    Args:
        paths: Paths or addresses of the shards.
    """
    names = [str(path).rpartition("/")[2] for path in paths]
    if len(set(names)) == len(names):
        return names
    whole = [str(path) if is_address(str(path)) else Path(path).absolute().as_posix() for path in paths]
    parts = [path.split("/") for path in whole]
    shared = sum(1 for _ in takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False)))
    return ["/".join(part[shared:]) for part in parts]


def read_shard(path: Path, broken: BrokenSamples, name: str = "") -> Iterator[Entry]:
    """Reads the entries of one shard, in the order of the shard.

    Args:
        path: A tar file.
        broken: Collects samples without a picture or text, and the shard if it is truncated.
        name: Name of the shard in sample ids (:func:`shard_names`); empty for its file name.

    Yields:
        An entry for each caption or question.

    Raises:
        DataError: The shard cannot be opened, or more samples are broken than allowed.
    """
    name, key, parts = name or path.name, "", SampleFiles()
    try:
        with open_shard(path) as files:
            for file, read in files:
                folder, _, base = file.name.rpartition("/")
                if base.startswith("."):  # hidden, such as the ``._`` files that macOS adds
                    continue
                stem, dot, suffix = base.partition(".")
                if f"{folder}/{stem}" != key and parts:
                    yield from _entries(name, key, parts, broken)
                    parts = {}
                key = f"{folder}/{stem}"
                parts[(dot + suffix).lower()] = (file, read)
            if parts:
                yield from _entries(name, key, parts, broken)
    except BrokenShardError as error:
        broken.add(name, f"the shard cannot be read further: {error.problem}")


def _entries(name: str, key: str, parts: SampleFiles, broken: BrokenSamples) -> list[Entry]:
    """Returns the entries of one sample of a shard. A broken sample is added to `broken` and gives no entry."""
    sample_id = f"{name}:{key.lstrip('/')}"
    file = next((file for file, _ in parts.values() if file.is_picture), None)
    if file is None:
        broken.add(sample_id, "there is no picture")
        return []
    if file.sparse:
        broken.add(sample_id, "its picture is a sparse file")
        return []
    try:
        with reading(sample_id, "a text", DataError):
            texts = {suffix: _text(*parts[suffix]) for suffix in (".txt", ".json") if suffix in parts}
            fields = parse_json(texts.get(".json", "{}"))
    except (DataError, ImageError) as error:
        broken.add(sample_id, f"its text cannot be read: {error.problem}")
        return []
    fields = fields if isinstance(fields, dict) else {}
    picture = ShardPicture(file.shard, file.name, file.offset, file.size)
    image_id = fields.get("image_id", sample_id)
    image_id = str(image_id) if isinstance(image_id, (int, str)) else sample_id
    row = {str(key).lower(): value for key, value in fields.items()}
    captions = captions_of(texts.get(".txt", ""))
    try:
        found = [{"text": each} for each in captions] if captions and not asks(row) else list(texts_of(row))
    except DataError as error:
        broken.add(sample_id, error.problem if row else "there is no caption")
        return []
    return [
        Entry(f"{sample_id}#{number}" if number else sample_id, image_id, picture, **entry)
        for number, entry in enumerate(found)
    ]


def _text(file: ShardFile, read: Callable[[], bytes]) -> str:
    """Returns the text in a file of a sample; raises ValueError if the text is too long or not UTF-8."""
    if file.size > MAX_TEXT_BYTES:
        raise ValueError(f"expected at most {MAX_TEXT_BYTES} bytes, got {file.size}")
    return read().decode("utf-8-sig")


def read_shards(paths: Sequence[Path], broken: BrokenSamples) -> Iterator[Entry]:
    """Reads the entries of several shards, one shard after the other.

    Raises:
        DataError: A shard cannot be opened, or more samples are broken than allowed.
    """
    for path, name in zip(paths, shard_names(paths), strict=True):
        yield from read_shard(path, broken, name)


@dataclass
class ShardWriter:
    """Writes samples into shards of equal size: `000000.tar`, `000001.tar` and so on.

    Attributes:
        directory: Directory of the shards; created if it does not exist.
        samples_per_shard: Number of samples in one shard.
        paths: The written shards, in order.
    """

    directory: Path
    samples_per_shard: int = 1000
    paths: list[Path] = field(default_factory=list)
    _tar: tarfile.TarFile | None = None
    _count: int = 0

    def add(self, key: str, picture: bytes, suffix: str, captions: Sequence[str], fields: dict[str, Any]) -> None:
        """Writes one sample.

        Args:
            key: Name of the sample's files without suffix; unique.
            picture: Bytes of the picture file.
            suffix: Suffix of the picture file, such as ".jpg".
            captions: The picture's captions, one line each in the text file.
            fields: Further fields, written as JSON.

        Raises:
            OutputError: The disk is full or not writable.
        """
        try:
            if self._tar is None or self._count >= self.samples_per_shard:
                self._next()
            self._write(f"{key}{suffix}", picture)
            self._write(f"{key}.txt", "".join(f"{caption}\n" for caption in captions).encode())
            self._write(f"{key}.json", json.dumps(fields, sort_keys=True).encode())
        except OSError as error:
            raise output_error(self.directory, error) from error
        self._count += 1

    def _next(self) -> None:
        self.close()
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{len(self.paths):06d}.tar"
        self._tar = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in close
        self.paths.append(path)
        self._count = 0

    def _write(self, name: str, content: bytes) -> None:
        if self._tar is not None:
            add_member(self._tar, name, content)

    def close(self) -> None:
        """Closes the current shard."""
        if self._tar is not None:
            self._tar.close()
        self._tar = None
