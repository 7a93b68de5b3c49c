"""Writes the output file that is given by a flag."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2edge.errors import OutputError

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
    try:
        path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    except OSError as error:
        raise OutputError(f"{path} could not be written ({error.strerror or error})", f"give another {flag}") from error
