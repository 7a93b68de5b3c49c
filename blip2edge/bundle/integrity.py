"""Checks files against the hashes in their manifest: a bundle's, an optimized copy's, an engine folder's.

Hashing gigabytes at every start is slow. So a check that passes leaves stamps, in ``.verified.json`` next to the files,
or in the user's cache if the directory is read-only. A stamp stores the checked hash and these values of the
file: size, times of modification and of status change, device and inode. A file with the same values is not hashed
again. A copy has another inode. A change of the bytes changes the time of status change, which no program can set.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.locks import tidy, write_file
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BundleError, BundleIntegrityError, OutputError
from blip2edge.progress import ProgressCallback
from blip2edge.reading import read_json

STAMPS = ".verified.json"
CHUNK = 1 << 20  # bytes hashed at a time


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


def check_files(
    directory: Path,
    files: Mapping[str, FileRecord],
    *,
    manifest: str,
    fix: str,
    use_stamps: bool = True,
    progress: ProgressCallback | None = None,
) -> None:
    """Checks that files exist and were not changed.

    Args:
        directory: Directory of the files.
        files: The expected size and hash of each file, by file name.
        manifest: Name of the manifest that lists the files, for errors.
        fix: What the user can do about a wrong file, for errors.
        use_stamps: Whether to skip the hash of a file whose stamp is unchanged; if False, every file is hashed.
        progress: Called with a file's name, the number of files done and the number of all files.

    Raises:
        BundleIntegrityError: A file is missing or was changed.
    """
    stamps = _read_stamps(directory)
    fresh: dict[str, Any] = {}
    for done, (name, record) in enumerate(files.items()):
        if progress is not None:
            progress(name, done, len(files))
        path = directory / name
        try:
            status = path.stat()
        except OSError as error:
            raise BundleIntegrityError(f"{path} is missing, though {manifest} lists it", fix) from error
        fresh[name] = _stamp(status, record)
        known = use_stamps and stamps.get(name) == fresh[name]
        problem = ""
        if status.st_size != record.size:
            problem = f"expected {record.size} bytes, got {status.st_size}"
        elif not (known or sha256_of(path) == record.sha256):
            problem = f"expected the SHA-256 {record.sha256}, got another one"
        if problem:
            raise BundleIntegrityError(f"{path} does not match {manifest}: {problem}", fix)
    if progress is not None:
        progress("verified", len(files), len(files))
    if stamps != (updated := {**stamps, **fresh}):
        _write_stamps(directory, updated)


def _stamp(status: os.stat_result, record: FileRecord) -> list[Any]:
    """Makes the stamp of a file: size, times, device and inode, and the hash that was checked."""
    times = status.st_mtime_ns, status.st_ctime_ns
    return [status.st_size, *times, status.st_dev, status.st_ino, record.sha256]


def _stamp_files(directory: Path) -> Iterator[Path]:
    """The path of the stamps: next to the files, or in the user's cache if that directory is read-only."""
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
