"""Finds picture files in folders, and reads and writes the pictures of WebDataset shards (uncompressed tar files).

Only the headers of a shard are read to list its files. A picture is read later, from its offset in the shard.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from blip2edge.errors import DataError, ImageError
from blip2edge.reading import reading

PICTURE_SUFFIXES = frozenset(
    (".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
"""Suffixes of picture files in a folder or a shard, in lower case."""

_VERSION_KEYS = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "last_modified", "created")

SHARD_SUFFIX = ".tar"
SHARD_FIX = "copy the shard again"

MAX_FILE_BYTES = 1 << 30
"""Largest size in bytes of a file in a shard; a larger file is not read."""

MAX_LONG_HEADER = 1 << 20  # bytes of a long name or of PAX records, which tarfile reads into memory
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
_FORM = "an uncompressed tar file"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def printable(name: str) -> str:
    """Escapes line breaks and bytes that are not UTF-8 in a file's name, for messages, reports and JSON objects."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in text)


def is_address(path: str) -> bool:
    """Whether a path is an address, such as ``s3://bucket/pictures`` or ``https://host/cat.jpg``."""
    return "://" in path


def range_of(pattern: str) -> list[str]:
    """Returns the paths of a pattern with a range, such as ``part-{000..127}.tar``; an empty list without a range.

    Raises:
        DataError: The range is backwards.
    """
    span = _RANGE.search(pattern)
    if span is None:
        return []
    first, last = span.groups()
    if int(first) > int(last):
        raise DataError(
            f"{pattern}: expected a range from the smaller number to the larger one, got {span[0]}",
            f"write {{{last}..{first}}}",
        )
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [f"{pattern[: span.start()]}{number}{pattern[span.end() :]}" for number in numbers]


def version_mark(described: Mapping[str, Any]) -> str:
    """Returns a text that changes when a file in an object store changes: its version, or its time of modification.

    The text is empty if the object store gives neither a version nor a time of modification.

    Args:
        described: The object store's information about the file.
    """
    return next((str(described[key]) for key in _VERSION_KEYS if described.get(key)), "")


def is_file(path: Path) -> bool:
    """Returns whether a path is a file; False if the system does not allow the name, for example a too long name."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_file_or_broken_link(path: str | Path) -> bool:
    """Returns whether a path is a regular file, or a link to a file that does not exist.

    A listing keeps such a link: when the file is read, an error names it. Otherwise it would be skipped silently.
    """
    return os.path.isfile(path) or is_broken_link(path)


def is_broken_link(path: str | Path) -> bool:
    """Returns whether a path is a symbolic link to a file that does not exist."""
    return os.path.islink(path) and not os.path.exists(path)


class FolderFiles(NamedTuple):
    """The files of a folder and of its subfolders.

    Attributes:
        files: The files, sorted by name.
        unreadable: Why a folder cannot be listed, by its path: the folder itself, or one of its subfolders.
    """

    files: list[Path]
    unreadable: dict[Path, str]


def visible_files(folder: Path) -> FolderFiles:
    """Lists the regular files of a folder and of its subfolders.

    Links to files that do not exist are listed too; links to folders are not followed. Files and subfolders whose name
    begins with a dot are skipped, such as the ``._`` files that macOS makes.
    """
    files: list[Path] = []
    unreadable: dict[Path, str] = {}
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(place / entry.name)
                    elif is_file_or_broken_link(entry.path):
                        files.append(place / entry.name)
        except OSError as error:
            unreadable[place] = folder_problem(error)
    return FolderFiles(sorted(files), dict(sorted(unreadable.items())))


def folder_problem(error: OSError) -> str:
    """Returns why a folder cannot be listed, for messages."""
    return f"the folder cannot be read ({error.strerror or error})"


@dataclass(frozen=True)
class ShardFile:
    """A file inside a shard.

    Attributes:
        shard: The tar file.
        name: Name of the file in the shard.
        offset: Position of the file's first byte in the shard.
        size: Length of the file in bytes.
        sparse: Whether the file is sparse: its bytes are not one piece of the shard. Such a file is not read.
    """

    shard: Path
    name: str
    offset: int
    size: int
    sparse: bool = False

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
            ImageError: The shard cannot be read, is truncated, or has a sparse file here.
        """
        with reading(self.shard, "a shard", ImageError, SHARD_FIX), open(self.shard, "rb") as file:
            return self.read_from(file)

    def read_from(self, file: BinaryIO) -> bytes:
        """Reads the content of the file from the opened shard.

        Raises:
            ImageError: The shard is truncated, or the file is sparse or too large.
        """
        where = f"{self.shard}: {printable(self.name)}"
        if self.sparse:
            raise ImageError(f"{where} is a sparse file, which is not read", "pack the files again without sparse ones")
        rest = max(0, os.fstat(file.fileno()).st_size - self.offset)
        if self.size > rest:
            raise ImageError(f"{where} is cut off: expected {self.size} bytes, got {rest}", SHARD_FIX)
        if self.size > MAX_FILE_BYTES:
            raise ImageError(f"{where}: expected at most {MAX_FILE_BYTES} bytes, got {self.size}")
        file.seek(self.offset)
        return file.read(self.size)


class BrokenShardError(DataError):
    """A shard is no tar file, or is damaged: the files before the damage were listed."""


class _Member(tarfile.TarInfo):
    """The header of one file in a tar file.

    A negative size, or a too large size of a long name, raises tarfile.ReadError; tarfile itself does not check this.
    """

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        long = self.type in _LONG_HEADERS and self.size > MAX_LONG_HEADER
        if self.size < 0 or long:
            raise tarfile.ReadError(f"a header gives the impossible size of {self.size} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]  # tarfile's own hook, not in its types


def add_member(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Adds a file to a shard. Its header has no time and no owner, so that equal data gives equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


@contextmanager
def open_shard(path: Path, opened: BinaryIO | None = None) -> Iterator[Iterator[tuple[ShardFile, Callable[[], bytes]]]]:
    """Opens a shard to list its files.

    Args:
        path: An uncompressed tar file.
        opened: The file if it is already open, for example in an object store; it is not closed.

    Yields:
        The files in the order of the shard, each with a function that reads its content while the shard is open.
        After the shard is closed, use `ShardFile.read`.

    Raises:
        DataError: The file cannot be opened.
        BrokenShardError: The file is not an uncompressed tar file, or is truncated; raised by the iterator too.
    """
    with ExitStack() as stack:
        with reading(path, _FORM, DataError, SHARD_FIX):
            file = stack.enter_context(open(path, "rb")) if opened is None else opened
        with reading(path, _FORM, BrokenShardError, SHARD_FIX):
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:", tarinfo=_Member))
        yield _files(path, archive, file)


def _files(path: Path, archive: tarfile.TarFile, file: BinaryIO) -> Iterator[tuple[ShardFile, Callable[[], bytes]]]:
    last = -1
    while True:
        with reading(path, _FORM, BrokenShardError, SHARD_FIX):
            member = _next(archive, file, last)
        if member is None:
            return
        last = member.offset
        if member.isfile():
            stored = ShardFile(path, member.name, member.offset_data, member.size, member.issparse())
            yield stored, partial(stored.read_from, file)


def _next(archive: tarfile.TarFile, file: BinaryIO, last: int) -> tarfile.TarInfo | None:
    """Returns the header of the next file in a shard; None at the end.

    Args:
        archive: The opened shard.
        file: The file that ``archive`` reads.
        last: Position in bytes of the previous header; the next header must come after it.

    Raises:
        tarfile.ReadError: The header is damaged (tarfile itself would end without an error), its size is negative, or
            it is not after ``last``.
    """
    member = archive.next()
    archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header, and its types hide the list
    if member is None:
        file.seek(archive.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError(f"the header at byte {archive.offset} is damaged")
    elif member.size < 0 or member.offset <= last:
        raise tarfile.ReadError(f"a header gives a size of {member.size} bytes")
    return member
