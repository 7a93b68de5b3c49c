"""Decides, when a picture cannot be read, whether the picture is broken or its storage fails.

For a broken picture, the output has a row with the reason. If a storage fails (a broken disk, too many open files,
expired credentials), no picture can be read. Then the read is tried again, and after the last attempt the run ends; the
run can be resumed. A web server that fails does not end the run, because a list may name thousands of servers. After
the last attempt, a picture of such a server counts as broken.
"""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from blip2edge.errors import DataError, ImageError, one_line
from blip2edge.reading import reading

T = TypeVar("T")

ATTEMPTS = 3
"""Number of attempts to read a picture from a storage or a web server that fails."""

PAUSE_S = 1.0  # before the second attempt, twice as long before the third
_OF_THE_FILE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL}
_OF_A_LOCAL_FILE = {errno.EACCES, errno.EPERM}  # in an object store: credentials
STORAGE_FIX = "make the storage readable, and run the same command again: the run goes on from here"
"""What the user can do about a :class:`StorageError`."""


class StorageError(DataError):
    """Raised if a disk or an object store fails; the picture itself may be undamaged."""


@contextmanager
def reading_picture(path: str, form: str = "a picture", faults: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turns every error in the ``with`` block into an ImageError or a StorageError.

    Args:
        path: The file, for the error message.
        form: What the file should be, such as "a Parquet file", for the error message.
        faults: Exceptions of a parser that mean a damaged file, besides a ValueError and an OSError without ``errno``.

    Raises:
        ImageError: There is no such file, or the file is cut off, too large or damaged.
        StorageError: The storage fails.
    """

    def explain(error: Exception) -> StorageError | None:
        if isinstance(error, OSError):
            of_parser = bool(faults) and type(error) is OSError and error.errno is None
            known = _OF_THE_FILE if "://" in path else _OF_THE_FILE | _OF_A_LOCAL_FILE
            broken = of_parser or isinstance(error, FileNotFoundError) or error.errno in known
        else:
            broken = isinstance(error, (ValueError, *faults))  # not a TypeError: a client that is closed raises it too
        return None if broken else StorageError(f"{path} cannot be read ({one_line(error)})", STORAGE_FIX)

    with reading(path, form, ImageError, explain=explain):
        yield


def with_attempts(read: Callable[[], T]) -> T:
    """Calls ``read`` and returns its value; calls ``read`` again if the storage fails or a web server may answer later.

    Raises:
        ImageError: The picture is broken, or a web server refuses to send the picture.
        StorageError: The storage also fails in the last attempt.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return read()
        except StorageError:
            pass
        except ImageError as error:
            if not is_passing(error.__cause__):
                raise
        time.sleep(PAUSE_S * attempt)
    return read()


def is_passing(error: BaseException | None) -> bool:
    """Returns whether a later download may succeed: after a timeout, a connection error, or a status of 429 or 5xx."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code == http.client.TOO_MANY_REQUESTS or error.code >= http.client.INTERNAL_SERVER_ERROR
    if isinstance(error, urllib.error.URLError):
        unknown_host = isinstance(error.reason, socket.gaierror) and error.reason.errno == socket.EAI_NONAME
        wrong_certificate = isinstance(error.reason, ssl.SSLCertVerificationError)
        return isinstance(error.reason, OSError) and not unknown_host and not wrong_certificate
    cut_off = http.client.IncompleteRead, http.client.BadStatusLine
    return isinstance(error, (TimeoutError, ConnectionError, ssl.SSLError, *cut_off))
