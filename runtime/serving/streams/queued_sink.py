"""Base classes of sinks (receivers of captions); a queue and a thread keep a slow receiver from delaying captions."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import one_line
from blip2edge.runtime.serving.streams.sources import Report

CAPACITY = 64  # captions that wait for a receiver
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between attempts; doubled each time
TIMEOUT_S = 10.0  # of one attempt
CLOSE_S = 5.0  # at the end, for the captions that still wait


@dataclass(frozen=True)
class CaptionEvent:
    """What a sink gets for each caption.

    Attributes:
        values: The JSON object to send: the object of ``watch --json``, with two more keys: ``source`` and ``time``.
        image: The captioned picture.
        seconds: Time of the frame in the video, or since the start.
    """

    values: Mapping[str, Any]
    image: Any
    seconds: float


class Sink(ABC):
    """A receiver of captions.

    Attributes:
        lost: Number of captions that were not delivered; final after :meth:`close`.
    """

    lost: int = 0

    @abstractmethod
    def put(self, event: CaptionEvent) -> None:
        """Sends a caption, or adds it to a queue of captions to send."""

    @abstractmethod
    def close(self) -> None:
        """Sends the captions that still wait, and releases the sink's resources."""


@dataclass(frozen=True)
class SinkOptions:
    """Options of sinks, besides their address.

    Attributes:
        report: Called with a sentence for the user.
        headers: HTTP headers of a webhook's requests.
    """

    report: Report
    headers: Mapping[str, str]


class RefusedError(Exception):
    """Raised if the receiver will never accept this caption."""


class TryLaterError(OSError):
    """Raised if the receiver answers that it cannot accept the caption now; the message has the answer."""


class QueuedSink(Sink):
    """Sends captions in a thread. If the queue is full, the oldest caption in it is dropped.

    A caption is sent again until the receiver accepts or refuses it. The first failure is reported; later failures are
    not, until sending works again, which is reported too.

    Args:
        name: The receiver, for messages.
        deliver: Sends a caption. If it raises an OSError, the caption is sent again later; after RefusedError or any
            other exception, the caption is dropped.
        report: Called with a sentence for the user.
    """

    def __init__(self, name: str, deliver: Callable[[CaptionEvent], None], report: Report) -> None:
        self._name, self._deliver, self._report = name, deliver, report
        self._waiting: deque[CaptionEvent] = deque()
        self._current: CaptionEvent | None = None  # taken from the queue, and not delivered yet
        self._changed = threading.Condition()
        self._ends = float("inf")  # time.monotonic
        self._dropped = 0
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="blip2edge-sink", daemon=True)
        self._thread.start()

    def put(self, event: CaptionEvent) -> None:
        """Adds a caption to the queue; never waits."""
        with self._changed:
            if len(self._waiting) == CAPACITY:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(event)
            self._changed.notify()

    def close(self) -> None:
        """Sends waiting captions for at most :data:`CLOSE_S` seconds; reports how many were not delivered."""
        with self._changed:
            self._ends = time.monotonic() + CLOSE_S
            self._changed.notify()
        self._thread.join(CLOSE_S + TIMEOUT_S)
        with self._changed:
            self.lost = self._dropped + len(self._waiting) + (self._current is not None)
        if self.lost:
            self._report(f"{self._name}: {self.lost} captions were not delivered")

    def _run(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            with self._changed:
                while not (self._current or self._waiting) and self._ends == float("inf"):
                    self._changed.wait()
                if not (self._current or self._waiting) or time.monotonic() >= self._ends:
                    return
                event = self._current = self._current or self._waiting.popleft()
            if self._try(event):
                wait = FIRST_WAIT_S
                with self._changed:
                    self._current = None
                continue
            self._pause(wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _pause(self, seconds: float) -> None:
        """Waits before the next attempt; after :meth:`close` was called, at most :data:`FIRST_WAIT_S` seconds."""
        with self._changed:
            if self._ends == float("inf"):
                self._changed.wait_for(lambda: self._ends < float("inf"), seconds)
            else:
                self._changed.wait(max(0.0, min(FIRST_WAIT_S, self._ends - time.monotonic())))

    def _try(self, event: CaptionEvent) -> bool:
        """Tries to send a caption; returns whether it is done: True if it was accepted or refused, else False."""
        try:
            self._deliver(event)
        except OSError as error:
            if not self._failing:
                answered = isinstance(error, TryLaterError)
                problem = one_line(error) if answered else f"cannot be reached ({one_line(error)})"
                self._report(f"{self._name}: {problem}; trying again")
            self._failing = True
            return False
        except Exception as error:  # noqa: BLE001 - reported, and the thread goes on
            if not self._failing:
                kind = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
                self._report(f"{self._name}: a caption was refused ({kind}{one_line(error)})")
            self._failing = True
            with self._changed:
                self._dropped += 1
            return True
        if self._failing:
            self._report(f"{self._name}: captions are delivered again")
        self._failing = False
        return True
