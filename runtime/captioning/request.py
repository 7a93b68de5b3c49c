"""A picture on its way through the scheduler, and the stretches of work that a trace tells."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

from blip2edge.errors import DeadlineError
from blip2edge.runtime.captioning.complete import CaptionResult, Pieces
from blip2edge.runtime.captioning.encode import STAGES
from blip2edge.runtime.decoding.generate import Row
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.images.video import ItemSource
from blip2edge.runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Span:
    """A stretch of work, for a trace: the stage, its start and end (``time.perf_counter`` seconds), whose it was."""

    stage: str
    start: float
    end: float
    requests: tuple[int, ...]


@dataclass(eq=False)
class Request:
    """A picture on its way. Made by :meth:`Scheduler.submit`.

    Attributes:
        image, prompt, options: As given.
        number: Its place in the order of submission, and its random stream.
        expires: When its deadline is (``time.monotonic`` seconds); None for none.
        future: Holds the result or the error.
        on_piece: Gets the pieces of the text in place of :meth:`pieces`, from the thread that has them, and None at
            the end.
    """

    image: ItemSource
    prompt: str | None
    options: GenerationOptions
    number: int
    expires: float | None
    future: Future[CaptionResult] = field(default_factory=Future)
    stage_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    on_piece: Callable[[str | None], None] | None = None
    _pieces: queue.SimpleQueue[str | None] = field(default_factory=queue.SimpleQueue)
    _text: Pieces | None = None
    _settling: threading.RLock = field(default_factory=threading.RLock)  # several threads may end it at once

    def begin(self, tokenizer: Tokenizer) -> None:
        """Its first token is about to come."""
        self._text = Pieces(tokenizer, self.options)

    def take(self, row: Row) -> None:
        """Hands on what the row's last token adds to the text."""
        if self._text is None:
            return
        self.push(self._text.push(row.generated[-1]))
        if row.finish_reason is not None:
            self.push(self._text.flush())

    def result(self, timeout: float | None = None) -> CaptionResult:
        """Waits for the caption.

        Args:
            timeout: Seconds; None for as long as it takes.

        Raises:
            DeadlineError: It was not done in time.
            ImageError, PromptError: As of ``Captioner.caption``.
            concurrent.futures.CancelledError: It was cancelled.
        """
        return self.future.result(timeout)

    def pieces(self) -> Iterator[str]:
        """The text as it comes (beams: all at the end); errors as of :meth:`result`, after what came before."""
        while (piece := self._pieces.get()) is not None:
            yield piece
        self.future.result()

    def cancel(self) -> None:
        """Gives it up: it leaves at the next step, and its result raises CancelledError."""
        if self.future.cancel():
            self.push(None)

    @property
    def over(self) -> bool:
        """Whether nothing more needs to be done for it; a request behind its deadline fails here."""
        if not self.future.done() and self.expires is not None and time.monotonic() > self.expires:
            self.fail(DeadlineError("the caption was not done within its deadline", "allow it more seconds"))
        return self.future.done()

    def push(self, piece: str | None) -> None:
        """Hands on a piece, or None for the end."""
        if piece != "":
            (self.on_piece or self._pieces.put)(piece)

    def finish(self, result: CaptionResult) -> None:
        """Sets the result, unless it was cancelled meanwhile."""
        with self._settling:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_result(result)
        self.push(None)

    def fail(self, error: BaseException) -> None:
        """Sets the error, unless it was cancelled meanwhile."""
        with self._settling:
            if not self.future.done() and self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
        self.push(None)
