"""A queue of calls on a matcher, which run one after another; the matcher is loaded again when it is broken."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import Blip2EdgeError, EngineFaultError, OverloadError, one_line
from blip2edge.runtime.captioning.engine_check import may_be_engine_fault
from blip2edge.runtime.captioning.fair_lock import FairLock
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.captioning.request import Pending, expiry
from blip2edge.runtime.captioning.restart import Backoff

log = logging.getLogger(__name__)

Steps = Callable[[Matcher], Iterator[list[Any]]]
"""Makes the steps of a call: each item of the iterator is the results of one batch."""


@dataclass(eq=False, kw_only=True)
class MatchCall(Pending[list[Any]]):
    """A submitted call; its result is a list of all results of its steps.

    Attributes:
        steps: Computes it, batch by batch.
        on_piece: Called with None when the call has ended.
    """

    steps: Steps
    on_piece: Callable[[str | None], None]

    def push(self, piece: str | None) -> None:
        """Calls ``on_piece``."""
        self.on_piece(piece)


class MatchQueue:
    """Runs the calls on a matcher in the order of submission, in a thread of its own.

    Args:
        matcher: A loaded bundle.
        load: Loads the bundle again; None: a broken engine stays broken.
        backoff: Waits between attempts.
        max_waiting: Largest number of calls that wait.
        graph_lock: Held during each step, where the graphs of several bundles run one at a time.

    Attributes:
        matcher: The one in use; a new one after each restart.
        state, restarts, problem, gave_up: As of :class:`RestartingCaptioner`.
    """

    def __init__(
        self,
        matcher: Matcher,
        load: Callable[[], Matcher] | None = None,
        backoff: Backoff | None = None,
        *,
        max_waiting: int = 64,
        graph_lock: FairLock | None = None,
    ) -> None:
        self.matcher, self._load, self._backoff = matcher, load, backoff or Backoff()
        self._max_waiting, self._graph_lock = max_waiting, graph_lock or nullcontext
        self.state, self.restarts, self.problem = "ok", 0, ""
        self.gave_up: Callable[[], None] = lambda: None
        self._waiting: deque[MatchCall] = deque()
        self._running: MatchCall | None = None
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="blip2edge-match", daemon=True)
        self._thread.start()

    def ready(self) -> MatchQueue:
        """The queue itself.

        Raises:
            EngineFaultError: The engine is broken, or is being loaded again.
        """
        if self.state != "ok":
            raise EngineFaultError
        return self

    def check_room(self) -> None:
        """Raises OverloadError if the queue is full: then the pictures need not be read."""
        with self._changed:
            if len(self._waiting) >= self._max_waiting:  # canceled and expired calls do not count
                self._waiting = deque(call for call in self._waiting if not call.over)
            if len(self._waiting) >= self._max_waiting:
                raise OverloadError(f"the queue is full: {self._max_waiting} requests are waiting", "try again later")

    def submit(self, steps: Steps, *, deadline: float | None, on_piece: Callable[[str | None], None]) -> MatchCall:
        """Adds a call.

        Args:
            steps: Computes it, batch by batch; called by the queue's thread.
            deadline: Seconds from now after which the call fails if it is not finished; None for no deadline.
            on_piece: Called with None when the call has ended.

        Raises:
            EngineFaultError: The engine is broken.
            OverloadError: The queue is full, or closed.
            UsageError: As :func:`expiry`.
        """
        call = MatchCall(steps=steps, on_piece=on_piece, expires=expiry(deadline))
        with self._changed:
            self.ready().check_room()
            if self._closed.is_set():
                raise OverloadError("the server is closing", "try again later")
            self._waiting.append(call)
            self._changed.notify_all()
        return call

    @property
    def load(self) -> dict[str, int]:
        """Numbers of calls that are ``waiting`` and ``running``."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": int(self._running is not None)}

    def close(self) -> None:
        """Cancels unfinished calls and ends the thread."""
        with self._changed:
            self._closed.set()
            self._drop(MatchCall.cancel)
            self._changed.notify_all()
        self._thread.join()

    def _drop(self, finish: Callable[[MatchCall], None]) -> None:
        for call in [*self._waiting, *([] if self._running is None else [self._running])]:
            finish(call)
        self._waiting.clear()

    def _work(self) -> None:
        while not self._closed.is_set():
            with self._changed:
                while not (self._waiting or self._closed.is_set()):
                    self._changed.wait()
                if self._closed.is_set():
                    return
                call = self._running = self._waiting.popleft()
            call.queue_s = time.perf_counter() - call.submitted
            try:
                call.finish(self._computed(call))
            except Exception as error:  # noqa: BLE001 - whatever it is, the call gets it
                self._failed(call, error)
            with self._changed:
                self._running = None

    def _computed(self, call: MatchCall) -> list[Any]:
        """The results of a call; fewer if it was canceled or its deadline has passed."""
        results: list[Any] = []
        steps = call.steps(self.matcher)
        while not call.over:
            with self._graph_lock():
                batch = next(steps, None)
            if batch is None:
                break
            results += batch
        return results

    def _failed(self, call: MatchCall, error: Exception) -> None:
        """Fails a call. If a known good text fails too, the engine is broken, and the bundle is loaded again."""
        if not may_be_engine_fault(error) or (fault := self._fault(self.matcher)) is None:
            call.fail(error)
            return
        self.problem = f"{type(fault).__name__}: {one_line(fault)}"
        with self._changed:
            self.state = "failed" if self._load is None else "restarting"
            self._drop(lambda one: one.fail(EngineFaultError()))
        log.warning("the engine of a matcher failed (%s)", self.problem)
        if self._load is not None:
            self._restart(self._load)

    def _fault(self, matcher: Matcher) -> Exception | None:
        """The error of a text that every healthy engine embeds; None if there is no error."""
        try:
            with self._graph_lock():
                matcher.embed_text("a")
        except Exception as error:  # noqa: BLE001 - the engine may fail in any way
            return error
        return None

    def _restart(self, load: Callable[[], Matcher]) -> None:
        self.matcher.close()
        for attempt in range(self._backoff.attempts):
            if self._closed.wait(self._backoff.seconds(attempt)):
                return
            try:
                self.matcher = load()
            except (Blip2EdgeError, OSError, RuntimeError) as error:
                fault: Exception | None = error
            else:
                fault = self._fault(self.matcher)
                if fault is None:
                    self.restarts, self.state = self.restarts + 1, "ok"
                    return
                self.matcher.close()
            self.problem = f"{type(fault).__name__}: {one_line(fault)}" if fault is not None else ""
            log.warning("the engine of a matcher could not be loaded (%s)", self.problem)
        self.state = "failed"
        self.gave_up()
