"""Writes the output file that is given by a flag."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from blip2edge.bundle.outputs.disk_errors import output_error
from blip2edge.bundle.outputs.locks import check_name, write_file

if TYPE_CHECKING:
    from pathlib import Path


def write(path: Path, contents: str | bytes, flag: str) -> None:
    """Write the output of a command to ``path``.

    Args:
        path: The file.
        contents: A text is written as UTF-8.
        flag: The flag that names the file.

    Raises:
        OutputError: It cannot be written.
    """
    check_name(path)
    try:
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        write_file(path, contents.encode() if isinstance(contents, str) else contents)
    except OSError as error:
        raise output_error(path, error, f"give another {flag}") from error
