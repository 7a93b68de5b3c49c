"""Chooses the pictures of a calibration from a folder and its ``.tar`` shards, always in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from blip2edge.errors import DataError, ImageError, option
from blip2edge.limits import DEFAULT_LIMITS, Limits
from blip2edge.picture_files import (
    MAX_FILE_BYTES,
    PICTURE_SUFFIXES,
    SHARD_SUFFIX,
    ShardFile,
    open_shard,
    printable,
    visible_files,
)
from blip2edge.reading import MANIFEST_BYTES, read_bytes, reading
from blip2edge.runtime.images.preprocess import load_image

ADVISED = 100
"""With fewer pictures, ranges are uncertain, and a calibration warns."""

DEFAULT_COUNT = 512
"""Default of ``--count``; SmoothQuant (arXiv 2211.10438) calibrates on 512 samples."""


@dataclass(frozen=True)
class CalibrationPicture:
    """A picture in a file of its own, or in a shard (a tar file).

    Attributes:
        path: The picture file, or the shard.
        stored: The picture's place in the shard; None if the picture is a file of its own.
        limits: The limits on the size of a picture that is decoded.
    """

    path: Path
    stored: ShardFile | None = None
    limits: Limits = DEFAULT_LIMITS

    @property
    def member(self) -> str:
        """Name of the picture in its shard; empty if the picture is a file of its own."""
        return self.stored.name if self.stored is not None else ""

    @property
    def name(self) -> str:
        """The picture's name in messages: the file's path, and for a picture in a shard also the name in the shard."""
        return printable(f"{self.path}:{self.member}" if self.member else str(self.path))

    def references(self) -> list[str]:
        """Returns the reference captions: the lines of the ``.txt`` file with the same name.

        Returns:
            The captions; empty for a picture in a shard, and if there is no such file.
        """
        beside = self.path.with_suffix(".txt")
        if self.member or not beside.is_file():
            return []
        with reading(beside, "captions", DataError):
            lines = read_bytes(beside, MANIFEST_BYTES).decode("utf-8", "replace").splitlines()
        return [line.strip() for line in lines if line.strip()]

    def read(self) -> bytes:
        """Reads the bytes of the picture file.

        Raises:
            ImageError: The file or the shard cannot be read, or the shard is truncated.
        """
        if self.stored is not None:
            return self.stored.read()
        with reading(self.path, "a picture", ImageError):
            return read_bytes(self.path, MAX_FILE_BYTES)

    def image(self) -> Image.Image:
        """Decodes the picture to RGB.

        Raises:
            ImageError: The file cannot be read, or it is not a picture within the limits.
        """
        return load_image(self.read(), self.limits)


@dataclass(frozen=True)
class PictureSet:
    """The pictures that were chosen for calibration.

    Attributes:
        pictures: The pictures, in order.
        sha256: One hash over the bytes of all pictures, in order.
        skipped: Names of files that could not be read as pictures.
        unreadable: Folders that could not be read, each with the reason.
    """

    pictures: tuple[CalibrationPicture, ...]
    sha256: str
    skipped: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self) -> Iterator[CalibrationPicture]:
        return iter(self.pictures)


def choose_pictures(
    source: str | Path,
    count: int = DEFAULT_COUNT,
    progress: Callable[[int, int], None] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> PictureSet:
    """Finds pictures and chooses ``count`` of them, evenly spaced in the order of their names.

    A picture that cannot be read is replaced by another picture.

    Args:
        source: A folder of picture files and ``.tar`` shards in WebDataset's format, searched with its subfolders;
            or one shard.
        count: Largest number of pictures.
        progress: Called with pictures read and pictures in all.
        limits: The largest picture that is decoded; larger pictures are skipped.

    Raises:
        DataError: No picture can be read, or a shard is damaged.
    """
    root = Path(source)
    listed, unreadable = _search(root)
    found = [CalibrationPicture(path, stored, limits) for path, stored in listed]
    if not found:
        missed = "".join(f"; {path}: {problem}" for path, problem in unreadable.items())
        raise DataError(
            f"{root}: expected pictures ({', '.join(sorted(PICTURE_SUFFIXES))}) or .tar shards of them, found none"
            f"{missed}",
            f"give {option('images')} a folder of pictures like those of the application",
        )
    chosen = range(len(found)) if len(found) <= count else [at * len(found) // count for at in range(count)]
    others = sorted(set(range(len(found))) - set(chosen))  # in place of pictures that cannot be read
    wanted = [found[at] for at in (*chosen, *others)]
    digest = hashlib.sha256()
    kept: list[CalibrationPicture] = []
    skipped: list[str] = []
    total = min(count, len(found))
    for picture in wanted:
        if progress is not None:
            progress(min(len(kept) + (len(found) <= count) * len(skipped), total), total)
        if len(kept) == count:
            break
        try:
            content = picture.read()
            load_image(content, limits)
        except ImageError:
            skipped.append(picture.name)
            continue
        digest.update(hashlib.sha256(content).digest())
        kept.append(picture)
    if not kept:
        raise DataError(
            f"{root}: none of the {len(wanted)} pictures can be read; the first is {skipped[0]}",
            f"give {option('images')} a folder with undamaged pictures",
        )
    if progress is not None:
        progress(total, total)
    closed = tuple(f"{printable(str(path))}: {problem}" for path, problem in unreadable.items())
    return PictureSet(tuple(kept), digest.hexdigest(), tuple(skipped), closed)


def _search(root: Path) -> tuple[list[tuple[Path, ShardFile | None]], dict[Path, str]]:
    """Finds the pictures of a folder or of one shard.

    Returns:
        The pictures, and the reason for each folder that cannot be read, by the folder's path.
    """
    if root.is_file() and root.suffix.lower() == SHARD_SUFFIX:
        return list(_shard(root)), {}
    if not root.is_dir():
        raise DataError(
            f"{root}: expected a folder of pictures or a .tar shard, found neither",
            f"give {option('images')} a folder that exists",
        )
    files, unreadable = visible_files(root)
    found: list[tuple[Path, ShardFile | None]] = []
    for path in files:
        if path.suffix.lower() == SHARD_SUFFIX:
            found += _shard(path)
        elif path.suffix.lower() in PICTURE_SUFFIXES:
            found.append((path, None))
    return found, unreadable


def _shard(path: Path) -> Iterator[tuple[Path, ShardFile | None]]:
    """Yields (path of the shard, place in the shard) for each picture of a shard, ordered by the pictures' names."""
    with open_shard(path) as files:
        pictures = [file for file, _ in files if file.is_picture]
    for file in sorted(pictures, key=lambda picture: picture.name):
        yield path, file
