"""Makes local copies of data files that cannot be read in place: packed shards (`.tar.gz`), files of an object store.

A copy is made when the file is first read, in a directory of the user's cache. If all copies together are larger than
the limit, the least recently used copies are removed. If a picture is read whose copy was removed, the copy is made
again.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from PIL import Image

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.errors import DataError, ImageError, MissingPackageError
from blip2edge.packages import require
from blip2edge.picture_files import is_address, range_of, version_mark
from blip2edge.reading import CHUNK, reading
from blip2edge.special_files import open_file
from blip2edge.training.data.entries import BrokenSamples, Entry, StoredPicture, file_identity

PACKED = (".gz", ".tgz")

ReadFile = Callable[[Path, BrokenSamples, str], Iterator[Entry]]
"""A function that reads the entries of one file.

Its arguments are the file's path, the collection of broken samples, and the file's name in sample ids.
"""


def remote_system(address: str) -> tuple[Any, str]:
    """Opens the object store of an address; returns fsspec's file system, and the file's path in that file system.

    Raises:
        MissingPackageError: fsspec, or the package for this protocol, is not installed.
        DataError: fsspec does not know the protocol.
    """
    fsspec = require("fsspec", f"reading {address.partition('://')[0]}://", MissingPackageError)
    try:
        with reading(address, "the address of an object store", DataError):
            system, path = fsspec.core.url_to_fs(address)
    except DataError as error:
        if isinstance(error.__cause__, ImportError):
            raise MissingPackageError(error.problem, "install the named package with pip") from error
        raise
    return system, str(path)


def remote_files(pattern: str, suffixes: tuple[str, ...]) -> list[str]:
    """Finds the files that an address names; returns their addresses, sorted.

    Args:
        pattern: The address of a file or a folder, with `*`, or with a range: `s3://bucket/part-{000..127}.tar`. The
            files of a range are not looked up.
        suffixes: Endings of the files of a folder.

    Raises:
        DataError: There is no such file, the range is backwards, or the store cannot be read.
        MissingPackageError: fsspec, or the package for this protocol, is not installed.
    """
    if of_range := range_of(pattern):
        return of_range
    system, path = remote_system(pattern)
    with reading(pattern, "a folder of an object store", DataError):
        if "*" in path:
            found = system.glob(path)
        elif system.isdir(path):
            found = [each for each in system.ls(path, detail=False) if each.lower().endswith(suffixes)]
        else:
            found = [path] if system.exists(path) else []
    if not found:
        raise DataError(f"expected {' or '.join(suffixes)} files at {pattern}, got none", "check the address")
    return sorted(str(system.unstrip_protocol(each)) for each in found)


@dataclass(frozen=True)
class LocalCopies:
    """Makes, finds and removes the local copies in one directory.

    Attributes:
        directory: The directory; created if it does not exist.
        limit: Largest size of all copies together, in bytes; also the largest size of a single copy.
    """

    directory: Path
    limit: int

    def path(self, source: Path | str) -> Path:
        """Returns the path of a local file with the unpacked content of `source`; makes a copy if needed.

        Args:
            source: A path or an address.

        Returns:
            `source` itself if the file is local and not packed, else the path of its copy.

        Raises:
            DataError: The file cannot be read, or is larger than the limit.
            OutputError: The disk is full or not writable.
        """
        text = str(source)
        if is_address(text):
            system, path = remote_system(text)
            with reading(text, "a file", DataError, "check the address, and run the command again"):
                described = system.info(path)
            version = f"{text}|{described.get('size')}|{version_mark(described)}"
        elif text.lower().endswith(PACKED):
            system, path, version = None, text, file_identity(Path(text))
        else:
            return Path(source)
        name = text.rpartition("/")[2].lower()
        suffix = ".tar" if name.endswith((".tar.gz", ".tgz")) else Path(name.removesuffix(".gz")).suffix
        copy = self.directory / f"{hashlib.sha256(version.encode()).hexdigest()[:32]}{suffix}"
        if copy.exists():
            os.utime(copy)
            return copy
        with reading(text, "a file", DataError, "check the path, and run the command again"):
            opened = open_file(path) if system is None else system.open(path, "rb")
        with opened as file:
            self._make(text, file, copy)
        self._remove_oldest(copy)
        return copy

    def _make(self, source: str, file: IO[bytes], copy: Path) -> None:
        """Copies and unpacks a file. If a packed file is cut off, the copy has the content before the damage."""
        part = self.directory / f".{uuid.uuid4().hex}.part"
        content = gzip.GzipFile(fileobj=file) if source.lower().endswith(PACKED) else file
        rest = self.limit
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with open(part, "wb") as written:
                while chunk := _chunk(source, content):
                    rest -= len(chunk)
                    if rest < 0:
                        raise DataError(
                            f"{source}: expected at most {self.limit} bytes, got more",
                            "raise copies_gib ([data] in a recipe), or make smaller shards",
                        )
                    written.write(chunk)
            os.replace(part, copy)
        except OSError as error:
            raise output_error(self.directory, error) from error
        finally:
            part.unlink(missing_ok=True)

    def _remove_oldest(self, kept: Path) -> None:
        """Removes copies, the least recently used first, until the size of all copies is within the limit."""
        copies = []
        for path in self.directory.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:  # another process removed it
                continue
            if path != kept and not path.name.startswith("."):
                copies.append((status.st_mtime_ns, status.st_size, path))
        total = kept.stat().st_size + sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if total <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= size

    def reader(self, read: ReadFile) -> Callable[[Path | str, BrokenSamples, str], Iterator[Entry]]:
        """Returns a reader that copies packed and remote files, and then calls `read`, a reader of local files."""

        def entries(source: Path | str, broken: BrokenSamples, name: str) -> Iterator[Entry]:
            path = self.path(source)
            for entry in read(path, broken, name):
                own = path == source
                yield entry if own else replace(entry, picture=CopiedPicture(entry.picture, path, str(source), self))

        return entries


def _chunk(source: str, content: Any) -> bytes:
    """Returns the next bytes of a file; no bytes at its end, or if the next bytes of a packed file are damaged."""
    try:
        with reading(source, "a file", DataError, "copy the file again, or run the command again"):
            if isinstance(content, gzip.GzipFile):
                return content.read1(CHUNK)  # what comes before the damage
            return bytes(content.read(CHUNK))
    except DataError as error:
        if isinstance(content, gzip.GzipFile) and isinstance(error.__cause__, (EOFError, gzip.BadGzipFile, zlib.error)):
            return b""
        raise


@dataclass(frozen=True)
class CopiedPicture:
    """A picture in a local copy of a data file (interface: :class:`blip2edge.training.data.entries.StoredPicture`).

    Attributes:
        picture: The picture in the copy.
        copy: Path of the copy.
        source: Path or address that the copy was made from.
        copies: The directory of copies, which makes the copy again if the copy was removed.
    """

    picture: StoredPicture
    copy: Path
    source: str
    copies: LocalCopies

    @property
    def suffix(self) -> str:
        """Returns the suffix of the picture's file name."""
        return self.picture.suffix

    @property
    def identity(self) -> str:
        """Returns the key of the picture's cached features: the name of the copy, and the picture's offset in it.

        The name of a copy depends on the version of its source.
        """
        offset = getattr(self.picture, "offset", None)
        return self.picture.identity if offset is None else f"{self.copy.name}|{offset}"

    def read(self) -> bytes:
        """Reads the bytes of the picture file; raises ImageError."""
        self._renew()
        return self.picture.read()

    def open(self) -> Image.Image:
        """Decodes the picture; returns it upright, in RGB; raises ImageError."""
        self._renew()
        return self.picture.open()

    def _renew(self) -> None:
        if not self.copy.exists() and self.copies.path(self.source) != self.copy:
            raise ImageError(f"{self.source} was changed while it was read", "run the command again")
