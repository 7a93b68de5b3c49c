"""Continuous batching: encodes the next pictures while earlier pictures are decoded; a free row is used again at once.

    submit --> waiting --(encoder's thread)--> ready --(decoder's thread: prefill)--> a running row --> result

Both queues have a largest length. Requests are served in the order of submission. A step gives each running row one
token, so that a short caption does not wait for a long one. ``caption_many``, ``watch`` and ``serve`` use this module.

The logits of a row alone and in a batch differ by rounding, which may change a random draw. So a request that samples
with a seed is encoded and decoded alone; its steps alternate with the steps of the other requests.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

from blip2edge.errors import EngineFaultError, OverloadError
from blip2edge.runtime.captioning.encoder import EncodeBatch, EncodedBatch, FairLock, StageClock
from blip2edge.runtime.captioning.engine_check import EngineCheck, KnownGoodRequest
from blip2edge.runtime.captioning.pipeline import TextGenerator
from blip2edge.runtime.captioning.request import Request, Span, expiry
from blip2edge.runtime.decoding.generate import GenerationBatch
from blip2edge.runtime.decoding.generated import Generated
from blip2edge.runtime.decoding.options import GenerationOptions, check_integer
from blip2edge.runtime.images.video import Channels, ItemSource, in_rgb
from blip2edge.runtime.text.prompt import PromptText


class Scheduler:
    """Captions submitted pictures: one thread encodes them, another thread decodes them.

    Args:
        encoder: Encodes batches.
        generator: Generates the texts of encoded batches.
        max_batch: Largest number of rows that are decoded together.
        max_waiting: Largest number of requests that wait to be encoded; see :meth:`submit`.
        graph_lock: Acquired while a graph runs, so that only one graph runs at a time. For backends whose graphs use
            all cores: two graphs at once would use more threads than there are cores. None for no lock.
        trace: Called by both threads with start and end of each stage; the function must return quickly.
        known_good: Request that tests the engine after an error (None for no test); if it fails, the scheduler closes.
        on_failure: Called with the error when the scheduler has closed itself.

    Raises:
        UsageError: ``max_batch`` or ``max_waiting`` is not a whole number of at least 1.
    """

    def __init__(
        self,
        encoder: EncodeBatch,
        generator: TextGenerator,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        graph_lock: FairLock | None = None,
        trace: Callable[[Span], None] | None = None,
        known_good: KnownGoodRequest | None = None,
        on_failure: Callable[[BaseException], None] | None = None,
    ) -> None:
        check_integer("max_batch", max_batch, 1)
        check_integer("max_waiting", max_waiting, 1)
        self._encoder, self._generator = encoder, generator
        self._max_batch, self._max_waiting = max_batch, max_waiting
        self._full_text = f"the queue is full: {max_waiting} pictures are waiting"
        self._trace, self._on_failure = trace or (lambda span: None), on_failure or (lambda error: None)
        self._check = EngineCheck(known_good, self._push_front, self._end)
        self._graph_lock = graph_lock or nullcontext
        self._one_at_a_time = graph_lock is not None
        self._waiting: deque[Request] = deque()
        self._ready: deque[tuple[list[Request], EncodedBatch]] = deque()
        self._running: dict[int, Request] = {}  # by the id of their rows
        self._batches = [GenerationBatch()]  # the shared one, and one for each separate request
        self._open: dict[int, Request] = {}  # by number: those without a result
        self._submitted = 0
        self._encoding = 0  # requests that the encoder works on
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
        """Returns the scheduler; it is closed at the end of the ``with`` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the scheduler; unfinished requests are cancelled."""
        self.close()

    def submit(
        self,
        image: ItemSource,
        options: GenerationOptions,
        *,
        prompt: PromptText | None = None,
        channels: Channels = "rgb",
        deadline: float | None = None,
        wait: bool = True,
        on_piece: Callable[[str | None], None] | None = None,
        row: int | None = None,
    ) -> Request:
        """Adds a picture to the queue.

        Args:
            image: See ``Captioner.caption``.
            options: How to generate the caption.
            prompt: See ``Captioner.caption``.
            channels: See ``Captioner.caption``.
            deadline: Seconds from now after which the request fails if it is not finished; None for no deadline.
            wait: Whether to wait while the queue is full; if False, a full queue is an error.
            on_piece: See :class:`Request`.
            row: Number of the picture in a call of ``caption_many``, for its random numbers; such pictures share
                batches. None for a single request: its text does not depend on other requests.

        Raises:
            OverloadError: The queue is full, and ``wait`` is False.
            UsageError: ``deadline`` is out of range; or ``abstain_below`` is set, but there is no confidence map.
            RuntimeError: The scheduler is closed.
        """
        self._generator.confidence.check(options, prompt)
        image = in_rgb(image, channels)
        expires = expiry(deadline)
        with self._changed:
            while self._is_full() and not self._closing:
                if not wait:
                    raise OverloadError(self._full_text, "try again later")
                self._changed.wait()
            if isinstance(self._failure, EngineFaultError):
                raise EngineFaultError from self._failure
            if self._closing:
                raise RuntimeError("the scheduler is closed") from self._failure
            separate = row is None and options.seed is not None and options.sampling
            request = Request(
                image, prompt, options, self._submitted, row or 0, separate, expires=expires, on_piece=on_piece
            )
            self._waiting.append(self._opened(request))
            self._changed.notify_all()
        return request

    def _opened(self, request: Request) -> Request:
        self._submitted += 1
        self._open[request.number] = request
        request.future.add_done_callback(lambda _: self._open.pop(request.number, None))
        return request

    def _push_front(self, known_good: KnownGoodRequest) -> Request:
        with self._changed:
            request = self._opened(known_good.request(self._submitted))
            self._waiting.appendleft(request)
            self._changed.notify_all()
        return request

    def check_room(self) -> None:
        """Raises OverloadError if the queue is full; call it before a picture is read."""
        with self._changed:
            if self._is_full():
                raise OverloadError(self._full_text, "try again later")

    def _is_full(self) -> bool:
        """Returns whether the queue is full; cancelled and expired requests do not count."""
        if len(self._waiting) >= self._max_waiting:
            self._waiting = deque(request for request in self._waiting if not request.over)
        return len(self._waiting) >= self._max_waiting

    @property
    def failed(self) -> bool:
        """Returns whether an unexpected error has ended the threads; then no requests are accepted."""
        return self._failure is not None

    @property
    def load(self) -> dict[str, int]:
        """Returns how many requests are ``waiting``, ``encoding``, ``ready`` to be decoded, and ``running``."""
        with self._changed:
            return {
                "waiting": len(self._waiting),
                "encoding": self._encoding,
                "ready": sum(len(requests) for requests, _ in self._ready),
                "running": len(self._running),
            }

    def close(self) -> None:
        """Cancels unfinished requests and ends both threads; waits for them, unless one of them calls this method."""
        with self._changed:
            self._closing = True
            self._drop(Request.cancel)
            self._changed.notify_all()
        if threading.current_thread() not in self._threads:  # the garbage collector may close it in any thread
            for thread in self._threads:
                thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        """Runs ``work``, the loop of a thread; after an unexpected error all requests fail, so that no caller hangs."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - given to every request and to the next submit()
            self._end(error)

    def _end(self, error: BaseException) -> None:
        """Closes the scheduler after an error; every open request fails with ``error``. A second call does nothing."""
        with self._changed:
            if self._failure is not None:
                return
            self._closing, self._failure = True, error
            self._drop(partial(Request.fail, error=error))
            self._changed.notify_all()
        self._on_failure(error)

    def _drop(self, finish: Callable[[Request], None]) -> None:
        """Calls ``finish`` with each unfinished request, and empties the queues."""
        for request in list(self._open.values()):
            finish(request)
        self._waiting.clear()
        self._ready.clear()

    def _encode(self) -> None:
        """Encodes until the end: the work of the encoder's thread."""
        while (requests := self._next_to_encode()) is not None:
            for group, encoded in self._encoded(requests):
                with self._changed:
                    self._ready.append((group, encoded))
                    self._changed.notify_all()
            with self._changed:
                self._encoding = 0

    def _next_to_encode(self) -> list[Request] | None:
        """Waits for requests and free rows; returns the requests to encode next, or None if the scheduler closes."""
        with self._changed:
            while not self._closing:
                room = self._room()
                if self._waiting and room > 0:
                    taken = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
                    self._encoding, now = len(taken), time.perf_counter()
                    for request in taken:
                        request.queue_s = now - request.submitted
                    self._changed.notify_all()
                    return taken
                self._changed.wait()
        return None

    def _room(self) -> int:
        """Returns how many pictures may be encoded now."""
        ready = sum(len(group) for group, _ in self._ready)
        if not self._one_at_a_time:
            return self._max_batch - ready
        # Encode only for free rows. While rows are running, encode one picture: more would delay their next token.
        free = self._max_batch - ready - len(self._running)
        return min(free, 1) if self._running else free

    def _encoded(self, requests: list[Request]) -> Iterator[tuple[list[Request], EncodedBatch]]:
        """Encodes requests with the same number of visual tokens as a batch; if this fails, encodes each one alone."""
        alive = [request for request in requests if not request.over]
        shared = [request for request in alive if not request.separate]
        counts = dict.fromkeys(request.options.queries for request in shared)
        groups = deque([request for request in shared if request.options.queries == count] for count in counts)
        groups.extend([request] for request in alive if request.separate)
        while groups:
            group = groups.popleft()
            images, prompts = [request.image for request in group], [request.prompt for request in group]
            clock = StageClock(self._graph_lock)
            try:
                encoded = self._encoder(images, prompts, clock, group[0].options.queries)
            except Exception as error:  # noqa: BLE001 - whatever it is, it ends this request alone
                if len(group) == 1:
                    self._check.fail(group, error)
                else:
                    groups.extend([request] for request in group)
                continue
            for stage, start, end in clock.spans:
                self._trace(Span(stage, start, end, _numbers(group)))
            _charge(group, clock)
            for request, prompt in zip(group, encoded.prompts, strict=True):
                request.prompt_tokens = prompt.length
            yield group, encoded

    def _decode(self) -> None:
        """Decodes until the end: the work of the decoder's thread."""
        while (admitted := self._next_to_decode()) is not None:
            with self._graph_lock():
                self._advance(admitted)

    def _advance(self, admitted: list[tuple[list[Request], EncodedBatch]]) -> None:
        """Runs the prefill of the new requests, then generates one token for each running row."""
        for group, encoded in admitted:
            try:
                self._admit(group, encoded)
            except Exception as error:  # noqa: BLE001 - as above
                self._check.fail(group, error)
        for place, batch in enumerate(self._batches):
            rows = batch.rows
            try:
                self._step(batch)
            except Exception as error:  # noqa: BLE001 - no row of this batch can continue
                self._check.fail([self._running.pop(id(row)) for row in rows if id(row) in self._running], error)
                self._batches[place] = GenerationBatch()
        self._batches = [self._batches[0], *(batch for batch in self._batches[1:] if batch.rows)]

    def _next_to_decode(self) -> list[tuple[list[Request], EncodedBatch]] | None:
        """Waits for requests to decode; returns the requests for the free rows, or None if the scheduler closes."""
        with self._changed:
            self._changed.notify_all()  # a free row lets the encoder take a picture
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

    def _admit(self, group: list[Request], encoded: EncodedBatch) -> None:
        """Runs the prefill of a batch, and adds its rows to the running rows; runs beam searches to their end."""
        alive = [at for at, request in enumerate(group) if not request.over]
        for search in (False, True):
            chosen = [at for at in alive if (group[at].options.num_beams > 1) is search]
            if chosen:
                serve = self._search if search else self._start
                serve([group[at] for at in chosen], encoded.part(chosen))

    def _start(self, requests: list[Request], part: EncodedBatch) -> None:
        clock, start = StageClock(), time.perf_counter()
        logits, state = self._generator.prefill(part, clock)
        self._trace(Span("prefill", start, time.perf_counter(), _numbers(requests)))
        _charge(requests, clock)
        rows = [
            self._generator.begin(part, place, request.options, logits.shape[-1], request.row)
            for place, request in enumerate(requests)
        ]
        if requests[0].separate:
            self._batches.append(GenerationBatch())
        batch = self._batches[-1 if requests[0].separate else 0]
        batch.join(logits, state, rows)
        for row, request in zip(rows, requests, strict=True):
            request.begin(self._generator.tokenizer, row)
            self._running[id(row)] = request

    def _search(self, requests: list[Request], part: EncodedBatch) -> None:
        for options in dict.fromkeys(request.options for request in requests):
            places = [at for at, request in enumerate(requests) if request.options == options]
            same, clock, start = [requests[at] for at in places], StageClock(), time.perf_counter()
            texts = self._generator.complete(part.part(places), options, [request.row for request in same], clock)
            self._trace(Span("decode", start, time.perf_counter(), _numbers(same)))
            _charge(same, clock)
            for request, generated in zip(same, texts, strict=True):
                self._deliver(request, generated)

    def _step(self, batch: GenerationBatch) -> None:
        for row in list(batch.rows):
            if self._running[id(row)].over:
                batch.leave(row)
                del self._running[id(row)]
        if not batch.rows:
            return
        start = time.perf_counter()
        rows = batch.step()
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
        result = self._generator.result(
            request.image, request.prompt, request.prompt_tokens, generated, request.options, request.stage_ms
        )
        if generated.score is not None or request.options.abstain_below is not None:
            request.push(result.text)
        request.finish(result)


def _charge(requests: Sequence[Request], clock: StageClock) -> None:
    """Adds the time of a batch to its requests, an equal share to each."""
    for stage, ms in clock.share(len(requests)).items():
        for request in requests:
            request.stage_ms[stage] += ms


def _numbers(requests: Sequence[Request]) -> tuple[int, ...]:
    return tuple(request.number for request in requests)
