"""Compares the files of a bundle, an optimized copy or an engine folder with the hashes in its manifest.

Hashing gigabytes at every start is slow. So a check that passes leaves stamps, in ``.verified.json`` next to the files,
or in the user's cache if the directory is read-only. A stamp stores the checked hash and these values of the
file: size, times of modification and of status change, device and inode. A file with the same values is not hashed
again. A copy has another inode. A change of the bytes changes the time of status change, which no program can set.

After all files are opened, the same values are compared again. If they are equal, the opened files are the hashed files
(:meth:`CheckedFiles.check_unchanged`).
"""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.bundle.fields import is_file_name
from blip2edge.bundle.outputs.locks import tidy, write_file
from blip2edge.bundle.trust.external_data import external_locations
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BundleError, BundleIntegrityError, OutputError
from blip2edge.progress import ProgressCallback
from blip2edge.reading import read_json

STAMPS = ".verified.json"
STAMP_VERSION = 2  # 2: a graph's external data was checked as well
CHUNK = 1 << 20  # bytes hashed at a time
CLOCK_STEP_NS = 20_000_000  # two changes within one tick of the file system's clock (1 to 10 ms) have the same time
RELOAD = "load the bundle again when no other program writes to it"

Identity = tuple[int, int, int, int, int]
"""Size, times of modification and of status change in ns, device and inode of a file."""


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal; the file is read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file, as a manifest lists them."""

    sha256: str
    size: int  # bytes

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """Computes the record of an existing file."""
        return cls(sha256_of(path), path.stat().st_size)


@dataclass(frozen=True)
class Listing:
    """The files that a manifest lists, with their expected hashes.

    Attributes:
        directory: Directory of the files.
        files: The expected size and hash of each file, by file name.
        manifest: Name of the manifest, for errors.
        fix: What the user can do about a wrong file, for errors.
        weights: Paths of the files that the graphs may name as external data; None for the names in ``files``.
    """

    directory: Path
    files: Mapping[str, FileRecord]
    manifest: str
    fix: str
    weights: Collection[str] | None = None


@dataclass
class CheckedFiles:
    """Checks files, and records the state (size, times, inode) of each checked file.

    Attributes:
        strict: If True, every file is hashed, and stamps (records of earlier checks) are neither used nor written. A
            symbolic link is an error, and so is any change of a file or of its directory before
            :meth:`check_unchanged`.
    """

    strict: bool = False
    _files: dict[Path, tuple[Identity, str]] = field(default_factory=dict)
    _directories: dict[Path, tuple[int, int, int]] = field(default_factory=dict)

    def check(self, listing: Listing, *, use_stamps: bool = True, progress: ProgressCallback | None = None) -> None:
        """Checks that the files of a listing exist and were not changed.

        Args:
            listing: The files.
            use_stamps: Whether to skip the hash of a file whose stamp is unchanged; if False, every file is hashed.
            progress: Called with a file's name, the number of files done and the number of all files.

        Raises:
            BundleIntegrityError: A file is missing, was changed, or is no regular file; or a graph names external data
                that is not listed.
        """
        directory, use_stamps = listing.directory, use_stamps and not self.strict
        self._note_directory(directory)
        stamps = {} if self.strict else _read_stamps(directory)
        fresh: dict[str, Any] = {}
        for done, (name, record) in enumerate(listing.files.items()):
            if progress is not None:
                progress(name, done, len(listing.files))
            known = stamps.get(name) if use_stamps else None
            identity = self._check_file(listing, name, record, known)
            self._files[directory / name] = identity, record.sha256
            fresh[name] = _stamp(identity, record)
        if progress is not None:
            progress("verified", len(listing.files), len(listing.files))
        if not self.strict and stamps != (updated := {**stamps, **fresh}):
            _write_stamps(directory, updated)

    def _check_file(self, listing: Listing, name: str, record: FileRecord, known: object) -> Identity:
        """Checks one file; returns its size, times, device and inode. ``known`` is the stamp of the last check."""
        path = listing.directory / name
        if not is_file_name(name):
            raise BundleIntegrityError(
                f"{listing.manifest} lists {name!r}, which is not the name of a file", listing.fix
            )
        try:
            identity = self._identity(path)
        except OSError as error:
            raise BundleIntegrityError(f"{path} is missing, though {listing.manifest} lists it", listing.fix) from error
        problem = ""
        if identity[0] != record.size:
            problem = f"expected {record.size} bytes, got {identity[0]}"
        elif known != _stamp(identity, record):
            sha256, identity = self.hash(path)
            if sha256 != record.sha256:
                problem = f"expected the SHA-256 {record.sha256}, got another one"
        else:
            return identity
        if problem:
            raise BundleIntegrityError(f"{path} does not match {listing.manifest}: {problem}", listing.fix)
        if path.suffix == ".onnx":
            _check_external_data(listing, path)
        return identity

    def hash(self, path: Path) -> tuple[str, Identity]:
        """Hashes a file; returns its SHA-256 and its identity, and records both for :meth:`check_unchanged`.

        The identity is the file's size, times, device and inode.

        Raises:
            BundleIntegrityError: The file changes while it is read, or is no regular file.
            OSError: The file cannot be read.
        """
        self._note_directory(path.parent)
        before = self._identity(path)
        time.sleep(min(max(before[2] + CLOCK_STEP_NS - time.time_ns(), 0), CLOCK_STEP_NS) / 1e9)
        sha256 = sha256_of(path)
        if self._identity(path) != before:
            raise BundleIntegrityError(f"{path} changed while it was read", RELOAD)
        self._files[path] = before, sha256
        return sha256, before

    def sha256(self, path: Path) -> str:
        """Returns the SHA-256 of a file that was checked; empty for any other file."""
        return self._files[path][1] if path in self._files else ""

    def check_unchanged(self) -> None:
        """Checks that no file was changed or replaced since its check; call it when all files are opened.

        A file whose size, times, device or inode changed is hashed again. If :attr:`strict` is True, such a change is
        an error even if the hash is the same.

        Raises:
            BundleIntegrityError: A file is not the file that was checked.
        """
        for path, (identity, sha256) in self._files.items():
            try:
                if self._identity(path) == identity or not (self.strict or sha256_of(path) != sha256):
                    continue
            except OSError:  # it was removed
                pass
            raise BundleIntegrityError(f"{path} was changed while the bundle was loaded", RELOAD)
        for directory, before in self._directories.items():
            if self.strict and _directory_identity(directory) != before:
                raise BundleIntegrityError(f"the files of {directory} changed while the bundle was loaded", RELOAD)

    def _identity(self, path: Path) -> Identity:
        """Returns size, times, device and inode of a regular file.

        Raises BundleIntegrityError if it is not a regular file, and OSError if it does not exist.
        """
        found = path.lstat() if self.strict else path.stat()
        if not stat.S_ISREG(found.st_mode):
            link = stat.S_ISLNK(found.st_mode)
            raise BundleIntegrityError(
                f"expected {path} to be a regular file, got {'a symbolic link' if link else 'something else'}",
                "copy the bundle with its files in place of links (cp -rL)" if link else "copy the bundle again",
            )
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_dev, found.st_ino

    def _note_directory(self, directory: Path) -> None:
        if self.strict:
            self._directories.setdefault(directory, _directory_identity(directory))


def check_unlisted(listing: Listing) -> None:
    """Checks that the directory of a listing contains no other files.

    Raises:
        BundleIntegrityError: The directory has a file that the listing does not name. The manifest, and the file of
            stamps (records of earlier checks), need not be listed.
    """
    known = {*listing.files, listing.manifest, STAMPS}
    for path in sorted(listing.directory.rglob("*")):
        name = path.relative_to(listing.directory).as_posix()
        if name not in known and (path.is_symlink() or not path.is_dir()):
            raise BundleIntegrityError(
                f"{path} is not listed in {listing.manifest}, so it is never loaded", f"remove it, or {listing.fix}"
            )


def _check_external_data(listing: Listing, path: Path) -> None:
    """Raises BundleIntegrityError if a graph names external data that the manifest does not list."""
    listed = listing.files if listing.weights is None else listing.weights
    try:
        locations = external_locations(path)
    except ValueError as error:
        raise BundleIntegrityError(f"{path} is not an ONNX graph ({error})", listing.fix) from error
    for location in sorted(locations - set(listed)):
        raise BundleIntegrityError(
            f"{path} names the external data {location!r}, which is not listed in {listing.manifest}", listing.fix
        )


def _directory_identity(directory: Path) -> tuple[int, int, int]:
    found = directory.stat()
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _stamp(identity: Identity, record: FileRecord) -> list[Any]:
    """Makes the stamp of a file: its identity, and the hash that was checked."""
    return [*identity, record.sha256, STAMP_VERSION]


def _stamp_files(directory: Path) -> Iterator[Path]:
    """Yields the possible paths of the stamps: next to the files, and in the user's cache for read-only directories."""
    yield directory / STAMPS
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    try:
        yield cache_directory() / "verified" / f"{key}.json"
    except RuntimeError:  # no home directory
        return


def _read_stamps(directory: Path) -> dict[str, Any]:
    for path in _stamp_files(directory):
        try:
            values = read_json(path, BundleError)
            tidy(path)
            return values
        except BundleError:  # no stamps, or broken ones: every file is hashed
            continue
    return {}


def _write_stamps(directory: Path, stamps: Mapping[str, Any]) -> None:
    for path in _stamp_files(directory):
        try:
            with suppress(OutputError):  # another process writes them at this moment
                write_file(path, json.dumps(stamps).encode())
            return
        except OSError:  # read-only: the next place; without any, the files are hashed at every start
            continue
