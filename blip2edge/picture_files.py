"""Endings of picture files, and reading of pictures from WebDataset shards: uncompressed tar files on a disk.

Only the headers of a shard are read to list its files. A picture is read later, from its offset in the shard.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from blip2edge.errors import ImageError

PICTURE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""Suffixes of picture files in a folder or a shard, in lower case."""

SHARD_SUFFIX = ".tar"


def printable(name: str) -> str:
    """Escapes line breaks and bytes that are not UTF-8 in a file's name, for messages, reports and JSON objects."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def visible_files(folder: Path) -> list[Path]:
    """Lists the regular files of a folder and of its subfolders, sorted by name.

    Files and subfolders whose name begins with a dot are skipped, such as the ``._`` files that macOS makes.
    """
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts) and path.is_file()
    ]


@dataclass(frozen=True)
class ShardFile:
    """A file inside a shard.

    Attributes:
        shard: The tar file.
        name: Name of the file in the shard.
        offset: Position of its first byte in the shard.
        size: Length in bytes.
    """

    shard: Path
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        """Suffix of the file's name in lower case, such as ".jpg"."""
        return Path(self.name).suffix.lower()

    @property
    def is_picture(self) -> bool:
        """Whether the file's suffix is that of a picture."""
        return self.suffix in PICTURE_SUFFIXES

    def read(self) -> bytes:
        """Reads the content of the file.

        Raises:
            ImageError: The shard cannot be read, or is truncated.
        """
        try:
            with open(self.shard, "rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise ImageError(f"{self.shard}: cannot be opened ({error.strerror or error})") from error
        if len(content) != self.size:
            raise ImageError(
                f"{self.shard}: {self.name} is cut off: expected {self.size} bytes, got {len(content)}",
                "copy the shard again",
            )
        return content


@contextmanager
def open_shard(path: Path) -> Iterator[Iterator[tuple[ShardFile, Callable[[], bytes]]]]:
    """Opens a shard to list its files.

    Args:
        path: An uncompressed tar file.

    Yields:
        The files in the order of the shard, each with a function that reads its content while the shard is open.
        Later, use `ShardFile.read`.

    Raises:
        tarfile.TarError: The file is not an uncompressed tar file, or is truncated.
        OSError: The file cannot be opened.
    """
    with tarfile.open(path, "r:") as archive:
        yield (
            (
                ShardFile(path, member.name, member.offset_data, member.size),
                partial(_content, archive, member),
            )
            for member in archive
            if member.isfile()
        )


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return b"" if file is None else file.read()
