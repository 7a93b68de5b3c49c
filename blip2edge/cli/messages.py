"""Prints errors and notes as single lines on standard error."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from typing import Any

from blip2edge.errors import Blip2EdgeError, Blip2EdgeWarning, hidden
from blip2edge.packages import EXTRAS, install_command

# Options whose flag has another name.
_FLAGS = {"max_waiting": "queue"}


def flag(name: str, on: bool) -> str:  # noqa: ARG001 - a switch has no value on the command line
    """Returns the flag of an option that an error names: ``--max-new-tokens`` for ``max_new_tokens``."""
    return "--" + _FLAGS.get(name, name).replace("_", "-")


def error_line(error: Exception) -> str:
    """Returns an error as one line: what went wrong, and what the user can do."""
    if isinstance(error, Blip2EdgeError):
        return error.text(flag)
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return f"the package {package!r} is not installed; {install_command(EXTRAS[package])}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" while writing {error.filename}" if error.filename else ""
        return f"the disk is full{where}; make room and run the command again"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "memory ran out; use a smaller --batch-size or a smaller model"
    text = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {text}; run the command with --debug for the traceback"


def print_error(error: Exception) -> None:
    """Prints an error, as the line ``error: …``, to standard error.

    In a run of several processes each prints its errors, so all processes but the first name their rank.
    """
    rank, processes = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    label = f"[rank {rank}] " if rank not in ("", "0") and processes not in ("", "1") else ""
    print_note(f"error: {label}{error_line(error)}")


def print_note(line: str) -> None:
    """Prints a line to standard error, and flushes it. Credentials are hidden."""
    sys.stderr.write(f"{hidden(line)}\n")
    sys.stderr.flush()


def show_warnings() -> None:
    """Prints the warnings of blip2edge as notes, without the line of code that Python would add."""
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if isinstance(message, Blip2EdgeWarning):
            print_note(f"warning: {message.text(flag)}")
        else:
            show(message, category, *rest, **more)

    warnings.showwarning = note


class Failures:
    """Prints and counts the errors after which a command continues with the next picture.

    Args:
        kinds: Classes of these errors. An error of another class is raised.
    """

    def __init__(self, *kinds: type[Blip2EdgeError]) -> None:
        self._kinds = kinds
        self._count = 0

    def add(self, error: Blip2EdgeError) -> None:
        """Prints and counts an error whose class is in ``kinds``; raises any other error."""
        if not isinstance(error, self._kinds):
            raise error
        print_error(error)
        self._count += 1

    def exit_status(self, total: int) -> int:
        """Returns 1 if an error was counted, else 0; prints how many of `total` results failed, if several did."""
        if self._count > 1:
            print_note(f"{self._count} of {total} failed")
        return 1 if self._count else 0
