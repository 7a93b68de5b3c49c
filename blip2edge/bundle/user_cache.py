"""The user's cache directory, for files that cannot be written into a read-only bundle."""

from __future__ import annotations

import os
from pathlib import Path

from blip2edge.errors import OutputError


class NoHomeError(OutputError, RuntimeError):
    """The user has no home directory, so there is no place for a cache."""


def cache_directory() -> Path:
    """Returns the user's cache directory: ``$XDG_CACHE_HOME/blip2edge``, or ``~/.cache/blip2edge``.

    Raises:
        NoHomeError: The user has no home directory, for example in a container whose user id has no name.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "blip2edge"
    except RuntimeError as error:
        raise NoHomeError(
            "this user has no home directory, so there is no place for cached files",
            "set XDG_CACHE_HOME to a writable directory",
        ) from error
