"""Finds the pictures that are named on a command line.

Each word (argument IMAGE) is a file, a folder, a glob pattern, a web address, a pipe, or ``-`` for standard input.
"""

from __future__ import annotations

import glob
import os
import stat
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.errors import ImageError, UsageError
from blip2edge.picture_files import PICTURE_SUFFIXES, folder_problem, is_file_or_broken_link, visible_files
from blip2edge.runtime.images.download import WEB, download
from blip2edge.special_files import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from blip2edge.runtime.images.preprocess import ImageSource

IMAGE_HELP = "picture: a file, a folder, a glob pattern in quotes, an http(s) address, or - for standard input"

STANDARD_INPUT = "-"


class KeptBytes:
    """Reads a picture file once, and keeps its bytes until the result of the picture is printed.

    Args:
        read: Returns the bytes of the file.
    """

    def __init__(self, read: Callable[[], bytes]) -> None:
        self._read = read
        self._content: bytes | None = None

    def __call__(self) -> bytes:
        """Returns the bytes of the file."""
        if self._content is None:
            self._content = self._read()
        return self._content

    def release(self) -> None:
        """Releases the memory of the bytes."""
        self._content = None


@dataclass(frozen=True)
class PictureArgument:
    """A picture that was named on the command line.

    Attributes:
        name: The file's path, the address, or ``-``.
        kept: Reads the bytes of the file; None for a path that the runtime opens itself.
        found: Whether the picture was found in a folder or by a pattern.
        problem: Why there is no such picture, if the reason is known: an empty folder, a pattern without a match.
    """

    name: str
    kept: KeptBytes | None = None
    found: bool = False
    problem: ImageError | None = None

    @property
    def source(self) -> ImageSource:
        """The value for the runtime's argument ``image``: the path, or a function that reads the bytes."""
        from blip2edge.runtime.images.preprocess import DeferredImage

        return self.name if self.kept is None else DeferredImage(self.name, self.kept)

    def check(self) -> None:
        """Checks that there is a file, without reading it; an address or a pipe is not checked.

        Raises:
            ImageError: There is no such file.
        """
        from blip2edge.runtime.images.preprocess import check_picture_file

        if self.problem is not None:
            raise self.problem
        if self.kept is None:
            check_picture_file(self.name)

    def release(self) -> None:
        """Releases the bytes of the file; call it when the result is printed."""
        if self.kept is not None:
            self.kept.release()


def find_pictures(words: Iterable[str], *, videos: bool = False) -> list[PictureArgument]:
    """Finds the pictures that the words name, in the order of the words; the pictures of a folder are sorted by name.

    Only folders and patterns are read here. A file or address is read when the runtime decodes the picture, so that a
    picture that cannot be read does not stop the others. An empty folder, or a pattern without a match, counts as one
    picture that cannot be read.

    Args:
        words: The arguments IMAGE.
        videos: Whether the model takes videos; a folder is then one video, whose frames are its files.

    Raises:
        UsageError: Standard input is named twice.
    """
    listed = list(words)
    if listed.count(STANDARD_INPUT) > 1:
        raise UsageError(
            "expected - once, got it more than once, but standard input can be read only once", "name - only once"
        )
    return [picture for word in listed for picture in _named(word, videos)]


def _named(word: str, videos: bool) -> Iterator[PictureArgument]:
    if word == STANDARD_INPUT:
        yield PictureArgument(word, KeptBytes(_standard_input))
    elif word.lower().startswith(WEB):
        yield PictureArgument(word, KeptBytes(partial(download, word)))
    elif _is_pipe(word):
        yield PictureArgument(word, KeptBytes(partial(_read_pipe, word)))
    elif os.path.isdir(word) and not videos:
        yield from _of_folder(word)
    elif not os.path.lexists(word) and glob.has_magic(word):
        yield from _of_pattern(word, videos)
    else:
        yield PictureArgument(word)


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise ImageError("-: standard input is closed", "send the bytes of a picture file to it")
    return sys.stdin.buffer.read()


def _read_pipe(word: str) -> bytes:
    try:
        with open_file(word) as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{word}: cannot be read ({error.strerror or error})") from error


def _is_pipe(word: str) -> bool:
    """Whether the word is a named pipe or a socket, such as ``/dev/stdin`` or the shell's ``<(command)``."""
    try:
        mode = os.stat(word).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _of_folder(word: str) -> list[PictureArgument]:
    files, unreadable = visible_files(Path(word))
    found = [str(path) for path in files if path.suffix.lower() in PICTURE_SUFFIXES]
    broken = [_unlisted(str(path), problem) for path, problem in unreadable.items()]
    if not found and not broken:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        error = ImageError(
            f"{word}: expected a folder of pictures ({suffixes}), found none", "name a folder that contains pictures"
        )
        return [_unreadable(word, error)]
    return [*(PictureArgument(path, found=True) for path in found), *broken]


def _of_pattern(word: str, videos: bool) -> list[PictureArgument]:
    """Finds the files that match a glob pattern; ``**`` matches any number of folders.

    A folder of the pattern that cannot be read counts as one picture that cannot be read.
    """
    broken = [] if videos else list(_unlisted_folders(word))
    matches = sorted(glob.glob(word, recursive=True))
    if not videos:
        any_suffix = not glob.has_magic(os.path.splitext(word)[1] or "*")  # photos/*.jpg names the suffix itself
        matches = [
            path
            for path in matches
            if is_file_or_broken_link(path) and (any_suffix or os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES)
        ]
    if not matches and not broken:
        error = ImageError(f"{word}: no picture matches this pattern", "check the folder and the suffix in the pattern")
        return [_unreadable(word, error)]
    return [*(PictureArgument(path, found=True) for path in matches), *broken]


def _unlisted_folders(pattern: str) -> Iterator[PictureArgument]:
    """Yields the folders that a pattern names and that cannot be read: glob skips them silently."""
    places: set[str] = set()
    folder = os.path.dirname(pattern)
    while glob.has_magic(folder):
        places.update(glob.glob(os.path.join(folder, ""), recursive=True))
        folder = os.path.dirname(folder)
    places.add(folder or os.curdir)
    for place in sorted(places):
        try:
            os.scandir(place).close()
        except (FileNotFoundError, NotADirectoryError):
            continue  # a pattern without a match
        except OSError as error:
            yield _unlisted(place.rstrip(os.sep) or place, folder_problem(error))


def _unlisted(folder: str, problem: str) -> PictureArgument:
    return _unreadable(folder, ImageError(f"{folder}: {problem}", "check the folder's permissions"))


def _unreadable(name: str, error: ImageError) -> PictureArgument:
    def read() -> bytes:
        raise error

    return PictureArgument(name, KeptBytes(read), problem=error)
