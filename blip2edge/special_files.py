"""Opens files for reading without waiting forever, also if the name is that of a pipe, a device or a socket."""

from __future__ import annotations

import errno
import os
import select
import stat
from io import BufferedReader
from pathlib import Path

WAIT_S = 60.0
"""Longest wait for the first byte of a pipe, in seconds; ``<(curl ...)`` of a shell needs a while."""


def open_file(path: str | Path) -> BufferedReader:
    """Opens a file or a named pipe for reading.

    Raises:
        OSError: The file cannot be opened, is a device, a socket or a directory, or is a pipe without a writer.
    """
    _refuse(os.stat(path).st_mode, path)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        _refuse(mode, path)  # another file may have the name now
        if stat.S_ISFIFO(mode):
            _wait(descriptor, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse(mode: int, path: str | Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        kind = "socket" if stat.S_ISSOCK(mode) else "device"
        raise OSError(errno.EINVAL, f"expected a file, got a {kind}", str(path))


def _wait(descriptor: int, path: str | Path) -> None:
    """Waits for the first byte of a pipe or the end of its writer; raises TimeoutError after :data:`WAIT_S` seconds."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN | select.POLLHUP)
    if not poll.poll(WAIT_S * 1000):
        raise TimeoutError(errno.ETIMEDOUT, f"no program wrote to this pipe within {WAIT_S:.0f} s", str(path))
    os.set_blocking(descriptor, True)
