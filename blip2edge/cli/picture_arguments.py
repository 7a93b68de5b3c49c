"""The pictures that the words of a command line name.

A word is a file, a folder, a glob pattern, a web address, a pipe, or ``-`` for standard input.
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

from blip2edge import __version__
from blip2edge.errors import ImageError, UsageError
from blip2edge.picture_files import PICTURE_SUFFIXES, visible_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Any

    from blip2edge.runtime.images.preprocess import ImageSource

IMAGE_HELP = "picture: a file, a folder, a glob pattern in quotes, an http(s) address, or - for standard input"

STANDARD_INPUT = "-"
WEB = ("http://", "https://")
TIMEOUT_S = 30.0  # without any byte from a web server
MAX_DOWNLOAD = 128 << 20  # bytes


@dataclass(frozen=True)
class Picture:
    """A picture of the command line.

    Attributes:
        name: The file's path, the address, or ``-``.
        read: Returns the bytes of the picture file; None for a path that the runtime opens itself.
    """

    name: str
    read: Callable[[], bytes] | None = None

    def __call__(self) -> bytes:
        """The bytes of the picture file."""
        return self.read() if self.read is not None else Path(self.name).read_bytes()

    @property
    def source(self) -> ImageSource:
        """What the runtime takes: the path, or this object, which is called when the picture is decoded."""
        return self.name if self.read is None else self


def find_pictures(words: Iterable[str], *, videos: bool = False) -> list[Picture]:
    """Finds the pictures that the words name, in the words' order; those of a folder in the order of their names.

    Standard input and pipes are read here, because they can be read only once. Web addresses are read when the
    runtime asks for the bytes. A pipe without bytes, a folder without pictures and a pattern that matches no file
    become a picture that cannot be read, so that they fail alone.

    Args:
        words: The arguments IMAGE.
        videos: Whether the model takes videos; a folder is then one video, whose frames are its files.

    Raises:
        UsageError: Standard input is named twice.
    """
    listed = list(words)
    if listed.count(STANDARD_INPUT) > 1:
        raise UsageError("expected - once, because standard input can be read only once", "name it once")
    return [picture for word in listed for picture in _named(word, videos)]


def _named(word: str, videos: bool) -> Iterator[Picture]:
    if word == STANDARD_INPUT:
        yield _read_once(word, sys.stdin.buffer.read)
    elif word.lower().startswith(WEB):
        yield Picture(word, partial(download, word))
    elif _is_pipe(word):
        yield _read_once(word, Path(word).read_bytes)
    elif os.path.isdir(word) and not videos:
        yield from _of_folder(word)
    elif not os.path.lexists(word) and glob.has_magic(word):
        yield from _of_pattern(word, videos)
    else:
        yield Picture(word)


def _is_pipe(word: str) -> bool:
    """Whether the word is a named pipe or a socket, such as ``/dev/stdin`` or the shell's ``<(command)``."""
    try:
        mode = os.stat(word).st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _read_once(name: str, read: Callable[[], bytes]) -> Picture:
    try:
        content = read()
    except OSError as error:
        return _unreadable(name, f"{name}: cannot be read ({error.strerror or error})")
    if not content:
        return _unreadable(name, f"{name}: expected the bytes of a picture file, got none")
    return Picture(name, lambda: content)


def _unreadable(name: str, problem: str, fix: str | None = None) -> Picture:
    """A picture whose reading raises ImageError."""

    def read() -> bytes:
        raise ImageError(problem, fix)

    return Picture(name, read)


def _of_folder(word: str) -> list[Picture]:
    found = [str(path) for path in visible_files(Path(word)) if path.suffix.lower() in PICTURE_SUFFIXES]
    if not found:
        suffixes = ", ".join(sorted(PICTURE_SUFFIXES))
        problem = f"{word}: expected a folder of pictures ({suffixes}), found none"
        return [_unreadable(word, problem, "name a folder that contains pictures")]
    return [Picture(path) for path in found]


def _of_pattern(word: str, videos: bool) -> list[Picture]:
    """The files that match a glob pattern; ``**`` matches any number of folders."""
    matches = sorted(glob.glob(word, recursive=True))
    if not videos:
        any_suffix = not glob.has_magic(os.path.splitext(word)[1] or "*")  # photos/*.jpg names the suffix itself
        matches = [
            path
            for path in matches
            if os.path.isfile(path) and (any_suffix or os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES)
        ]
    if not matches:
        problem = f"{word}: no picture matches this pattern"
        return [_unreadable(word, problem, "check the folder and the suffix in the pattern")]
    return [Picture(path) for path in matches]


def download(address: str) -> bytes:
    """Reads the bytes behind a web address.

    Raises:
        ImageError: The address is not valid, the server does not answer or answers with an error, or the file is
            larger than `MAX_DOWNLOAD`.
    """
    import http.client
    import urllib.error
    import urllib.request

    headers = {"User-Agent": f"blip2edge/{__version__}"}
    try:
        request = urllib.request.Request(address, headers=headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            return _limited(address, answer)
    except urllib.error.HTTPError as error:
        with error:
            raise _not_downloaded(address, f"the server answered {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _not_downloaded(address, error.reason) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _not_downloaded(address, error) from error


def _not_downloaded(address: str, reason: object) -> ImageError:
    return ImageError(f"{address}: cannot be downloaded ({reason})", "check the address")


def _limited(address: str, answer: Any) -> bytes:
    content: bytes = answer.read(MAX_DOWNLOAD + 1)
    if len(content) > MAX_DOWNLOAD:
        raise ImageError(f"{address}: expected at most {MAX_DOWNLOAD >> 20} MiB, got more")
    return content
