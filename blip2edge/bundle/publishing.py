"""Publishes directories atomically: writes each under a temporary name, and renames it after all checks."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blip2edge.bundle.manifest import MANIFEST
from blip2edge.errors import OutputError, option

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def staged(target: Path, force: bool, marker: str | None = MANIFEST) -> Iterator[Path]:
    """Makes a temporary directory, which is renamed to ``target`` when the ``with`` block ends without an error.

    After an error the temporary directory is removed and ``target`` stays as it was.

    Args:
        target: The directory to publish.
        force: Whether an existing directory is replaced.
        marker: A file that an existing directory must hold to be replaced; None to replace any directory.

    Raises:
        OutputError: ``target`` exists and ``force`` is False, ``target`` has files but no ``marker``, or ``target``
            cannot be written.
    """
    _check_target(target, force, marker)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise output_error(target, error) from error
    try:
        staging.chmod(0o755)
        yield staging
        _check_target(target, force, marker)  # another program may have written there in the meantime
        publish(staging, target, replace=force)
    except OSError as error:
        raise output_error(target, error) from error
    finally:
        _remove(staging)


def check_not_source(target: Path, source: Path) -> None:
    """Checks that an output does not replace the directory that it is made from.

    Raises:
        OutputError: Both are the same directory, or ``source`` lies in ``target``.
    """
    whole, origin = target.resolve(), source.resolve()
    if whole == origin or whole in origin.parents:
        raise OutputError(f"{target} would replace {source}, which it is made from", "give another output directory")


def publish(fresh: Path, target: Path, *, replace: bool) -> None:
    """Renames a finished directory to its final name.

    An old directory of that name is exchanged for the new one in a single step (``renameat2`` of Linux), so that after
    a crash one of the two is there, complete. On other systems the old directory is renamed first; if the new one then
    cannot be renamed, the old one gets its name back.

    Args:
        fresh: The finished directory, on the same file system as ``target``.
        target: The directory's final name.
        replace: Whether an existing directory of that name is removed.

    Raises:
        OutputError: ``target`` exists, and ``replace`` is False.
        OSError: ``fresh`` cannot be renamed; ``target`` stays as it was.
    """
    _flush(fresh)
    if not os.path.lexists(target):
        fresh.rename(target)  # fails on a directory with files that another program makes in this moment
    elif not replace:
        raise OutputError(
            f"{target} exists",
            f"give another output directory, or replace it with {option('force', on=True)}",
        )
    elif _exchange(fresh, target):
        _remove(fresh)
    else:
        _rename_twice(fresh, target)
    _flush_names(target.parent)


def _flush(directory: Path) -> None:
    """Writes the files of a directory to the disk: after a power cut, a renamed directory then holds its files."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        _flush_names(folder)


def _flush_names(directory: Path) -> None:
    """Writes the names in a directory to the disk, where the system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # Windows opens no directories
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(descriptor)


def _exchange(first: Path, second: Path) -> bool:
    """Exchanges the names of two directories in one step; False if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library before glibc 2.28
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0)


def _rename_twice(fresh: Path, target: Path) -> None:
    """Replaces a directory; after a crash between the two renames the old one is in ``TARGET.replaced.*``."""
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.replaced.", dir=target.parent))
    old = folder / target.name
    try:
        target.rename(old)
        try:
            fresh.rename(target)
        except BaseException:  # Ctrl-C too: the old directory comes back
            old.rename(target)
            raise
        _remove(old)
    finally:
        if not os.path.lexists(old):
            folder.rmdir()


def _remove(path: Path) -> None:
    """Removes a directory, or a link to one; files that cannot be removed stay."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _check_target(target: Path, force: bool, marker: str | None) -> None:
    """Raises OutputError if a directory must not be published as ``target``."""
    if os.path.lexists(target) and not force:
        raise OutputError(
            f"{target} exists",
            f"give another output directory, or replace it with {option('force', on=True)}",
        )
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file, but the output is a directory", "give another output directory")
    if marker is None or not target.exists() or (target / marker).is_file():
        return
    if any(target.iterdir()):
        raise OutputError(
            f"{target} contains files but no {marker}, so {option('force', on=True)} does not replace it",
            "give another output directory",
        )


def output_error(path: Path, error: OSError) -> OutputError:
    """Makes the error for an output path that the operating system refused to write; ``error`` is the reason."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk is full: {path} could not be written", "free space, or give another output directory"
        )
    return OutputError(f"{path} could not be written ({error.strerror or error})", "check the path and its permissions")
