"""A queue of retrieval requests, which a matcher serves one by one; a broken matcher is loaded again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import EngineFaultError, OverloadError
from blip2edge.runtime.captioning.encoder import FairLock
from blip2edge.runtime.captioning.engine_check import may_be_engine_fault
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.captioning.request import Pending, expiry
from blip2edge.runtime.captioning.restart import Backoff, HangError, Restarting, answers

Steps = Callable[[Matcher], Iterator[list[Any]]]
"""Type of a function that computes a call batch by batch; each item is the list of results of one batch."""


@dataclass(eq=False, kw_only=True)
class MatchCall(Pending[list[Any]]):
    """A submitted request for retrieval; its result is a list with the results of all batches.

    Attributes:
        steps: Computes the results batch by batch; replaced by an empty generator when the call has ended.
        inputs: The list of pictures and texts that ``steps`` uses. It is emptied when the call has ended, so that all
            inputs except those of the current batch are freed at once.
        on_piece: Called with None when the call has ended.
        on_end: Called with the call when it has ended.
    """

    steps: Steps
    inputs: list[Any]
    on_piece: Callable[[str | None], None]
    on_end: Callable[[MatchCall], None]

    def push(self, piece: str | None) -> None:
        """Frees the inputs, and calls ``on_end`` and ``on_piece``; runs once, when the request has ended."""
        self.steps = _no_steps
        self.inputs.clear()
        self.on_end(self)
        self.on_piece(piece)


def _no_steps(_: Matcher) -> Iterator[list[Any]]:
    return iter(())


class MatchQueue(Restarting[Matcher]):
    """Runs calls one after another in a thread, in the order in which they were submitted.

    Args:
        matcher: A loaded bundle.
        load, backoff: As in :class:`Restarting`.
        max_waiting: Largest number of calls that wait.
        graph_lock: A lock that is acquired for each batch if the graphs of several bundles must run one at a time.

    Attributes:
        matcher: The matcher in use; a new matcher after each restart.
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
        super().__init__(load, backoff or Backoff())
        self.matcher, self._max_waiting, self._graph_lock = matcher, max_waiting, graph_lock or nullcontext
        self._waiting: deque[MatchCall] = deque()
        self._running: MatchCall | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run_calls, name="blip2edge-match", daemon=True)
        self._thread.start()

    def ready(self) -> MatchQueue:
        """Returns the queue itself.

        Raises:
            EngineFaultError: The engine is broken, or is being loaded again.
        """
        self._check_state()
        return self

    def check_room(self) -> None:
        """Raises OverloadError if the queue is full; call it before pictures are read."""
        with self._changed:
            full = len(self._waiting) >= self._max_waiting
            # `over` ends expired calls, and so removes them
            if full and sum(not call.over for call in list(self._waiting)) >= self._max_waiting:
                raise OverloadError(f"the queue is full: {self._max_waiting} requests are waiting", "try again later")

    def submit(
        self, steps: Steps, inputs: list[Any], *, deadline: float | None, on_piece: Callable[[str | None], None]
    ) -> MatchCall:
        """Adds a call.

        Args:
            steps: Computes the call's results batch by batch; it runs in the queue's thread.
            inputs: The list of pictures and texts that ``steps`` uses; it is emptied when the call has ended.
            deadline: Seconds from now after which the call fails if it is not finished; None for no deadline.
            on_piece: Called with None when the call has ended.

        Raises:
            EngineFaultError: The engine is broken.
            OverloadError: The queue is full, or closed.
            UsageError: ``deadline`` is outside its range.
        """
        call = MatchCall(steps=steps, inputs=inputs, on_piece=on_piece, on_end=self._remove, expires=expiry(deadline))
        with self._changed:
            self.ready().check_room()
            if self._closed.is_set():
                raise OverloadError("the server is closing", "try again later")
            self._waiting.append(call)
            self._changed.notify_all()
        return call

    @property
    def load(self) -> dict[str, int]:
        """Returns the numbers of calls that are ``waiting`` and ``running``."""
        with self._changed:
            return {"waiting": len(self._waiting), "running": int(self._running is not None)}

    def close(self) -> None:
        """Cancels unfinished calls and ends the thread."""
        with self._changed:
            self._closed.set()
            self._drop(MatchCall.cancel)
            self._changed.notify_all()
        self._thread.join()

    def _remove(self, call: MatchCall) -> None:
        """Removes a call that has ended from the queue, if the call still waits there."""
        with self._changed:
            if call in self._waiting:
                self._waiting.remove(call)

    def _drop(self, finish: Callable[[MatchCall], None]) -> None:
        for call in [*self._waiting, *([] if self._running is None else [self._running])]:
            finish(call)

    def _run_calls(self) -> None:
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
            del call  # an error in it may hold the pictures

    def _computed(self, call: MatchCall) -> list[Any]:
        """Computes the results of a call; stops early if the call was canceled or its deadline has passed."""
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
        """Ends a call with an error. If a test text fails too, the engine is broken, and the bundle is loaded again."""
        if not may_be_engine_fault(error) or (fault := self._fault()) is None:
            call.fail(error)
            return
        with self._changed:
            self._broken(fault)
            self._drop(lambda one: one.fail(EngineFaultError()))
        if self._load is None:
            return
        if isinstance(fault, HangError):
            self._give_up(str(fault))
        else:
            self._load_again(self._load, self.matcher)

    def _fault(self) -> Exception | None:
        """Tests the engine with a short text; returns the error, or None if the engine works."""
        try:
            self._check(self.matcher)
        except Exception as error:  # noqa: BLE001 - the engine may fail in any way
            return error
        return None

    def _check(self, matcher: Matcher) -> None:
        def embed() -> None:
            with self._graph_lock():
                matcher.embed_text("a")

        answers(embed)

    def _replace(self, loaded: Matcher) -> None:
        try:
            self._check(loaded)
        except HangError:
            raise
        except BaseException:
            loaded.close()
            raise
        self.matcher = loaded
