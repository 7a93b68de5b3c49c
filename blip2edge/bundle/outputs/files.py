"""Checks, before a command begins its work, that its output file can be written; writes the file afterwards."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import locked, write_file
from blip2edge.bundle.outputs.names import check_name
from blip2edge.errors import OutputError, UsageError, option


def check_file(path: Path, name: str, *suffixes: str) -> None:
    """Checks that an output file can be written, before the work whose result it will contain.

    A pipe or a device is not checked further, and may have any name. The check leaves no file behind.

    Args:
        path: The file.
        name: The option that names the file, such as ``output``.
        *suffixes: Allowed suffixes of the file, such as ``.npy``; none for any suffix.

    Raises:
        OutputError: The folder of the file does not exist or cannot be written, the path is a folder, or another run
            writes the file.
        UsageError: The file has another suffix.
    """
    check_name(path)
    real = Path(os.path.realpath(path))
    if real.exists() and not real.is_file() and not real.is_dir():
        return
    try:
        _check_place(real)
    except OSError as error:
        raise _failed(path, error, name) from error
    if suffixes and path.suffix.lower() not in suffixes:
        raise UsageError(
            f"expected {option(name)} to be a file with the suffix {' or '.join(suffixes)}, got {path}",
            f"give a name such as {path.with_suffix(suffixes[0])}",
        )
    if not real.is_file() or os.access(real.parent, os.W_OK):
        with locked(real):
            pass


def write_output(path: Path, contents: str | bytes, name: str) -> None:
    """Writes bytes or a text (as UTF-8) to an output file.

    Args:
        path: The file.
        contents: Its whole content.
        name: The option that names the file, such as ``output``.

    Raises:
        OutputError: The file cannot be written.
    """
    check_name(path)
    try:
        _check_place(path)
        write_file(path, contents.encode() if isinstance(contents, str) else contents)
    except OSError as error:
        raise _failed(path, error, name) from error


def _check_place(path: Path) -> None:
    """Raises OSError if a file cannot be written at a path.

    The errors: the folder around it does not exist, the path is a folder, or an existing file may not be changed.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.is_file() and not os.access(path.parent, os.W_OK) and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def _failed(path: Path, error: OSError, name: str) -> OutputError:
    return output_error(path, error, f"give another {option(name)}")
