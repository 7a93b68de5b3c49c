"""Shows the progress of long functions: a bar on a terminal, plain lines elsewhere.

A long function calls ``progress(stage, done, total)``; any callable with these arguments can be passed.
"""

from __future__ import annotations

import shutil
import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import TracebackType
    from typing import Self

REDRAW_SECONDS = 0.1  # at most ten updates a second, so that a terminal over ssh keeps up
LINE_SECONDS = 10.0  # without a terminal: at most one line in ten seconds, for a log
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


class Progress:
    """Shows progress on a text stream, by default standard error.

    A new stage name ends the line of the previous stage. Use it as a context manager, so that the last line is ended
    after an error too:

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
        self._drawn = 0.0  # s, last drawing
        self._shown: tuple[int, int] | None = None  # the state last written

    def __enter__(self) -> Self:
        """Return the reporter itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the last line."""
        self.close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that `done` of `total` units of `stage` are finished (total 0: not known)."""
        now = time.monotonic()
        fresh = stage != self._stage
        if fresh:
            self.close()
            self._stage, self._started, self._first = stage, now, done
        self._state = (done, total)
        complete = 0 < total <= done
        wait = REDRAW_SECONDS if self._terminal else LINE_SECONDS
        if fresh or complete or now - self._drawn >= wait:
            self._draw(now)

    def close(self) -> None:
        """Write the last state if it is not shown yet, and end the line; harmless when called twice."""
        if self._stage is None:
            return
        if self._shown != self._state:
            self._draw(time.monotonic())
        if self._terminal:
            self._stream.write("\n")
            self._stream.flush()
        self._stage, self._shown = None, None

    def _draw(self, now: float) -> None:
        if self._shown == self._state:
            return
        self._shown, self._drawn = self._state, now
        text = self._text(now - self._started)
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            self._stream.write(f"\r{text[: columns - 1]}\x1b[K")
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()

    def _text(self, seconds: float) -> str:
        """One line for the present state: name, bar or count, seconds since the stage began, remaining time."""
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
            return f"{self._stage}: {tail}" if done else f"{self._stage}: 0/{total}"
        filled = round(share * BAR_WIDTH)
        return f"{self._stage}  [{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {tail}"


def _duration(seconds: float) -> str:
    """Seconds as text: 8 s, 3 min, 2 h 5 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
