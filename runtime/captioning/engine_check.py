"""Finds out whether an exception was caused by one request or by a broken engine.

After an unexpected exception, a small grey picture is captioned alone; this is the test request. If the test request
works, only the requests of the failed batch fail. If the test request fails too, the engine is broken.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

from PIL import Image

from blip2edge.errors import BackendError, Blip2EdgeError, EngineError, EngineFaultError
from blip2edge.runtime.captioning.request import CaptionResult, Request
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.text.prompt import PromptText


@dataclass(frozen=True)
class KnownGoodRequest:
    """A small test request, which works on every engine that is not broken.

    Attributes:
        options: How to generate; two tokens are enough, because they run every graph.
        prompt: A prompt that the model accepts.
        image: A grey picture.
    """

    options: GenerationOptions
    prompt: PromptText | None = None
    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (32, 32), (128, 128, 128)))

    def request(self, number: int) -> Request:
        """Makes the request for the scheduler, with the number ``number``."""
        return Request(self.image, self.prompt, self.options, number, separate=True)


def may_be_engine_fault(error: BaseException) -> bool:
    """Returns whether a broken engine may have caused an exception; false for errors that only a request causes."""
    return isinstance(error, (BackendError, EngineError)) or not isinstance(error, Blip2EdgeError)


class EngineCheck:
    """Keeps failed requests open until a test request has shown whether the engine works.

    Args:
        known_good: The test request. If None, failed requests get their error at once, without a test.
        push_front: Puts the test request at the front of the queue.
        broken: Called if the test request fails, with an EngineFaultError whose cause is the test request's error.
    """

    def __init__(
        self,
        known_good: KnownGoodRequest | None,
        push_front: Callable[[KnownGoodRequest], Request],
        broken: Callable[[BaseException], None],
    ) -> None:
        self._known_good, self._push_front, self._broken = known_good, push_front, broken
        self._lock = threading.RLock()
        self._held: list[tuple[Request, BaseException]] = []
        self._test: Request | None = None

    def fail(self, requests: list[Request], error: BaseException) -> None:
        """Ends requests with ``error``: at once, or, if the engine may be broken, after the test request has ended."""
        if self._known_good is None or self._test in requests or not may_be_engine_fault(error):
            for request in requests:
                request.fail(error)
            return
        with self._lock:
            self._held += [(request, error) for request in requests]
            if self._test is not None:
                return
            self._test = self._push_front(self._known_good)
            self._test.future.add_done_callback(self._judge)

    def _judge(self, done: Future[CaptionResult]) -> None:
        """Ends the failed requests that were kept open, according to the result of the test request (``done``).

        If the test request worked, each failed request gets its own error. If not, the engine is broken, and all
        failed requests get an EngineFaultError.
        """
        with self._lock:
            held, self._held, self._test = self._held, [], None
        problem = None if done.cancelled() else done.exception()
        for request, error in held:
            request.fail(error if problem is None else EngineFaultError())
        if problem is not None:
            fault = EngineFaultError()
            fault.__cause__ = problem
            self._broken(fault)
