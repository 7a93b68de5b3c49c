"""Lists and reads files on the local disk and in object stores (``s3://``, ``gs://``, ``memory://``; by fsspec).

Files are always listed in the same order. Each listed file has a version text; if the version differs in a later run,
the file was changed.
"""

from __future__ import annotations

import errno
import inspect
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from blip2edge.bulk.read_errors import STORAGE_FIX, StorageError
from blip2edge.errors import DataError, MissingPackageError, one_line
from blip2edge.packages import require
from blip2edge.picture_files import MAX_FILE_BYTES, is_address, is_broken_link, version_mark
from blip2edge.reading import read_bytes, reading
from blip2edge.runtime.images.download import WEB
from blip2edge.special_files import open_file

_OTHER_STORE = ("fs", "fo", "target_protocol")
"""Arguments of fsspec's file systems that read inside another file or store, such as ``zip``, ``dir``, ``filecache``.

Such a file system needs one of these arguments, which names the other file or store.
"""

_WRAPPERS = ("generic", "simplecache")  # such file systems without these arguments in their own signature


@dataclass(frozen=True)
class StoredFile:
    """A file of a store.

    Attributes:
        path: Path or address, for :meth:`Store.open`.
        name: Path relative to the listed folder, with ``/`` between its parts.
        version: Text with the size and the time of the last change, or a similar mark that the object store gives.
    """

    path: str
    name: str
    version: str


class UnknownStoreError(DataError):
    """An address names no object store: fsspec does not know the protocol, or needs more than the address."""


class Store(Protocol):
    """Interface to the local disk or to an object store."""

    def files(self, folder: str, *, deep: bool = True) -> Iterator[StoredFile]:
        """Yields the files of a folder, sorted by the components of their paths; with ``deep`` also of its subfolders.

        Files and folders whose name begins with a dot are skipped.

        Raises:
            DataError: The folder cannot be read.
        """

    def file(self, path: str) -> StoredFile | None:
        """Returns name and version of a file; None if there is no file at ``path``."""

    def is_folder(self, path: str) -> bool:
        """Returns whether there is a folder at ``path``."""

    def open(self, path: str) -> BinaryIO:
        """Opens a file for reading at any position; call it in a ``with reading(...)`` block, which converts errors."""

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        """Returns the bytes of a file, or ``size`` bytes from position ``start``.

        Call it in a ``with reading_picture(...)`` block, which converts the errors.

        Raises:
            OSError: The file cannot be read; an object store raises errors of its own.
            ValueError: The content is larger than ``MAX_FILE_BYTES``, or the file ends before ``size`` bytes.
        """


class LocalStore:
    """Lists and reads files of the local disk; implements :class:`Store`."""

    def files(self, folder: str, *, deep: bool = True) -> Iterator[StoredFile]:
        """Yields the files of a folder, and links to missing files; links to folders are not followed."""
        yield from self._files(folder, "", deep)

    def _files(self, folder: str, prefix: str, deep: bool) -> Iterator[StoredFile]:
        with reading(folder, "a folder", DataError), os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                if deep:
                    yield from self._files(entry.path, f"{prefix}{entry.name}/", deep)
            elif entry.is_file():
                with reading(entry.path, "a file", DataError):
                    yield StoredFile(entry.path, f"{prefix}{entry.name}", _version(entry.stat()))
            elif is_broken_link(entry.path):  # its picture becomes a broken row
                yield StoredFile(entry.path, f"{prefix}{entry.name}", "")

    def file(self, path: str) -> StoredFile | None:
        """Returns name and version of a file; None if there is no file at ``path``."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return None
        return None if os.path.isdir(path) else StoredFile(path, os.path.basename(path), _version(status))

    def is_folder(self, path: str) -> bool:
        """Returns whether there is a folder at ``path``."""
        return os.path.isdir(path)

    def open(self, path: str) -> BinaryIO:
        """Opens a file for reading."""
        return open_file(path)

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        """Returns the bytes of a file, or ``size`` bytes of the file from position ``start``."""
        if size is None:
            return read_bytes(Path(path), MAX_FILE_BYTES)
        with open(path, "rb") as file:
            file.seek(start)
            return _whole(file.read(min(size, MAX_FILE_BYTES)), size)


class RemoteStore:
    """Lists and reads files of an object store with fsspec; implements :class:`Store`.

    Args:
        protocol: The beginning of the addresses, such as ``s3``.

    Raises:
        MissingPackageError: fsspec, or the package for this protocol, is not installed.
        StorageError: The file system cannot be made, for example because its server is down.
        UnknownStoreError: fsspec does not know the protocol, or needs more than an address to open its file system.
    """

    def __init__(self, protocol: str) -> None:
        fsspec = require("fsspec", f"reading {protocol}://", MissingPackageError)
        self._protocol = protocol
        try:
            kind = fsspec.get_filesystem_class(protocol)
            missing = _missing(protocol, kind, fsspec.config.apply_config(kind, {}))
            if missing:
                raise UnknownStoreError(
                    f"{protocol}:// is no object store that can be read by an address alone ({missing})",
                    "copy the files to this machine, or to an object store such as s3://",
                )
            self._system: Any = fsspec.filesystem(protocol)
        except UnknownStoreError:
            raise
        except ImportError as error:
            raise MissingPackageError(
                f"{protocol}:// cannot be read ({one_line(error)})", "install the package named here with pip"
            ) from error
        except Exception as error:  # of any kind: each file system has its own, and some connect with their server
            if protocol not in {*fsspec.available_protocols(), *fsspec.registry}:
                raise UnknownStoreError(
                    f"{protocol}:// is no protocol of an object store that fsspec knows", "check the address"
                ) from error
            raise StorageError(f"{protocol}:// cannot be opened ({one_line(error)})", STORAGE_FIX) from error

    def files(self, folder: str, *, deep: bool = True) -> Iterator[StoredFile]:
        """Yields the files of a folder."""
        root = self._system._strip_protocol(folder).rstrip("/")
        with reading(folder, "a folder", DataError):
            found = self._system.find(root, maxdepth=None if deep else 1, detail=True)
        named = [(path[len(root) :].lstrip("/").split("/"), path) for path in found]
        for parts, path in sorted(named):
            if not any(part.startswith(".") for part in parts):
                yield StoredFile(f"{self._protocol}://{path.lstrip('/')}", "/".join(parts), _described(found[path]))

    def file(self, path: str) -> StoredFile | None:
        """Returns name and version of a file; None if there is no file at ``path``."""
        with reading(path, "a file", DataError):
            try:
                values = self._system.info(path)
            except FileNotFoundError:
                return None
        if values.get("type") == "directory":
            return None
        return StoredFile(path, path.rpartition("/")[2], _described(values))

    def is_folder(self, path: str) -> bool:
        """Returns whether there is a folder at ``path``."""
        with reading(path, "a folder", DataError):
            return bool(self._system.isdir(path))

    def open(self, path: str) -> BinaryIO:
        """Opens a file for reading."""
        return cast("BinaryIO", self._system.open(path, "rb"))

    def read(self, path: str, start: int = 0, size: int | None = None) -> bytes:
        """Returns the bytes of a file, or ``size`` bytes of the file from position ``start``."""
        if size is None:
            values = self._system.info(path)
            if values.get("type") == "directory":
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            size = int(values.get("size") or 0)
        if size > MAX_FILE_BYTES:
            raise ValueError(f"expected at most {MAX_FILE_BYTES} bytes, got {size}")
        return _whole(self._system.cat_file(path, start=start, end=start + size), size)


def _missing(protocol: str, kind: Any, given: Collection[str]) -> str:
    """Returns what a file system of fsspec needs besides an address, such as the host of a server; "" if nothing.

    The constructor's parameters are read, and no file system is created: a file system of ``ftp://`` that failed would
    print a traceback when Python deletes it.
    """
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    needed = (one for one in parameters if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD)
    missing = [one.name for one in needed if one.name not in given]
    if missing:
        return f"it also needs {', '.join(missing)}"
    others = [one.name for one in parameters if one.name in _OTHER_STORE]
    inside = protocol in _WRAPPERS or (others and not any(name in given for name in others))
    return "it reads files inside another file or store" if inside else ""


def _whole(content: bytes, size: int) -> bytes:
    """Returns ``content``; raises ValueError if it has fewer than ``size`` bytes."""
    if len(content) != size:
        raise ValueError(f"expected {size} bytes, got {len(content)}: the file is cut off")
    return content


def _version(status: os.stat_result) -> str:
    return f"{status.st_size}/{status.st_mtime_ns}"


def _described(values: dict[str, Any]) -> str:
    return f"{values.get('size', '')}/{version_mark(values)}"


def is_web(path: str) -> bool:
    """Returns whether a path is a web address (http or https)."""
    return path.lower().startswith(WEB)


@cache
def _remote(protocol: str) -> RemoteStore | UnknownStoreError:
    """Returns the store of a protocol. If the protocol has no store, the error is returned and cached.

    All other errors are raised, and the next call tries again.
    """
    try:
        return RemoteStore(protocol)
    except UnknownStoreError as error:
        return error.with_traceback(None)


_LOCAL = LocalStore()


def store_of(path: str) -> Store:
    """Returns the store for a path or an address; raises the errors of :class:`RemoteStore`."""
    if not is_address(path):
        return _LOCAL
    found = _remote(path.partition("://")[0].lower())
    if isinstance(found, UnknownStoreError):
        raise found.with_problem(str)  # a copy: several threads may raise it
    return found


def joined(folder: str, name: str) -> str:
    """Returns the path (or address) of the file ``name`` in ``folder``, which may be an address."""
    if is_address(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_address(folder) else os.path.join(folder, name)


def folder_of(path: str) -> str:
    """Returns the folder (path or address) of a file."""
    return path.rpartition("/")[0] if is_address(path) else os.path.dirname(path) or "."
