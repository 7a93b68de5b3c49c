"""Many pictures at once: the next are encoded beside the words of others, and a free row is taken at the next step.

    submit --> waiting --(encoder's thread)--> ready --(decoder's thread: prefill)--> a running row --> result

Both queues are bounded. Requests are served in the order in which they came, and every step gives each running row
one token, so that none waits for another's end. One class serves ``caption_many``, ``watch`` and ``serve``.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from types import TracebackType

from blip2edge.errors import Blip2EdgeError, OverloadError, UsageError, option
from blip2edge.runtime.captioning.complete import Completer, caption_result
from blip2edge.runtime.captioning.encode import Clock, Encoded, Encoder
from blip2edge.runtime.captioning.request import Request, Span
from blip2edge.runtime.decoding.generate import Decoding
from blip2edge.runtime.decoding.options import Generated, GenerationOptions, check_number
from blip2edge.runtime.images.video import ItemSource


class Turns:
    """A lock that serves in the order in which it was asked for, so that a loop that takes it again waits its turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._line: deque[object] = deque()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """A turn: from when all who came before are done, to the end of the block."""
        mark = object()
        with self._changed:
            self._line.append(mark)
            self._changed.wait_for(lambda: self._line[0] is mark)
        try:
            yield
        finally:
            with self._changed:
                self._line.popleft()
                self._changed.notify_all()


LONGEST_DEADLINE = 1e6
"""Seconds: eleven days."""


class Scheduler:
    """Encodes, decodes and delivers requests in two threads of its own.

    Args:
        encoder: The half before the language model.
        completer: The half behind it.
        max_batch: Rows decoded together at most.
        max_waiting: Requests that wait at most, before they are encoded.
        in_turn: A graph takes all cores, and so one is run at a time, encoding and decoding in turn.
        trace: Called from both threads with every stretch of work; must be quick.

    Raises:
        UsageError: ``max_batch`` or ``max_waiting`` is below 1.
    """

    def __init__(
        self,
        encoder: Encoder,
        completer: Completer,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        in_turn: bool = False,
        trace: Callable[[Span], None] | None = None,
    ) -> None:
        if max_batch < 1 or max_waiting < 1:
            raise UsageError(
                f"{option('max_batch')} and {option('max_waiting')} must be at least 1, "
                f"not {max_batch} and {max_waiting}"
            )
        self._encoder, self._completer = encoder, completer
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._trace = trace or (lambda span: None)
        self._in_turn, self._turn = in_turn, Turns() if in_turn else nullcontext
        self._waiting: deque[Request] = deque()
        self._ready: deque[tuple[list[Request], Encoded]] = deque()
        self._running: dict[int, Request] = {}  # by the id of their rows
        self._decoding = Decoding()
        self._unsettled: dict[int, Request] = {}  # by number: without a result, wherever they are
        self._submitted = 0
        self._encoding = 0  # requests in the encoder's hands
        self._closing = False
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"blip2edge-{name}", daemon=True)
            for name, work in (("vision", self._encode), ("decode", self._decode))
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Scheduler:  # noqa: PYI034 - typing.Self is of Python 3.11
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it; what is not done is cancelled."""
        self.close()

    def submit(
        self,
        image: ItemSource,
        options: GenerationOptions,
        *,
        prompt: str | None = None,
        deadline: float | None = None,
        wait: bool = True,
        on_piece: Callable[[str | None], None] | None = None,
    ) -> Request:
        """Hands in a picture.

        Args:
            image: As ``Captioner.caption`` takes it.
            options: How to generate.
            prompt: As ``Captioner.caption`` takes it.
            deadline: Seconds from now within which the caption is of use; None for no such bound.
            wait: Wait for a place in the queue; otherwise a full queue refuses.
            on_piece: See :class:`Request`.

        Raises:
            OverloadError: The queue is full, and ``wait`` is False.
            UsageError: ``deadline`` is not above 0, or above :data:`LONGEST_DEADLINE`.
            RuntimeError: The scheduler is closed.
        """
        if deadline is not None:
            check_number("deadline", deadline, 0.0, LONGEST_DEADLINE, above=True)
        expires = None if deadline is None else time.monotonic() + deadline
        with self._changed:
            while self._is_full() and not self._closing:
                if not wait:
                    raise OverloadError(
                        f"{self._max_waiting} pictures are waiting already", "try again later"
                    )
                self._changed.wait()
            if self._closing:
                raise RuntimeError("the scheduler is closed") from self._failure
            request = Request(image, prompt, options, self._submitted, expires, on_piece=on_piece)
            self._submitted += 1
            self._unsettled[request.number] = request
            request.future.add_done_callback(lambda _: self._unsettled.pop(request.number, None))
            self._waiting.append(request)
            self._changed.notify_all()
        return request

    def _is_full(self) -> bool:
        """Whether the queue has no place; those that were given up or came too late hold none."""
        if len(self._waiting) >= self._max_waiting:
            self._waiting = deque(request for request in self._waiting if not request.over)
        return len(self._waiting) >= self._max_waiting

    @property
    def failed(self) -> bool:
        """Whether it has ended by a mistake, and takes no more requests."""
        return self._failure is not None

    @property
    def load(self) -> dict[str, int]:
        """How many requests are ``waiting``, ``encoding``, ``ready`` and ``running``."""
        with self._changed:
            ready = sum(len(requests) for requests, _ in self._ready)
            return {
                "waiting": len(self._waiting),
                "encoding": self._encoding,
                "ready": ready,
                "running": len(self._running),
            }

    def close(self) -> None:
        """Cancels what is not done and ends both threads."""
        with self._changed:
            self._closing = True
            self._drop(Request.cancel)
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A thread that ends by a mistake of ours lets nobody wait for ever: every request gets the error."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to every request, and to who submits next
            with self._changed:
                self._closing, self._failure = True, error
                self._drop(partial(Request.fail, error=error))
                self._changed.notify_all()

    def _drop(self, settle: Callable[[Request], None]) -> None:
        """Settles all that is without a result and empties the queues."""
        for request in list(self._unsettled.values()):
            settle(request)
        self._waiting.clear()
        self._ready.clear()

    # The encoder's thread

    def _encode(self) -> None:
        while (requests := self._next_to_encode()) is not None:
            for group, encoded in self._encoded(requests):
                with self._changed:
                    self._ready.append((group, encoded))
                    self._changed.notify_all()
            with self._changed:
                self._encoding = 0

    def _next_to_encode(self) -> list[Request] | None:
        """Waits for requests and for room behind; None at the end."""
        with self._changed:
            while not self._closing:
                room = self._room()
                if self._waiting and room > 0:
                    taken = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                    self._encoding = len(taken)
                    self._changed.notify_all()
                    return taken
                self._changed.wait()
        return None

    def _room(self) -> int:
        """How many pictures may be encoded now."""
        ready = sum(len(group) for group, _ in self._ready)
        if not self._in_turn:
            return self._max_batch - ready
        # Ahead of a free row nothing is won, and words that wait for a whole batch of pictures come in jerks.
        free = self._max_batch - ready - len(self._running)
        return min(free, 1) if self._running else free

    def _encoded(self, requests: list[Request]) -> Iterator[tuple[list[Request], Encoded]]:
        """Requests of one batch, encoded; where one of them is broken, each by itself, and that one fails."""
        alive = [request for request in requests if not request.over]
        groups = deque([alive] if alive else [])
        while groups:
            group = groups.popleft()
            images, prompts = [request.image for request in group], [request.prompt for request in group]
            clock = Clock(self._turn)
            try:
                encoded = self._encoder(images, prompts, clock)
            except Blip2EdgeError as error:
                if len(group) == 1:
                    group[0].fail(error)
                else:
                    groups.extend([request] for request in group)
                continue
            for stage, start, end in clock.spans:
                self._trace(Span(stage, start, end, _numbers(group)))
            _charge(group, clock)
            yield group, encoded

    # The decoder's thread

    def _decode(self) -> None:
        while (admitted := self._next_to_decode()) is not None:
            with self._turn():
                self._go_on(admitted)

    def _go_on(self, admitted: list[tuple[list[Request], Encoded]]) -> None:
        """Prefills what came and gives each running row a token."""
        for group, encoded in admitted:
            try:
                self._admit(group, encoded)
            except Blip2EdgeError as error:
                for request in group:
                    request.fail(error)
        try:
            self._step()
        except Blip2EdgeError as error:  # no row of this decoder can go on
            for request in self._running.values():
                request.fail(error)
            self._running.clear()
            self._decoding = Decoding()

    def _next_to_decode(self) -> list[tuple[list[Request], Encoded]] | None:
        """Those that get the free rows, as soon as there is anything to do; None at the end."""
        with self._changed:
            self._changed.notify_all()  # rows may have come free, for which a picture is to be encoded
            while not (self._closing or self._ready or self._running):
                self._changed.wait()
            if self._closing:
                return None
            admitted = []
            free = self._max_batch - len(self._running)
            while self._ready and free > 0:
                group, encoded = self._ready.popleft()
                if len(group) > free:
                    rest = range(free, len(group))
                    self._ready.appendleft((group[free:], encoded.part(rest)))
                    group, encoded = group[:free], encoded.part(range(free))
                admitted.append((group, encoded))
                free -= len(group)
            self._changed.notify_all()
            return admitted

    def _admit(self, group: list[Request], encoded: Encoded) -> None:
        """Prefills a batch; its rows join those that run. Beams are searched at once, and the others wait."""
        alive = [at for at, request in enumerate(group) if not request.over]
        for search in (False, True):
            chosen = [at for at in alive if (group[at].options.num_beams > 1) is search]
            if chosen:
                serve = self._search if search else self._start
                serve([group[at] for at in chosen], encoded.part(chosen))

    def _start(self, requests: list[Request], part: Encoded) -> None:
        clock, start = Clock(), time.perf_counter()
        logits, state = self._completer.prefill(part, clock)
        self._trace(Span("prefill", start, time.perf_counter(), _numbers(requests)))
        _charge(requests, clock)
        rows = [
            self._completer.row(part, place, request.options, logits.shape[-1], request.number)
            for place, request in enumerate(requests)
        ]
        self._decoding.join(logits, state, rows)
        for row, request in zip(rows, requests, strict=True):
            request.begin(self._completer.tokenizer)
            self._running[id(row)] = request

    def _search(self, requests: list[Request], part: Encoded) -> None:
        for options in dict.fromkeys(request.options for request in requests):
            places = [at for at, request in enumerate(requests) if request.options == options]
            same, clock, start = [requests[at] for at in places], Clock(), time.perf_counter()
            numbers = [request.number for request in same]
            texts = self._completer.complete(part.part(places), options, numbers, clock)
            self._trace(Span("decode", start, time.perf_counter(), _numbers(same)))
            _charge(same, clock)
            for request, generated in zip(same, texts, strict=True):
                self._deliver(request, generated)

    def _step(self) -> None:
        for row in list(self._decoding.rows):
            if self._running[id(row)].over:
                self._decoding.leave(row)
                del self._running[id(row)]
        if not self._decoding.rows:
            return
        start = time.perf_counter()
        rows = self._decoding.step()
        end = time.perf_counter()
        requests = [self._running[id(row)] for row in rows]
        self._trace(Span("decode", start, end, _numbers(requests)))
        for row, request in zip(rows, requests, strict=True):
            request.stage_ms["decode"] += (end - start) * 1e3 / len(rows)
            request.take(row)
            if row.finish_reason is not None:
                del self._running[id(row)]
                self._deliver(request, row.result())

    def _deliver(self, request: Request, generated: Generated) -> None:
        result = caption_result(
            request.image,
            request.prompt,
            generated,
            request.options,
            self._completer.tokenizer,
            request.stage_ms,
        )
        if generated.score is not None:
            request.push(result.text)
        request.finish(result)


def _charge(requests: Sequence[Request], clock: Clock) -> None:
    """Adds each request's share of what they went through together."""
    for stage, ms in clock.share(len(requests)).items():
        for request in requests:
            request.stage_ms[stage] += ms


def _numbers(requests: Sequence[Request]) -> tuple[int, ...]:
    return tuple(request.number for request in requests)
