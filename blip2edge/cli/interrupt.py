"""Ends a command on SIGINT, SIGTERM and SIGHUP by an exception, so that half-written directories are removed.

An extension written in C may swallow the exception of a signal handler and then fail with its own exception. So the
signal is recorded: the exit status is then that of the signal, whatever exception ends the command.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

_received: list[int] = []


class Interrupted(BaseException):
    """Raised when a signal ends the command; `except Exception` does not catch it."""


def install() -> None:
    """Make the signals raise :class:`Interrupted`; a signal that is ignored (background jobs, nohup) stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _raise)


def exit_status() -> int | None:
    """Returns 128 plus the number of the first received signal; None if no signal was received."""
    return 128 + _received[0] if _received else None


def forget() -> None:
    """Forgets the received signals, so that the exit status is 0: a signal is the normal end of ``serve``."""
    _received.clear()


def _raise(number: int, _frame: FrameType | None) -> NoReturn:
    _received.append(number)
    raise Interrupted
