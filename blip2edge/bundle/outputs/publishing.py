"""Publishes directories atomically: writes each under a temporary name, and renames it after all checks."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.outputs.disk_errors import disk_is_full, error_number, output_error
from blip2edge.bundle.outputs.locks import (
    KEEP,
    NEW,
    OLD,
    OWNER,
    SUFFIX,
    check_free,
    locked,
    remove,
    target_of,
)
from blip2edge.bundle.outputs.names import check_name, with_own_name
from blip2edge.errors import Blip2EdgeError, OutputError, option

AT_FDCWD = -100  # linux/fcntl.h
RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2  # linux/fs.h
UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # the last: a sandbox forbids the call


@contextmanager
def staged(target: Path, force: bool, marker: str | None = MANIFEST) -> Iterator[Path]:
    """Makes a temporary directory, which is renamed to ``target`` when the ``with`` block ends without an error.

    After an error the temporary directory is removed and ``target`` stays as it was. One run at a time writes a target;
    files of a killed run are removed first (:mod:`blip2edge.bundle.outputs.locks`).

    Args:
        target: The directory to publish.
        force: Whether an existing directory is replaced.
        marker: A file that an existing directory must hold to be replaced; None to replace any directory.

    Raises:
        OutputError: ``target`` exists and ``force`` is False, ``target`` has files but no ``marker``, another run
            writes ``target``, a file in it or a directory around it, or ``target`` cannot be written.
    """
    target = check_output(target, force, marker)
    with locked(target) as part:
        check_target(target, force, marker)  # the lock may have restored the directory of a killed run
        _check_around(target)
        staging = part / NEW
        try:
            staging.mkdir()
            yield staging
            publish(staging, target, replace=force, marker=marker)
        except Exception as error:
            if isinstance(error, Blip2EdgeError) and (isinstance(error, OutputError) or not disk_is_full(error)):
                raise
            if isinstance(error, OSError) or error_number(error) is not None:
                raise output_error(target, error) from error
            raise


def check_output(target: Path, force: bool, marker: str | None = MANIFEST, *sources: str | Path | None) -> Path:
    """Makes the checks of :func:`staged` that need no lock, so that a command fails before it loads a model.

    Args:
        target: The directory to publish, as for :func:`staged`.
        force: Whether an existing directory is replaced.
        marker: A file that an existing directory must hold to be replaced.
        *sources: Files and directories that the output is made from; it must not replace them. None and a path
            that does not exist are skipped.

    Returns:
        ``target``; a path that is ``.`` or ends with ``..`` is replaced by the path with the directory's name.

    Raises:
        OutputError: The same cases as for :func:`staged` and :func:`check_not_source`.
    """
    check_name(target)
    target = with_own_name(target)
    for source in sources:
        if source is not None and Path(source).exists():  # else a name on the hub
            check_not_source(target, Path(source))
    check_target(target, force, marker)
    return target


def scratch(staging: Path, name: str) -> Path:
    """Makes a directory for files that are not published, beside the directory that :func:`staged` made.

    The new directory is removed with the other files of the run.
    """
    folder = staging.with_name(name)
    folder.mkdir()
    return folder


def check_not_source(target: Path, source: Path) -> None:
    """Checks that an output does not replace the directory that it is made from.

    Raises:
        OutputError: Both are the same directory, or ``source`` lies in ``target``.
    """
    whole, origin = target.resolve(), source.resolve()
    if whole == origin or whole in origin.parents:
        raise OutputError(f"{target} would replace {source}, which it is made from", "give another output directory")


def check_not_inside(target: Path, source: Path) -> None:
    """Checks that an output does not lie in the directory of which it holds a copy.

    Raises:
        OutputError: ``target`` lies in ``source``.
    """
    if source.resolve() in target.resolve().parents:
        raise OutputError(f"{target} lies in {source}, which is copied into it", "give an output directory outside it")


def check_target(target: Path, force: bool, marker: str | None) -> None:
    """Raises OutputError if a directory must not be published as ``target``; names ``force`` only where it helps."""
    if target.exists() and not target.is_dir():
        what = "a file" if target.is_file() else "a device or a pipe"
        raise OutputError(f"{target} is {what}, but the output is a directory", "give another output directory")
    if not _replaceable(target, marker):
        raise _not_replaced(target, marker)
    if os.path.lexists(target) and not force:
        raise _exists(target)
    for owner in target.glob(f"*/.*{SUFFIX}/{OWNER}") if target.is_dir() else ():  # of `optimize` or `build`
        check_free(target_of(owner.parent))


def publish(fresh: Path, target: Path, *, replace: bool, marker: str | None = None) -> None:
    """Renames a finished directory to its final name.

    Another program may make a directory of this name at any moment. Such a directory is replaced only if ``replace`` is
    True and it holds ``marker``. To ensure this, a rename to a free name fails if the name exists (``renameat2`` of
    Linux). After an exchange of names, the old directory is checked, and gets its name back if it must not be replaced.

    An old directory of this name is exchanged for the new one in a single step, so that at any moment one of the two
    has the name and is complete. Where the system or the file system cannot exchange names, the old directory is
    renamed to ``.NAME.part/old`` first. If the run is killed between the two renames, the next run or ``Bundle.open``
    gives the old directory its name back.

    Args:
        fresh: The finished directory, in the directory that :func:`locked` made for ``target``.
        target: The directory's final name.
        replace: Whether an existing directory of that name is removed.
        marker: A file that the existing directory must hold; None to replace any directory.

    Raises:
        OutputError: ``target`` exists, and must not be replaced.
        OSError: ``fresh`` cannot be renamed; ``target`` stays as it was.
    """
    _flush(fresh)
    while True:
        check_target(target, replace, marker)
        if replace and os.path.lexists(target):
            if not (_exchange(fresh, target) or _rename_twice(fresh, target)):
                continue  # another program has just removed it
            replaced = fresh if os.path.lexists(fresh) else fresh.with_name(OLD)
            if not _replaceable(replaced, marker):
                _give_back(replaced, target, fresh)
                raise _not_replaced(target, marker)
            flush_names(target.parent)
            remove(replaced)
            return
        try:
            _rename_to_free(fresh, target)
        except FileExistsError:  # another program has just made it
            continue
        flush_names(target.parent)
        return


def publish_file(fresh: Path, target: Path, *, replace: bool) -> None:
    """Flushes a finished file to the disk and gives it its final name.

    Args:
        fresh: The finished file, in the directory that :func:`locked` made for ``target``.
        target: The file's final name.
        replace: Whether an existing file of that name is replaced.

    Raises:
        OutputError: ``target`` exists, and must not be replaced.
        OSError: ``fresh`` cannot be renamed; ``target`` stays as it was.
    """
    flush_file(fresh)
    try:
        if replace:
            os.replace(fresh, target)
        else:
            _rename_to_free(fresh, target)
    except FileExistsError as error:
        raise OutputError(f"another program made {target} meanwhile", "give another output") from error
    flush_names(target.parent)


def _check_around(target: Path) -> None:
    """Raises OutputError if another run replaces a directory around ``target``, such as its bundle."""
    for folder in target.absolute().parents[:2]:
        if folder.name:
            check_free(folder)


def _replaceable(directory: Path, marker: str | None) -> bool:
    """Returns whether ``--force`` may replace ``directory``.

    True if the path does not exist, or is a link, an empty directory, or a directory with the file ``marker``. If
    ``marker`` is None, any directory may be replaced. A bundle is replaced only by a bundle, whatever else is in it.
    """
    if directory.is_symlink() or not directory.exists():
        return True
    if not directory.is_dir():
        return False
    if marker is None or not any(directory.iterdir()):
        return True
    return (directory / marker).is_file() and (marker == MANIFEST or not (directory / MANIFEST).is_file())


def _exists(target: Path) -> OutputError:
    return OutputError(
        f"{target} exists", f"give another output directory, or replace it with {option('force', on=True)}"
    )


def _not_replaced(target: Path, marker: str | None) -> OutputError:
    bundle = marker != MANIFEST and (target / MANIFEST).is_file()
    found = "is a bundle" if bundle else f"contains files but no {marker}"
    return OutputError(
        f"{target} exists",
        f"give another output directory: this one {found}, so {option('force', on=True)} does not replace it",
    )


def _flush(directory: Path) -> None:
    """Writes the files of a directory to the disk: after a power cut, a renamed directory then holds its files."""
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
            flush_file(path)
    for folder in (directory, *(path for path in directory.rglob("*") if path.is_dir())):
        flush_names(folder)


def flush_file(path: Path) -> None:
    """Writes a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flush_names(directory: Path) -> None:
    """Writes the names in a directory to the disk, if the operating system supports it."""
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


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    """Calls ``renameat2``; returns False if the system or the file system does not support it with these flags.

    Raises:
        OSError: The system supports the call, and it failed.
    """
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library before glibc 2.28
        return False
    names = os.fsencode(source), os.fsencode(target)
    if function(AT_FDCWD, names[0], AT_FDCWD, names[1], flags) == 0:
        return True
    number = ctypes.get_errno()
    if number in UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(source), None, str(target))


def _exchange(fresh: Path, target: Path) -> bool:
    """Exchanges the names of two directories in one step; returns False if the file system cannot do it."""
    try:
        return _renameat2(fresh, target, RENAME_EXCHANGE)
    except FileNotFoundError:  # another program has just removed the old directory
        return False


def _rename_to_free(fresh: Path, target: Path) -> None:
    """Renames a directory to an unused name; raises FileExistsError if a file or a directory has this name."""
    if _renameat2(fresh, target, RENAME_NOREPLACE):
        return
    try:
        fresh.rename(target)  # replaces nothing but an empty directory
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from error
        raise


def _rename_twice(fresh: Path, target: Path) -> bool:
    """Renames the old directory, then the new one; returns False if there is no old directory.

    After an error, the old directory has its name again.
    """
    old = fresh.with_name(OLD)
    try:
        target.rename(old)
    except FileNotFoundError:
        return False
    try:
        _rename_to_free(fresh, target)
    except FileExistsError as error:  # another program has made it between the two renames
        raise OutputError(
            f"another program made {target} while it was replaced; the old directory is {_keep(old, target)}",
            "give another output directory",
        ) from error
    except BaseException:  # Ctrl-C too
        old.rename(target)  # where this fails, the lock keeps `old`, as the name is free
        raise
    return True


def _give_back(replaced: Path, target: Path, fresh: Path) -> None:
    """Renames a directory that must not be replaced back to its old name; raises OutputError if this fails."""
    try:
        if replaced == fresh:
            exchanged = _renameat2(fresh, target, RENAME_EXCHANGE)
        else:
            target.rename(fresh)
            replaced.rename(target)
            exchanged = True
    except OSError:
        exchanged = False
    if not exchanged and os.path.lexists(replaced):
        raise OutputError(
            f"{target} was replaced by mistake, and could not be renamed back: its files are in "
            f"{_keep(replaced, target)}",
            "rename it, and give another output directory",
        )


def _keep(directory: Path, target: Path) -> Path:
    """Gives the name ``NAME.replaced`` to a directory that cannot get its old name back; returns its path.

    If ``NAME.replaced`` exists or the rename fails, the directory stays where it is, and no run removes it.
    """
    mark, kept = directory.with_name(KEEP), target.with_name(f"{target.name}.replaced")
    mark.touch()
    try:
        _rename_to_free(directory, kept)
    except OSError:
        return directory
    mark.unlink()
    return kept
