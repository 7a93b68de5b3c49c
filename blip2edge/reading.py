"""Reads files that others wrote: every fault of a file becomes one declared error that names the file.

On a broken file, parsers raise many kinds of exceptions: ``RecursionError``, ``OverflowError``, ``struct.error``,
``zlib.error`` and more, and libraries in Rust panic. :func:`reading` turns all of them into an error of this project.
It guards the call of a parser only, so that a fault of our own code is not taken for a fault of the file.
:func:`checking` is for our checks of parsed values: it turns only their ``ValueError`` into that error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from blip2edge.errors import Blip2EdgeError, one_line
from blip2edge.special_files import open_file

MANIFEST_BYTES = 64 << 20
"""Largest size in bytes of a manifest, a config or another JSON file that describes something (64 MiB)."""

DATA_BYTES = 4 << 30
"""Largest size in bytes of a JSON file of a data set (4 GiB); the annotations of VQA have 0.4 GB."""

CHUNK = 16 << 20  # bytes read at a time

MAX_DEPTH = 100
"""Most levels of lists and objects in a JSON value. More would exhaust the stack of code that walks through them."""

SEPARATORS = (",", ";", "\t", "|")
"""Separators of the columns that programs write into tables."""

READ_FIX = "check the path and the file's permissions"

CONFIG_ERROR = "config.json: "  # begins the errors of the values of a config
_PANIC = "PanicException"  # of libraries in Rust: a BaseException, which `except Exception` does not catch
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Explain = Callable[[Exception], "Blip2EdgeError | None"]


@contextmanager
def reading(
    path: str | Path,
    form: str,
    error: type[Blip2EdgeError],
    fix: str | None = "copy the file again",
    *,
    missing: Blip2EdgeError | None = None,
    explain: Explain | None = None,
) -> Iterator[None]:
    """Turns every exception that a parser raises in the block into a declared error.

    Errors of this project and an interrupt pass unchanged.

    Args:
        path: The file, or another name of the source, for the error.
        form: What the file should be: ``JSON``, ``a safetensors file``.
        error: Class of the error.
        fix: What the user can do about a broken file.
        missing: The error for a file that does not exist; None for an error with the system's reason.
        explain: Function that makes a better error for some exceptions, and returns None for all other exceptions.

    Raises:
        Blip2EdgeError: The class ``error``: the file cannot be opened, or is not of this form.
    """
    try:
        yield
    except Blip2EdgeError:
        raise
    except Exception as found:
        better = missing if isinstance(found, FileNotFoundError) else None
        if better is None and explain is not None:
            better = explain(found)
        if better is not None:
            raise better from found
        if isinstance(found, OSError) and found.errno is not None:
            raise _unreadable(path, error, found) from found
        raise error(f"{_shown(path)} cannot be read as {form} ({_reason(found)})", fix) from found
    except BaseException as found:
        if type(found).__name__ != _PANIC:
            raise
        raise error(f"{_shown(path)} cannot be read as {form} ({one_line(found)})", fix) from found


@contextmanager
def naming_config(name: str) -> Iterator[None]:
    """Writes the path or the name of a config in place of ``config.json`` at the beginning of each error of the block.

    The code that reads the values of a config does not know which file they come from.
    """
    try:
        yield
    except Blip2EdgeError as error:
        if not error.problem.startswith(CONFIG_ERROR):
            raise
        raise error.with_problem(lambda problem: f"{name}: {problem.removeprefix(CONFIG_ERROR)}") from error


@contextmanager
def checking(
    path: str | Path,
    form: str,
    error: type[Blip2EdgeError],
    fix: str | None = "copy the file again",
    *,
    explain: Explain | None = None,
) -> Iterator[None]:
    """Turns a ``ValueError`` in the block, raised by a check of parsed values, into an error of the class ``error``.

    All other exceptions pass unchanged.

    Args:
        path: The file, or another name of the source, for the error.
        form: What the file should be, such as ``JSON``.
        error: Class of the error.
        fix: What the user can do.
        explain: Function that makes a better error, or returns None.

    Raises:
        Blip2EdgeError: The class ``error``: a value does not pass the check.
    """
    try:
        yield
    except ValueError as found:
        better = None if explain is None else explain(found)
        raise better or error(f"{_shown(path)} cannot be read as {form} ({one_line(found)})", fix) from found


def _unreadable(path: str | Path, error: type[Blip2EdgeError], found: OSError) -> Blip2EdgeError:
    return error(f"{_shown(path)} cannot be read ({found.strerror or one_line(found)})", READ_FIX)


def _shown(path: str | Path) -> str:
    """Formats a path for a message: bytes that are not UTF-8 are escaped."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _reason(found: Exception) -> str:
    """Returns the message of a parser's exception, with its class if the message alone is not clear."""
    if isinstance(found, RecursionError):
        return "its values are nested too deeply"
    if isinstance(found, MemoryError):
        return "there is not enough memory for it"
    if isinstance(found, UnicodeDecodeError):
        return f"expected UTF-8, got the byte {found.object[found.start]:#04x} at position {found.start}"
    text = one_line(found)
    return f"{type(found).__name__}: {text}" if isinstance(found, (KeyError, IndexError)) else text


def read_bytes(path: Path, limit: int) -> bytes:
    """Reads a whole file; call it inside :func:`reading`.

    Raises:
        ValueError: The file is larger than ``limit`` bytes.
        OSError: The file cannot be read.
    """
    parts: list[bytes] = []
    rest = limit
    with open_file(path) as file:
        while part := file.read(CHUNK):  # not the limit at once, which would take as much memory
            parts.append(part)
            rest -= len(part)
            if rest < 0:
                raise ValueError(f"expected at most {limit} bytes, got more")
    return b"".join(parts)


def parse_json(content: bytes | str, *, strict: bool = False) -> Any:
    """Parses JSON; call it inside :func:`reading`.

    Args:
        content: Bytes in UTF-8, with or without a byte order mark; or a text.
        strict: Whether NaN, Infinity and a repeated key in an object are errors. Use True for files of this project,
            and False for files of other programs, which may contain them.

    Raises:
        ValueError: The text is not JSON, is not UTF-8, has more than :data:`MAX_DEPTH` levels, or a text in it has half
            a surrogate pair, which cannot be written as UTF-8.
        RecursionError: The text is nested too deeply for the parser.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    if strict:
        values = json.loads(text, parse_constant=refuse_constant, object_pairs_hook=unique_keys)
    else:
        values = json.loads(text)
    _check_depth(values)
    if _SURROGATE.search(text):
        json.dumps(values, ensure_ascii=False).encode()  # UnicodeEncodeError is a ValueError
    return values


def other_separator(head: Sequence[str], separator: str) -> str | None:
    """Returns the separator that a table seems to have in place of ``separator``; None if ``separator`` seems right.

    Another separator is assumed if the first line has only one cell, and this cell contains the other separator.

    Args:
        head: Cells of the table's first line, as read with ``separator``.
        separator: The separator that the table should have.
    """
    if len(head) != 1:
        return None
    others = [each for each in SEPARATORS if each != separator and each in head[0]]
    return max(others, key=head[0].count, default=None)


def refuse_constant(name: str) -> None:
    """Refuses NaN and Infinity: ``parse_constant`` of ``json.loads``."""
    raise ValueError(f"expected a number, got {name}")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes an object, and refuses a key that is given twice: ``object_pairs_hook`` of ``json.loads``."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(one for one, other in pairwise(names) if one == other)
        raise ValueError(f"the key {twice!r:.60} is given twice")
    return values


def _check_depth(values: Any) -> None:
    level = [values] if isinstance(values, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise ValueError(f"expected at most {MAX_DEPTH} levels of lists and objects, got more")


def read_json(
    path: Path,
    error: type[Blip2EdgeError],
    fix: str | None = "copy the file again",
    *,
    missing: Blip2EdgeError | None = None,
    explain: Explain | None = None,
    limit: int = MANIFEST_BYTES,
    strict: bool = False,
) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Args:
        path: The file.
        error: Class of the error.
        fix: What the user can do about a broken file.
        missing: The error for a file that does not exist; None for an error with the system's reason.
        explain: Function that makes a better error for some exceptions, and returns None for all other exceptions.
        limit: Largest size of the file in bytes.
        strict: Whether NaN, Infinity and a repeated key in an object are errors.

    Raises:
        Blip2EdgeError: The class ``error``: the file cannot be opened, is too large, is not JSON, or holds another
            value than an object.
    """
    with reading(path, "JSON", error, fix, missing=missing, explain=explain):
        values = parse_json(read_bytes(path, limit), strict=strict)
    if not isinstance(values, dict):
        raise error(f"expected a JSON object in {_shown(path)}, got a value of type {type(values).__name__}", fix)
    return values


def read_text(path: Path, error: type[Blip2EdgeError], fix: str | None = None, *, limit: int = MANIFEST_BYTES) -> str:
    """Reads a text file in UTF-8; a byte order mark is skipped.

    Raises:
        Blip2EdgeError: The class ``error``: the file cannot be opened, is too large, or is not UTF-8.
    """
    with reading(path, "a text in UTF-8", error, fix):
        return read_bytes(path, limit).decode("utf-8-sig")
