"""``blip2edge serve``: captions over HTTP, as an ASGI application on one scheduler.

| request | answer |
|---|---|
| ``GET /`` | a page that captions what the camera sees |
| ``GET /health`` | 200 and the queue's load as JSON; 503 once the scheduler has failed |
| ``GET /metrics`` | counters in the Prometheus text format |
| ``GET /v1/models`` | the bundle, in OpenAI's format |
| ``POST /v1/chat/completions`` | OpenAI's format (``openai_api.py``); with ``"stream": true`` server-sent events |
| ``POST /caption?prompt=…`` | the body is a picture file; the answer is an object of ``caption --json`` |

An error is ``{"error": {"message": ..., "param": ...}}``; ``param`` is the wrong key of the request, or null.
A closed connection cancels its request at the next step. A full queue is answered with 503, a missed deadline with 504.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from blip2edge.errors import (
    Blip2EdgeError,
    DeadlineError,
    ImageError,
    OverloadError,
    PromptError,
    UsageError,
    python_option,
)
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import STAGES, CaptionResult, Request
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.serving.openai_api import NAMES, chunk, completion, read_request

MAX_BODY_BYTES = 32 << 20  # of a request's body
PAGE = Path(__file__).with_name("page.html")
CHAT = "/v1/chat/completions"

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

STATUSES: tuple[tuple[type[Exception], int], ...] = (
    (OverloadError, 503),
    (DeadlineError, 504),
    (UsageError, 400),
    (ImageError, 400),
    (PromptError, 400),
    (Exception, 500),
)
"""HTTP status of an error: the first class that matches."""


class _TooLargeError(UsageError):
    """The body is over :data:`MAX_BODY_BYTES`."""


class _ClientGone(Exception):  # noqa: N818 - control flow: no client is left to answer
    """The client has closed the connection."""


class Server:
    """The ASGI application.

    Args:
        captioner: A loaded bundle.
        max_batch, max_waiting: As of :class:`Scheduler`.
        deadline: Seconds for a caption, where the request gives none; None for no bound.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        deadline: float | None = None,
    ) -> None:
        self.captioner = captioner
        self.model = captioner.bundle.path.resolve().name
        self.deadline = deadline
        self.scheduler: Scheduler = captioner.scheduler(max_batch=max_batch, max_waiting=max_waiting)
        self.counts = {"done": 0, "failed": 0, "refused": 0, "cancelled": 0}
        self.tokens = 0
        self.stage_ms = dict.fromkeys(STAGES, 0.0)
        self._gets: dict[str, Callable[[Send], Awaitable[None]]] = {
            "/": self._page,
            "/health": self._health,
            "/metrics": self._metrics,
            "/v1/models": self._models,
        }
        self._posts: dict[str, Callable[[Scope, bytes, Receive, Send], Awaitable[None]]] = {
            CHAT: self._chat,
            "/caption": self._caption,
        }

    def close(self) -> None:
        """Cancels all open requests."""
        self.scheduler.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection, by the ASGI specification."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
            return
        if scope["type"] != "http":
            return
        method, path = scope["method"], scope["path"]
        try:
            if method == "GET" and path in self._gets:
                await self._gets[path](send)
            elif method == "POST" and path in self._posts:
                await self._posts[path](scope, await _body(receive), receive, send)
            else:
                known = path in self._gets or path in self._posts
                await _json(send, 405 if known else 404, _error(UsageError(f"there is no {method} {path}")))
        except _ClientGone:
            self.counts["cancelled"] += 1
        except _TooLargeError as error:
            self.counts["refused"] += 1
            await _json(send, 413, _error(error))
        except Blip2EdgeError as error:
            status = next(number for kind, number in STATUSES if isinstance(error, kind))
            self.counts["failed" if status in (500, 504) else "refused"] += 1
            answer = _error(error, NAMES if path == CHAT else {})
            await _json(send, status, answer, {"retry-after": "1"} if status == 503 else {})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.shutdown":
                self.close()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async def _page(self, send: Send) -> None:
        await _answer(send, 200, PAGE.read_bytes(), "text/html; charset=utf-8")

    async def _health(self, send: Send) -> None:
        failed = self.scheduler.failed
        body = {"status": "failed" if failed else "ok", "model": self.model, "load": self.scheduler.load}
        await _json(send, 503 if failed else 200, body)

    async def _models(self, send: Send) -> None:
        model = {"id": self.model, "object": "model", "owned_by": "blip2edge"}
        await _json(send, 200, {"object": "list", "data": [model]})

    async def _metrics(self, send: Send) -> None:
        lines = ["# TYPE blip2edge_requests_total counter"]
        lines += [f'blip2edge_requests_total{{outcome="{name}"}} {n}' for name, n in self.counts.items()]
        lines += ["# TYPE blip2edge_tokens_total counter", f"blip2edge_tokens_total {self.tokens}"]
        lines += ["# TYPE blip2edge_stage_seconds_total counter"]
        lines += [
            f'blip2edge_stage_seconds_total{{stage="{stage}"}} {ms / 1e3:.6f}' for stage, ms in self.stage_ms.items()
        ]
        lines += ["# TYPE blip2edge_load gauge"]
        lines += [f'blip2edge_load{{where="{where}"}} {n}' for where, n in self.scheduler.load.items()]
        await _answer(send, 200, ("\n".join(lines) + "\n").encode(), "text/plain; version=0.0.4")

    async def _caption(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        query = {key: values[-1] for key, values in parse_qs(scope["query_string"].decode(errors="replace")).items()}
        unknown = sorted(query.keys() - {"prompt"})
        if unknown:
            raise UsageError(f"there is no parameter {unknown[0]!r}", "the only one is prompt", field=unknown[0])
        async with _Client(receive) as client:
            request = self._submit(client, body, query.get("prompt"), {}, None)
            result = await self._finished(client, request)
        await _json(send, 200, result.to_json())

    async def _chat(self, _scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        wanted = read_request(body)
        image: Any = wanted.images[0] if len(wanted.images) == 1 else list(wanted.images)
        async with _Client(receive) as client:
            request = self._submit(client, image, wanted.prompt, wanted.options, wanted.deadline)
            names: dict[str, Any] = {
                "number": request.number,
                "created": int(time.time()),
                "model": self.model,
            }
            if not wanted.stream:
                result = await self._finished(client, request)
                await _json(send, 200, completion(result, **names))
                return
            first = await client.next(request)
            if first is None:  # an error before the first token has its own HTTP status
                self._outcome(request)
            await _start(send, 200, "text/event-stream", {"cache-control": "no-cache"})
            async for event in self._events(client, request, first, names):
                data = f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n"
                await send({"type": "http.response.body", "body": data.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    def _submit(
        self,
        client: _Client,
        image: Any,
        prompt: str | None,
        options: Mapping[str, Any],
        deadline: float | None,
    ) -> Request:
        generation = self.captioner.options(**options)
        seconds = self.deadline if deadline is None else deadline
        return self.scheduler.submit(
            image, generation, prompt=prompt, deadline=seconds, wait=False, on_piece=client.put
        )

    async def _finished(self, client: _Client, request: Request) -> CaptionResult:
        while await client.next(request) is not None:
            pass
        return self._counted(request)

    async def _events(
        self, client: _Client, request: Request, piece: str | None, names: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any] | str]:
        """Chunks, then the finish reason, then ``[DONE]``; a late error is an event as well."""
        while piece is not None:
            yield chunk(piece, **names)
            piece = await client.next(request)
        try:
            result = self._counted(request)
        except Blip2EdgeError as error:
            self.counts["failed"] += 1
            yield _error(error, NAMES)
            return
        yield chunk("", reason=result.finish_reason, **names)
        yield "[DONE]"

    def _outcome(self, request: Request) -> CaptionResult:
        try:
            return request.result(0)
        except CancelledError as error:  # the server is closing
            raise OverloadError("the server is closing", "try again later") from error

    def _counted(self, request: Request) -> CaptionResult:
        result = self._outcome(request)
        self.counts["done"] += 1
        self.tokens += len(result.tokens)
        for stage in STAGES:
            self.stage_ms[stage] += result.timings_ms[stage]
        return result


class _Client:
    """A waiting client: takes pieces of text from the scheduler's threads, and notices a closed connection."""

    def __init__(self, receive: Receive) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        self._gone = asyncio.ensure_future(_disconnected(receive))

    async def __aenter__(self) -> _Client:  # noqa: PYI034 - typing.Self is of Python 3.11
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gone.cancel()

    def put(self, piece: str | None) -> None:
        """Adds a piece; may be called from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self, request: Request) -> str | None:
        """The next piece, or None after the last; a closed connection cancels the request.

        A deadline ends the wait when it passes, in whichever queue the request is.
        """
        pending = asyncio.ensure_future(self._pieces.get())
        try:
            while not pending.done():
                left = None
                if request.expires is not None and not request.over:  # its end is already queued otherwise
                    left = max(0.0, request.expires - time.monotonic())
                await asyncio.wait({self._gone, pending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if self._gone.done() and not pending.done():
                    request.cancel()
                    raise _ClientGone
            return pending.result()
        finally:
            pending.cancel()


async def _body(receive: Receive) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > MAX_BODY_BYTES:
            raise _TooLargeError(f"expected at most {MAX_BODY_BYTES} bytes, got more", "scale the picture down")
        if not message.get("more_body", False):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _start(send: Send, status: int, kind: str, headers: Mapping[str, str]) -> None:
    pairs = [(b"content-type", kind.encode())]
    pairs += [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def _answer(send: Send, status: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
    await _start(send, status, kind, {"content-length": str(len(body)), **(headers or {})})
    await send({"type": "http.response.body", "body": body})


async def _json(send: Send, status: int, values: Any, headers: Mapping[str, str] | None = None) -> None:
    await _answer(send, status, json.dumps(values).encode(), "application/json", headers)


def _error(error: Blip2EdgeError, names: Mapping[str, str] = {}) -> dict[str, Any]:
    """An error as JSON.

    Args:
        error: Its text names options by their Python names.
        names: The request's keys by those names, where they differ.
    """
    message = error.text(lambda name, on: python_option(names.get(name, name), on))
    return {"error": {"message": message, "param": names.get(error.field or "", error.field)}}
