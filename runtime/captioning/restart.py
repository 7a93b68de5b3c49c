"""Loads a bundle again when its engine is broken, for a server that runs for a long time."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from blip2edge.bundle.prompt_spec import INTERLEAVED
from blip2edge.errors import EngineFaultError, one_line
from blip2edge.runtime.captioning.assemble import LoadedBundle
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.engine_check import KnownGoodRequest
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.decoding.options import GenerationOptions

log = logging.getLogger(__name__)

CHECK_S = 120.0
"""Seconds to wait for the answer to a test request, and for a broken engine's threads to end."""

Loaded = TypeVar("Loaded", bound=LoadedBundle)


class HangError(Exception):
    """Raised if the engine hangs: it neither answers nor fails, and Python cannot end its threads."""


@dataclass(frozen=True)
class Backoff:
    """The waiting times before the engine is loaded again: by default 1, 2, 4 … 60 s.

    Attributes:
        first_s: Seconds before the first attempt; the wait doubles with each further attempt.
        most_s: Longest wait in seconds.
        attempts: Number of attempts to load the bundle. After the first result of a loaded engine, the count restarts.
    """

    first_s: float = 1.0
    most_s: float = 60.0
    attempts: int = 8

    def seconds(self, attempt: int) -> float:
        """Returns the seconds to wait before an attempt; the first attempt has the number 0."""
        return min(self.first_s * 2.0**attempt, self.most_s)


class Restarting(Generic[Loaded]):
    """Loads a bundle again when its engine is broken. Subclasses implement :meth:`_replace`.

    Args:
        load: Loads the bundle again. If None, the bundle is not loaded again, and all later requests fail.
        backoff: The waiting times between attempts.

    Attributes:
        state: ``ok``; ``restarting`` while the bundle is loaded again; ``failed`` if it is not loaded again.
        restarts: Number of times that the bundle was loaded again.
        problem: The last error of the engine in one line; empty if there was none.
        gave_up: Called once when no further attempt is made, because all attempts failed or the engine hangs.
    """

    def __init__(self, load: Callable[[], Loaded] | None, backoff: Backoff) -> None:
        self._load, self._backoff = load, backoff
        self._closed = threading.Event()
        self._faults = 0  # in a row, without a result in between
        self.state, self.restarts, self.problem = "ok", 0, ""
        self.gave_up: Callable[[], None] = lambda: None

    def succeeded(self) -> None:
        """Sets the number of attempts to 0; call it when the engine has made a result."""
        self._faults = 0

    def _check_state(self) -> None:
        """Raises EngineFaultError if the engine is broken, or is being loaded again."""
        if self.state != "ok":
            raise EngineFaultError

    def _broken(self, error: BaseException) -> None:
        """Sets the state after a fault: ``restarting``, or ``failed`` if the bundle cannot be loaded again."""
        self.problem = _problem(error)
        self.state = "failed" if self._load is None else "restarting"
        log.warning("the engine failed (%s)", self.problem)

    def _load_again(self, load: Callable[[], Loaded], broken: Loaded) -> None:
        """Closes the broken bundle and loads it again, until an engine works or all attempts have failed."""
        try:
            broken.close()
        except Exception as error:  # noqa: BLE001 - the engine may fail in any way
            log.warning("the broken engine could not be released (%s)", _problem(error))
        while self._faults < self._backoff.attempts:
            self._faults += 1
            if self._closed.wait(self._backoff.seconds(self._faults - 1)):
                return
            try:
                self._replace(load())
            except HangError as error:
                self._give_up(str(error))
                return
            except Exception as error:  # noqa: BLE001 - whatever it is, the next attempt may succeed
                self.problem = _problem(error)
                log.warning("the engine could not be loaded (%s)", self.problem)
                continue
            self.restarts += 1
            self.state = "ok"
            log.warning("the engine is loaded again")
            return
        self._give_up(self.problem)

    def _give_up(self, problem: str) -> None:
        self.problem = problem
        log.warning("the engine is not loaded again (%s)", problem)
        self.state = "failed"
        self.gave_up()

    def _replace(self, loaded: Loaded) -> None:
        """Checks a loaded bundle with a test request, then uses it in place of the broken bundle.

        If the test request fails, the loaded bundle is closed.

        Raises:
            HangError: There is no answer after :data:`CHECK_S` seconds. The bundle is not closed: its graph still runs.
        """
        raise NotImplementedError


class RestartingCaptioner(Restarting[Captioner]):
    """A captioner and its scheduler; both are replaced when the scheduler finds the engine broken.

    Args:
        captioner: A loaded bundle.
        load, backoff: Arguments of :class:`Restarting`.
        **scheduling: Arguments of ``Captioner.scheduler``.

    Attributes:
        captioner, scheduler: The captioner and the scheduler in use; both are new after each restart.
    """

    def __init__(
        self, captioner: Captioner, load: Callable[[], Captioner] | None, backoff: Backoff, **scheduling: Any
    ) -> None:
        super().__init__(load, backoff)
        self._scheduling = scheduling
        self._hung = False  # the scheduler's threads do not end
        self._thread: threading.Thread | None = None
        self.captioner, self.scheduler = captioner, self._scheduled(captioner)

    def _scheduled(self, captioner: Captioner) -> Scheduler:
        return captioner.scheduler(
            known_good=None if self._load is None else known_good(captioner),
            on_failure=self._failed,
            **self._scheduling,
        )

    def ready(self) -> Scheduler:
        """Returns the scheduler in use.

        Raises:
            EngineFaultError: The engine is broken, or is being loaded again.
        """
        self._check_state()
        return self.scheduler

    def close(self) -> None:
        """Cancels open requests, and stops an attempt to load the bundle again."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()  # it may be putting another scheduler in place
        if not self._hung:
            self.scheduler.close()

    def _failed(self, error: BaseException) -> None:
        """Begins to load the bundle again; called by a thread of the scheduler that has closed itself."""
        cause = error.__cause__ if isinstance(error, EngineFaultError) and error.__cause__ is not None else error
        self._broken(cause)
        if self._load is not None:
            thread = threading.Thread(target=self._restart, args=(self._load,), name="blip2edge-restart", daemon=True)
            thread.start()
            self._thread = thread  # after its start: `close` joins it

    def _restart(self, load: Callable[[], Captioner]) -> None:
        if _closed(self.scheduler, CHECK_S):
            self._load_again(load, self.captioner)
        else:
            self._hung = True
            self._give_up(f"the engine has not ended within {CHECK_S:g} s")

    def _replace(self, loaded: Captioner) -> None:
        try:
            test = known_good(loaded)
            scheduler = loaded.scheduler(max_batch=1, graph_lock=self._scheduling.get("graph_lock"))
            request = scheduler.submit(test.image, test.options, prompt=test.prompt)
            wait([request.future], CHECK_S)
            if not _closed(scheduler, CHECK_S if request.future.done() else 0.0):
                raise HangError(f"the loaded engine gave no caption within {CHECK_S:g} s")
            request.result()
            self.captioner, self.scheduler = loaded, self._scheduled(loaded)
        except HangError:
            raise
        except BaseException:
            loaded.close()
            raise


def answers(compute: Callable[[], object]) -> None:
    """Calls ``compute`` in a thread, waits for its end, and raises its error if there is one.

    Raises:
        HangError: ``compute`` does not end within :data:`CHECK_S` seconds.
    """
    future: Future[None] = Future()

    def run() -> None:
        try:
            compute()
        except BaseException as error:  # noqa: BLE001 - the caller gets it
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name="blip2edge-check", daemon=True).start()
    wait([future], CHECK_S)
    if not future.done():
        raise HangError(f"the engine gave no answer within {CHECK_S:g} s")
    future.result()


def _problem(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"


def _closed(scheduler: Scheduler, seconds: float) -> bool:
    """Closes a scheduler; returns whether its threads ended within ``seconds``. If not, the engine hangs."""
    thread = threading.Thread(target=scheduler.close, name="blip2edge-close", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def known_good(captioner: Captioner) -> KnownGoodRequest:
    """Makes a test request that every working engine of the bundle answers: two tokens for a grey picture."""
    options: GenerationOptions = captioner.options(max_new_tokens=2, min_new_tokens=0, num_beams=1)
    spec = captioner.prompts.spec
    return KnownGoodRequest(options, prompt=None if spec.kind == INTERLEAVED else "a")
