"""Locks of outputs: one run at a time writes an output, and the next run removes the files of a killed run.

While a run writes ``NAME``, its files are in the directory ``.NAME.part`` beside it:

    .NAME.part/owner   the lock: a file that the run holds with ``flock``, with its process and start time as JSON
    .NAME.part/new     the output, until it is complete and renamed to NAME
    .NAME.part/old     what NAME was before, between two renames (only where names cannot be exchanged in one step)
    .NAME.part/keep    an empty file: `old` or `new` must not be removed (another program's files, or the only copy)
    .NAME.part/...     scratch files

The system releases the lock when the process ends, also after a kill or a power cut. So a directory whose lock is free
belongs to a run that has ended: the next run of the same output renames ``old`` back and removes the rest.

Where the file system has no locks, or where it is shared over a network and the other run was on another machine, it is
not known whether that run has ended. Its files are then kept, and a warning names them.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.machine import command, machine, on_network
from blip2edge.bundle.outputs.names import check_name, with_own_name
from blip2edge.errors import Blip2EdgeWarning, OutputError

fcntl: Any = import_module("fcntl") if find_spec("fcntl") else None  # Windows has none

OWNER, NEW, OLD, KEEP = "owner", "new", "old", "keep"
SUFFIX = ".part"
LONGEST = 255 - len(f".{SUFFIX}-12345678")  # bytes of a name on Linux, without what is added here
WAIT_S = 2.0  # for another process that is between two renames
PROBE_S = 0.1  # longer than another process needs to ask whether a lock is free
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a link in place of a lock would name a file to overwrite
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EBADF)
_held: set[int] = set()  # descriptors of the locks of this process


class BusyError(OutputError):
    """Another run writes the output."""


class LeftFilesWarning(Blip2EdgeWarning):
    """Files of another run were not removed, because it is not known whether that run has ended."""


def part_of(target: Path) -> Path:
    """Returns the directory ``.NAME.part`` for the files of a run that writes ``target``."""
    target = with_own_name(target)
    name = target.name
    if len(os.fsencode(name)) > LONGEST:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
    return target.parent / f".{name}{SUFFIX}"


@contextmanager
def locked(target: Path) -> Iterator[Path]:
    """Locks an output, and makes a directory beside it for the files of this run.

    Files that a killed run of the same output left are removed first. Forked processes do not inherit the lock.

    Args:
        target: The file or directory that will be written.

    Yields:
        A directory on the file system of ``target``, which contains only the lock. It is removed at the end.

    Raises:
        BusyError: Another run writes ``target``.
        OutputError: The directory cannot be made.
    """
    try:
        part, descriptor = _acquire(target)
    except OSError as error:
        raise output_error(target, error) from error
    try:
        yield part
    finally:
        _end(part, target, descriptor)


def recover(target: Path) -> None:
    """Gives the old output its name back if a run was killed while it replaced this output.

    A replacement has two renames: the old output is renamed to ``.NAME.part/old``, then the new output gets the name.
    A run that is killed between the two leaves no file of this name. If the run between the two renames is still
    alive, this function waits. If a file of this name exists, the function does nothing.
    """
    part = part_of(target)
    end = time.monotonic() + WAIT_S
    while not os.path.lexists(target) and os.path.lexists(part / OLD) and fcntl is not None:
        try:
            descriptor = os.open(part / OWNER, os.O_RDWR | NO_LINK)
        except OSError:  # finished at this moment, or not ours to write
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same_file(descriptor, part / OWNER):  # a run that ended has just removed the file
                continue
            _recover_old(part, target)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                return
            time.sleep(0.01)
        except OSError:
            return
        finally:
            os.close(descriptor)


def tidy(target: Path) -> None:
    """Removes the files of a killed run from the directory ``.NAME.part`` of ``target``.

    A run that writes ``target`` removes such files itself; this function is for an output that no later run writes.
    """
    if part_of(target).is_dir():
        with suppress(OutputError), locked(target):
            pass


def target_of(part: Path) -> Path:
    """Returns the output of a directory ``.NAME.part``: the inverse of :func:`part_of` for names of usual length."""
    return part.with_name(part.name.removeprefix(".").removesuffix(SUFFIX))


def recover_in(directory: Path) -> None:
    """Calls :func:`recover` for each output in ``directory`` whose old content lies in ``.NAME.part/old``."""
    if directory.is_dir():
        for old in directory.glob(f".*{SUFFIX}/{OLD}"):
            recover(target_of(old.parent))


def _recover_old(part: Path, target: Path) -> None:
    """Renames ``old`` back to ``target`` if nothing has that name."""
    if os.path.lexists(part / OLD) and not os.path.lexists(target):
        with suppress(OSError):  # the directory is read-only now: `old` is kept
            (part / OLD).rename(target)


def check_free(target: Path) -> None:
    """Raises BusyError if another run writes ``target`` at this moment."""
    owner = part_of(target) / OWNER
    if fcntl is None or not owner.is_file():
        return
    try:
        descriptor = os.open(owner, os.O_RDONLY | NO_LINK)
    except OSError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(target, _read_owner(descriptor)) from None
    except OSError:  # no locks here
        return
    finally:
        os.close(descriptor)


def write_file(path: Path, content: bytes | memoryview, mode: int | None = None) -> None:
    """Writes a file so that it holds either its old content or all of the new one, also after a kill.

    The file is written under a temporary name, flushed to the disk and renamed, so other hard links of the old file
    keep their content. A symbolic link is followed. Pipes and devices are written directly.

    Args:
        path: The file.
        content: New content of the file.
        mode: Permissions of the file, also while it is written; None for the permissions of the old file, or the
            system's default for a new file.

    Raises:
        BusyError: Another run writes the file.
        OSError: The file cannot be written.
    """
    check_name(path)
    path = Path(os.path.realpath(path))
    old = path.stat().st_mode if path.exists() else stat.S_IFREG
    if stat.S_ISDIR(old):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    alone = mode is None and stat.S_IMODE(old) and path.stat().st_nlink == 1
    if not stat.S_ISREG(old) or (alone and not os.access(path.parent, os.W_OK)):
        _write_into(path, content)
        return
    part, descriptor = _acquire(path)
    try:
        fresh = part / NEW
        with open(fresh, "wb", opener=partial(os.open, mode=0o666 if mode is None else mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None or stat.S_IMODE(old):
            fresh.chmod(stat.S_IMODE(old) if mode is None else mode)
        os.replace(fresh, path)
    finally:
        _end(part, path, descriptor)


def remove(path: Path) -> None:
    """Removes a file, a directory or a link; files that cannot be removed are kept."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def _write_into(path: Path, content: bytes | memoryview) -> None:
    """Writes to a pipe, a device, or a file in a read-only directory; a pipe that no process reads is an error."""
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "wb") as file:
        os.set_blocking(descriptor, True)
        file.write(content)


def _acquire(target: Path) -> tuple[Path, int | None]:
    """Makes and locks the directory ``.NAME.part`` of a run.

    Returns the directory, and the file descriptor of the lock (None if the file system has no locks).
    """
    check_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(target)
    end = time.monotonic() + PROBE_S
    while fcntl is not None:
        with suppress(FileExistsError):
            part.mkdir()
        if part.is_symlink():
            raise OutputError(f"{part} is a link", "remove it, or give another output")
        try:
            descriptor = os.open(part / OWNER, os.O_RDWR | os.O_CREAT | NO_LINK, 0o644)
        except FileNotFoundError:  # a run that ended has just removed the directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            owner = _read_owner(descriptor)
            if not _same_file(descriptor, part / OWNER):  # a run that ended has just removed the file
                os.close(descriptor)
                continue
            _check_ours(part, owner)
            if owner.get("machine", machine()) != machine() and on_network(part):
                os.close(descriptor)
                break
            _recover_old(part, target)
            if is_kept(part):
                raise OutputError(
                    f"{part} has files of an earlier run of {target} that could not be renamed back",
                    f"move {part / OLD} or {part / NEW} to where it belongs, and remove {part / KEEP}",
                )
            _clean(part, target, keep=(OWNER,))
            _write_owner(descriptor)
        except BlockingIOError:  # also for a moment while another process asks whether the lock is free
            owner = _read_owner(descriptor)
            os.close(descriptor)
            if time.monotonic() > end:
                raise _busy(target, owner) from None
            time.sleep(PROBE_S / 10)
        except OSError as error:
            if error.errno in NO_LOCKS:
                os.close(descriptor)
                break
            _end(part, target, descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        else:
            _held.add(descriptor)
            return part, descriptor
    return _without_lock(target, part), None


def _without_lock(target: Path, part: Path) -> Path:
    """Makes a directory with a new name; the directories of other runs are not changed, and a warning names them."""
    if part.is_dir():
        with suppress(OSError):  # only the lock file that _acquire made
            if set(os.listdir(part)) <= {OWNER} and not (part / OWNER).stat().st_size:
                remove(part)
    others = sorted(str(path) for path in part.parent.glob(f"{glob.escape(part.name)}*"))
    if others:
        warnings.warn(
            f"{', '.join(others)}: files of another run, which may still be running; if no other "
            f"run writes {target}, remove them yourself",
            LeftFilesWarning,
            stacklevel=4,
        )
    return Path(tempfile.mkdtemp(prefix=f"{part.name}-", dir=part.parent))


def _clean(part: Path, target: Path, keep: tuple[str, ...]) -> None:
    """Removes a run's files, the lock file last.

    If ``target`` does not exist, the lock file and ``old`` (what ``target`` was before) stay.
    """
    if is_kept(part):
        return
    with suppress(OSError):
        names = set(os.listdir(part)) - set(keep)
        if OLD in names and not os.path.lexists(target):
            names -= {OLD, OWNER}
        for name in names - {OWNER}:
            remove(part / name)
        if OWNER in names and os.listdir(part) == [OWNER]:  # the lock stays with files that could not be removed
            remove(part / OWNER)


def is_kept(part: Path) -> bool:
    """Whether a directory holds files that no run may remove."""
    return os.path.lexists(part / KEEP) and any(os.path.lexists(part / name) for name in (OLD, NEW))


def _check_ours(part: Path, owner: dict[str, Any]) -> None:
    """Raises OutputError if this module did not make the directory, so that nothing of another program is removed."""
    if not owner and set(os.listdir(part)) - {OWNER}:
        raise OutputError(f"{part} exists, and was not made by blip2edge", "move it away, or give another output")


def _busy(target: Path, owner: dict[str, Any]) -> BusyError:
    pid, started = owner.get("pid", "unknown"), owner.get("started", "unknown")
    what = f" ({owner['command']})" if owner.get("command") else ""
    return BusyError(
        f"another run writes {target}: process {pid}{what}, started {started}",
        f"wait until it ends, stop it with kill {pid}, or give another output",
    )


def _read_owner(descriptor: int) -> dict[str, Any]:
    """Returns the JSON object that a run wrote into its lock file; empty if it has not written yet."""
    try:
        values = json.loads(os.pread(descriptor, 1 << 16, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _write_owner(descriptor: int) -> None:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    values = {"pid": os.getpid(), "started": now, "command": command(), "machine": machine()}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(values).encode(), 0)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _end(part: Path, target: Path, descriptor: int | None) -> None:
    """Removes the directory of a run, and releases its lock."""
    _recover_old(part, target)
    _clean(part, target, keep=())
    with suppress(OSError):  # another run has taken the directory over, or a file cannot be removed
        part.rmdir()
    if descriptor is not None:
        _held.discard(descriptor)
        os.close(descriptor)


def _forget_in_child() -> None:
    """Closes the locks in a forked process; otherwise a worker that outlives its parent would keep the locks."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
