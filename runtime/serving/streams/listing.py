"""Lists the pictures of a folder that ``blip2edge watch`` follows."""

from __future__ import annotations

import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from blip2edge.errors import DataError
from blip2edge.picture_files import PICTURE_SUFFIXES, is_broken_link


class PictureVersion(NamedTuple):
    """A picture file in a listing of a folder, with its size and the time of its last change.

    Two objects of the same file are unequal if the file was written in between.
    """

    modified_ns: int
    name: str
    size: int


def pictures_in(folder: Path) -> set[PictureVersion]:
    """Lists the pictures of a folder; files that are removed during the listing are skipped."""
    found = set()
    try:
        for path in folder.iterdir():
            if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith("."):
                with suppress(FileNotFoundError):
                    broken = is_broken_link(path)  # a frame that fails, so that an error names it
                    status = path.lstat() if broken else path.stat()
                    if broken or stat.S_ISREG(status.st_mode):
                        found.add(PictureVersion(status.st_mtime_ns, path.name, status.st_size))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read any more ({error.strerror or error})", "check that the folder still exists"
        ) from error
    return found
