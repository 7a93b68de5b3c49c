"""SIGINT and SIGTERM end a command by an exception, so that half-written directories are removed on the way out.

An extension written in C may swallow the exception that a handler raises and fail with one of its own. What came is
therefore kept, and whatever exception ends the command then, it ended by the signal.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

_received: list[int] = []


class Interrupted(BaseException):
    """A signal asks the command to end; no `except Exception` holds it up."""


def install() -> None:
    """Let both signals raise :class:`Interrupted`; one that was ignored (a shell's background job) stays so."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def exit_status() -> int | None:
    """128 and the number of the first signal that came; None where none did."""
    return 128 + _received[0] if _received else None


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise Interrupted
