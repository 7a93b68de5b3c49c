"""Shows the progress of long functions: a bar on a terminal, plain lines elsewhere.

A long function calls ``progress(stage, done, total)``; any callable with these arguments can be passed.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Self

REDRAW_SECONDS = 0.1  # at most ten updates a second, so that a terminal over ssh keeps up
LINE_SECONDS = 10.0  # without a terminal: at most one line in ten seconds, for a log
TICK_SECONDS = 1.0  # the time of a stage moves at least once a second, also while nothing is reported
ESTIMATE_AFTER = 2.0  # seconds of a stage before the remaining time is estimated
BAR_WIDTH = 24  # characters between the brackets

Item = TypeVar("Item")


class ProgressCallback(Protocol):
    """The type of the argument ``progress`` of long functions."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of `stage` are finished."""


def counted(items: Iterable[Item], total: int, progress: Callable[[int, int], None] | None) -> Iterator[Item]:
    """Yields the items; reports the number of finished items before each item and at the end.

    Args:
        items: The items of one stage.
        total: Number of items.
        progress: Called with the number of finished items and ``total``; None for no reports.
    """
    if progress is None:
        yield from items
        return
    for done, item in enumerate(items):
        progress(done, total)
        yield item
    progress(total, total)


def _silent(stage: str, done: int, total: int) -> None:
    """Reports nothing."""


_TRANSFERS: ContextVar[Callable[[], AbstractContextManager[ProgressCallback]]] = ContextVar(
    "transfers", default=lambda: nullcontext(_silent)
)


@contextmanager
def showing_transfers(make: Callable[[], AbstractContextManager[ProgressCallback]]) -> Iterator[None]:
    """Shows the progress of downloads and uploads in the block.

    A download starts inside any function that opens a bundle, so these functions have no argument ``progress`` for it.

    Args:
        make: Called at the beginning of each transfer; returns its reporter as a context manager, such as
            :class:`Progress`.
    """
    token = _TRANSFERS.set(make)
    try:
        yield
    finally:
        _TRANSFERS.reset(token)


def transfer_progress() -> AbstractContextManager[ProgressCallback]:
    """Returns the reporter of one download or upload; it reports nothing outside :func:`showing_transfers`."""
    return _TRANSFERS.get()()


def report_bytes(report: ProgressCallback, what: str, done: int, total: int) -> None:
    """Reports the progress of a transfer in kB or MB.

    Args:
        report: The reporter.
        what: What is transferred, such as ``downloading org/name``.
        done: Number of bytes that are transferred.
        total: Number of bytes of the whole transfer.
    """
    unit, size = ("MB", 1_000_000) if total >= 10_000_000 else ("kB", 1000)
    report(f"{what}, {unit}", done // size if done < total else -(-total // size), -(-total // size))


class Progress:
    """Shows progress on a text stream, by default standard error.

    A new stage name ends the line of the previous stage. Use this class as a context manager: then the last line is
    ended after an error too, and the displayed time goes on while nothing is reported, such as while a graph is traced:

        with Progress() as progress:
            export_checkpoint(source, target, progress=progress)

    Args:
        stream: The stream to draw on.
        terminal: Whether to draw a bar on one line; by default, whether `stream` is a terminal.
        unit: What is counted, to show how many are done in a second; empty to show no rate.
    """

    def __init__(self, stream: TextIO | None = None, *, terminal: bool | None = None, unit: str = "") -> None:
        self._stream = sys.stderr if stream is None else stream
        self._terminal = self._stream.isatty() if terminal is None else terminal
        self._stage: str | None = None
        self._unit = unit
        self._state = (0, 0)  # done, total
        self._first = 0  # done when the stage began: what an earlier run did
        self._started = 0.0  # s, of the stage
        self._completed: float | None = None  # s, when all units of the stage were done
        self._drawn = 0.0  # s, last drawing
        self._shown: tuple[int, int] | None = None  # the state last written
        self._lock = threading.RLock()
        self._ended = threading.Event()

    def __enter__(self) -> Self:
        """Return the reporter itself."""
        threading.Thread(target=self._tick, name="progress", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the last line."""
        self._ended.set()
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of `stage` are finished (total 0: not known)."""
        with self._lock:
            now = time.monotonic()
            fresh = stage != self._stage
            if fresh:
                self.close()
                self._stage, self._started, self._first, self._completed = stage, now, done, None
            self._state = (done, total)
            complete = 0 < total <= done
            if complete and self._completed is None:
                self._completed = now
            if self._shown != self._state and (fresh or complete or self._due(now)):
                self._draw(now)

    def note(self, line: str) -> None:
        """Write a line of its own above the bar, such as the loss of a training step."""
        with self._lock:
            self._stream.write(f"\r{line}\x1b[K\n" if self._terminal else f"{line}\n")
            if self._terminal and self._stage is not None:
                self._draw(time.monotonic())
            self._stream.flush()

    def close(self) -> None:
        """Write the last state if it is not shown yet, and end the line; harmless when called twice."""
        with self._lock:
            if self._stage is None:
                return
            if self._shown != self._state:
                self._draw(time.monotonic())
            if self._terminal:
                self._stream.write("\n")
                self._stream.flush()
            self._stage, self._shown = None, None

    def _due(self, now: float) -> bool:
        """Whether enough time has passed since the last drawing to draw again."""
        return now - self._drawn >= (REDRAW_SECONDS if self._terminal else LINE_SECONDS)

    def _tick(self) -> None:
        """Draws the current stage again and again with the new time, until the work has ended."""
        while not self._ended.wait(TICK_SECONDS):
            with self._lock:
                now, (done, total) = time.monotonic(), self._state
                if self._stage is not None and not 0 < total <= done and self._due(now):
                    self._draw(now)

    def _draw(self, now: float) -> None:
        self._shown, self._drawn = self._state, now
        text = self._text((now if self._completed is None else self._completed) - self._started)
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r{text[: columns - 1]}\x1b[K")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _text(self, seconds: float) -> str:
        """Writes one line for the current state: name, bar or count, seconds since the stage began, remaining time."""
        done, total = self._state
        if total <= 0:
            return f"{self._stage}: {done}" if done else f"{self._stage} …"
        share = min(max(done / total, 0.0), 1.0)
        tail = f"{done}/{total}  {seconds:.1f} s"
        new = done - self._first
        if self._unit and new > 0 and seconds > 0:
            tail += f", {new / seconds:.3g} {self._unit}/s"
        if new > 0 and done < total and seconds >= ESTIMATE_AFTER:
            tail += f", about {_duration(seconds * (total - done) / new)} left"
        if not self._terminal:
            return f"{self._stage}: {tail}" if done or seconds >= TICK_SECONDS else f"{self._stage}: 0/{total}"
        filled = round(share * BAR_WIDTH)
        return f"{self._stage}  [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {tail}"


def _duration(seconds: float) -> str:
    """Formats seconds: 8 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
