"""Credentials in the values of flags: ``{env:NAME}`` and ``{file:PATH}``.

Other users of a machine can see the command line of a program, but neither its environment nor a file that they may not
read. The values are hidden in everything that is printed (:func:`blip2edge.errors.hide`).
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from urllib.parse import quote

from blip2edge.errors import UsageError, hide

_PLACE = re.compile(r"\{(env|file):([^{}]+)\}")
FORM = "{env:NAME} or {file:PATH}"


def has_credentials(text: str) -> bool:
    """Whether a text contains ``{env:NAME}`` or ``{file:PATH}``."""
    return _PLACE.search(text) is not None


def filled_address(text: str) -> str:
    """Fills in the credentials of an address.

    A credential inside an address is percent-encoded; a credential that is the whole address is not changed.

    Raises:
        UsageError: The variable is not set, the file cannot be read, or one of them is empty.
    """
    whole = _PLACE.fullmatch(text)
    return _value(whole, encode=False) if whole else _PLACE.sub(partial(_value, encode=True), text)


def filled_text(text: str) -> str:
    """Fills in the credentials of a text, without percent-encoding.

    Raises:
        UsageError: A variable is not set, a file cannot be read, or one of them is empty.
    """
    return _PLACE.sub(partial(_value, encode=False), text)


def _value(place: re.Match[str], *, encode: bool) -> str:
    kind, name = place.groups()
    value = os.environ.get(name, "") if kind == "env" else _read(name)
    if not value:
        what = f"the environment variable {name} is not set or empty" if kind == "env" else f"{name} is empty"
        raise UsageError(f"expected a credential for {place[0]}, but {what}", "set it, and export it to this command")
    written = quote(value, safe="") if encode else value
    for secret in {value, written}:
        hide(secret)
    return written


def _read(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, ValueError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UsageError(f"{{file:{name}}} cannot be read ({reason})", "check the path and its permissions") from error
