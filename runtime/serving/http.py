"""``blip2edge serve``: captions over HTTP, as a Starlette application on one scheduler.

| request | answer |
|---|---|
| ``GET /`` | a page that captions what the camera sees |
| ``GET /health`` | 200 and the queue's load as JSON; 503 once the scheduler has failed |
| ``GET /metrics`` | counters in the Prometheus text format |
| ``GET /v1/models``, ``GET /v1/models/ID`` | the bundle, in OpenAI's format |
| ``POST /v1/chat/completions`` | OpenAI's format (``openai_api.py``); with ``"stream": true`` server-sent events |
| ``POST /caption?prompt=…`` | a picture, in one of the forms of ``picture_forms.py``; an object of ``caption --json`` |
| ``POST /ask?question=…`` | the same with the bundle's question template |

An error is ``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``; ``param`` is the wrong key of the
request, or null. A closed connection cancels its request at the next step. A full queue is answered with 503, a missed
deadline with 504.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope

from blip2edge.errors import (
    Blip2EdgeError,
    ImageError,
    OverloadError,
    PromptError,
    UsageError,
    option,
)
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import STAGES, CaptionResult, Request
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.decoding.options import shown
from blip2edge.runtime.serving.access import Access, AccessControl
from blip2edge.runtime.serving.chat_keys import NAMES, RequestError, classified, error_json
from blip2edge.runtime.serving.openai_api import Answer, event_lines, read_request
from blip2edge.runtime.serving.picture_forms import (
    FORM_TYPE,
    MAX_BODY_BYTES,
    media_type,
    read_caption_request,
)
from blip2edge.runtime.text.prompt import PromptText

PAGE = Path(__file__).with_name("page.html")
CHAT = "/v1/chat/completions"

MAX_REQUEST_BEAMS = 8
"""Limit of beams per request: every beam has its own KV cache."""

CODES = {404: "not_found", 405: "method_not_allowed"}
"""``code`` of the errors that are found before a route is called."""


class _ClientGone(Exception):  # noqa: N818 - control flow: no client is left to answer
    """The client has closed the connection."""


class Server(Collector):
    """The ASGI application of ``blip2edge serve``.

    Args:
        captioner: A loaded bundle.
        max_batch, max_waiting: As of :class:`Scheduler`.
        deadline: Time limit in seconds for a caption, if the request gives none; None for no limit.
        access: Rules of access; None allows all clients except web pages of other origins.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        max_batch: int = 8,
        max_waiting: int = 64,
        deadline: float | None = None,
        access: Access | None = None,
    ) -> None:
        self.captioner = captioner
        self.model = captioner.bundle.path.resolve().name
        self.deadline = deadline
        self.scheduler: Scheduler = captioner.scheduler(max_batch=max_batch, max_waiting=max_waiting)
        self.counts = {"done": 0, "failed": 0, "refused": 0, "cancelled": 0}
        self.tokens = 0
        self.stage_ms = dict.fromkeys(STAGES, 0.0)
        self._made = int((captioner.bundle.path / "bundle.json").stat().st_mtime)
        self._metrics_registry = CollectorRegistry()
        self._metrics_registry.register(self)
        handlers: dict[Any, Any] = {
            Blip2EdgeError: self._refused,
            HTTPException: self._no_route,
            ClientDisconnect: self._gone,
            _ClientGone: self._gone,
            Exception: self._failed,
        }
        self._app = Starlette(
            routes=[
                Route("/", self._page),
                Route("/health", self._health),
                Route("/metrics", self._metrics),
                Route("/v1/models", self._models),
                Route("/v1/models/{name:path}", self._model),
                Route(CHAT, self._chat, methods=["POST"]),
                Route("/caption", self._caption, methods=["POST"]),
                Route("/ask", self._ask, methods=["POST"]),
            ],
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )
        self._app.router.redirect_slashes = False
        self._guarded = AccessControl(self._app, access or Access(), PAGE.read_text(encoding="utf-8"))

    def close(self) -> None:
        """Cancels all open requests."""
        self.scheduler.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """One connection, by the ASGI specification, where ``headers`` may be missing."""
        await self._guarded({"headers": [], **scope}, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self.close()

    # Routes

    async def _page(self, _request: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_bytes())

    async def _health(self, _request: HttpRequest) -> Response:
        failed = self.scheduler.failed
        body = {"status": "failed" if failed else "ok", "model": self.model, "load": self.scheduler.load}
        return JSONResponse(body, 503 if failed else 200)

    async def _metrics(self, request: HttpRequest) -> Response:
        encode, kind = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._metrics_registry), headers={"content-type": kind})

    async def _models(self, _request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def _model(self, request: HttpRequest) -> Response:
        name = request.path_params["name"]
        if name != self.model:
            raise RequestError(
                f"there is no model {name!r}",
                f"this server has one: {self.model}",
                field="model",
                code="model_not_found",
                status=404,
            )
        return JSONResponse(self._described())

    async def _caption(self, request: HttpRequest) -> Response:
        return await self._captioned(request, "prompt")

    async def _ask(self, request: HttpRequest) -> Response:
        return await self._captioned(request, "question")

    async def _captioned(self, request: HttpRequest, text: str) -> Response:
        wanted = await read_caption_request(await _body(request), request.headers, request.query_params, text)
        prompt = wanted.text
        if text == "question":
            if prompt is None:
                raise RequestError("the question is missing", "send one", field=text, code="missing_required_parameter")
            prompt = self.captioner.prompts.question(prompt)
        async with _Client(request.receive) as client:
            self._submit(client, wanted.pictures, prompt, wanted.options, wanted.deadline)
            return JSONResponse((await self._finished(client)).to_json())

    async def _chat(self, request: HttpRequest) -> Response:
        kind = media_type(request.headers)
        if kind == FORM_TYPE or kind.startswith(("image/", "audio/", "video/")):
            raise RequestError(
                f"expected a body of the type application/json, got {kind}",
                "send pictures as data: URLs in the messages, or use /caption",
                code="unsupported_media_type",
                status=415,
            )
        wanted = read_request(await _body(request), self.captioner.prompts.spec)
        request.state.names = wanted.names
        prompt = self.captioner.prompts.question(str(wanted.prompt)) if wanted.ask else wanted.prompt
        answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.model, wanted.include_usage)
        client = _Client(request.receive)
        submit = partial(self._submit, client, wanted.images, prompt, wanted.options, wanted.deadline)
        if not wanted.stream:
            async with client:
                submit()
                return JSONResponse(answer.completion(await self._finished(client)))
        chunks = self._chunks(client, submit, answer, wanted.names)
        first = await anext(chunks)  # an error before the first token has its own HTTP status
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        return StreamingResponse(event_lines(first, chunks), headers=headers)

    # Captions

    def _submit(
        self,
        client: _Client,
        pictures: tuple[bytes, ...],
        prompt: PromptText | None,
        options: Mapping[str, Any],
        deadline: float | None,
    ) -> None:
        beams, stop = options.get("num_beams"), options.get("stop")
        if isinstance(beams, int) and beams > MAX_REQUEST_BEAMS:
            raise UsageError(f"expected {option('num_beams')} of at most {MAX_REQUEST_BEAMS}, got {shown(beams)}")
        if isinstance(stop, list):  # besides those of the bundle's template
            options = {**options, "stop": [*self.captioner.options().stop, *stop]}
        client.caption = self.scheduler.submit(
            pictures[0] if len(pictures) == 1 else list(pictures),
            self.captioner.options(**options),
            prompt=prompt,
            deadline=self.deadline if deadline is None else deadline,
            wait=False,
            on_piece=client.put,
        )

    async def _finished(self, client: _Client) -> CaptionResult:
        while await client.next() is not None:
            pass
        return self._counted(client)

    async def _chunks(
        self, client: _Client, submit: Callable[[], None], answer: Answer, names: Mapping[str, str]
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed answer. A late error is an object as well, and the last one."""
        async with client:
            submit()
            piece = await client.next()
            if piece is None:
                _outcome(client)
            outcome = "cancelled"
            try:
                yield answer.chunk({"role": "assistant", "content": ""})
                while piece is not None:
                    yield answer.chunk({"content": piece})
                    piece = await client.next()
                outcome = "failed"
                result = self._counted(client)
                outcome = ""
                yield answer.chunk({}, result.finish_reason)
                if answer.include_usage:
                    yield answer.usage_chunk(result)
            except Blip2EdgeError as error:
                yield error_json(error, names)
            except _ClientGone:
                pass
            finally:
                if outcome:
                    self.counts[outcome] += 1

    def _counted(self, client: _Client) -> CaptionResult:
        result = _outcome(client)
        self.counts["done"] += 1
        self.tokens += result.new_tokens
        for stage in STAGES:
            self.stage_ms[stage] += result.timings_ms[stage]
        return result

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self._made, "owned_by": "blip2edge"}

    def collect(self) -> Iterator[Metric]:
        """The metrics, as ``prometheus_client`` reads them."""
        requests = CounterMetricFamily("blip2edge_requests", "Requests by their outcome", labels=["outcome"])
        for outcome, count in self.counts.items():
            requests.add_metric([outcome], count)
        seconds = CounterMetricFamily("blip2edge_stage_seconds", "Seconds of each stage", labels=["stage"])
        for stage, ms in self.stage_ms.items():
            seconds.add_metric([stage], ms / 1e3)
        load = GaugeMetricFamily("blip2edge_load", "Requests in each queue", labels=["where"])
        for where, count in self.scheduler.load.items():
            load.add_metric([where], count)
        yield from (requests, CounterMetricFamily("blip2edge_tokens", "Generated tokens", self.tokens), seconds, load)

    # Errors

    async def _refused(self, request: HttpRequest, error: Blip2EdgeError) -> Response:
        status = classified(error)[0]
        self.counts["failed" if status in (500, 504) else "refused"] += 1
        chats = request.url.path == CHAT
        content = error_json(error, getattr(request.state, "names", NAMES if chats else {"deadline": "deadline_s"}))
        if chats and isinstance(error, (ImageError, PromptError)):
            content["error"]["param"] = "messages"
        return JSONResponse(content, status, {"retry-after": "1"} if status == 503 else None)

    async def _failed(self, _request: HttpRequest, error: Exception) -> Response:
        self.counts["failed"] += 1
        return JSONResponse(error_json(Blip2EdgeError(f"the server failed ({type(error).__name__})")), 500)

    async def _no_route(self, request: HttpRequest, error: HTTPException) -> Response:
        if request.method == "OPTIONS" and error.headers and "Allow" in error.headers:
            return Response(status_code=204, headers={"Allow": f"{error.headers['Allow']}, OPTIONS"})
        what = RequestError(
            f"there is no {request.method} {request.url.path}",
            f"allowed are {error.headers['Allow']}" if error.headers and "Allow" in error.headers else None,
            code=CODES.get(error.status_code, "invalid_request"),
        )
        return JSONResponse(error_json(what), error.status_code, error.headers)

    async def _gone(self, _request: HttpRequest, _error: Exception) -> None:
        self.counts["cancelled"] += 1


class _Client:
    """A waiting client: takes pieces of text from the scheduler's threads, and notices a closed connection.

    At the end of the ``async with`` block, its caption is canceled if it is not finished.

    Attributes:
        caption: The request, once it is submitted.
    """

    caption: Request

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    async def __aenter__(self) -> _Client:  # noqa: PYI034 - typing.Self is of Python 3.11
        self._gone = asyncio.ensure_future(self._disconnected())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._gone.cancel()
        if hasattr(self, "caption"):
            self.caption.cancel()

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def put(self, piece: str | None) -> None:
        """Adds a piece; may be called from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self) -> str | None:
        """The next piece, or None after the last; raises _ClientGone where the connection is closed.

        A deadline ends the wait when it passes, in whichever queue the request is.
        """
        pending = asyncio.ensure_future(self._pieces.get())
        try:
            while not pending.done():
                left = None
                if self.caption.expires is not None and not self.caption.over:  # its end is already queued otherwise
                    left = max(0.0, self.caption.expires - time.monotonic())
                await asyncio.wait({self._gone, pending}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if self._gone.done() and not pending.done():
                    raise _ClientGone
            return pending.result()
        finally:
            pending.cancel()


def _outcome(client: _Client) -> CaptionResult:
    """The result of a finished caption."""
    try:
        return client.caption.result(0)
    except CancelledError as error:  # the server is closing
        raise OverloadError("the server is closing", "try again later") from error


async def _body(request: HttpRequest) -> bytes:
    """A request's body."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(
                f"expected at most {MAX_BODY_BYTES} bytes, got more",
                "scale the picture down",
                code="request_too_large",
                status=413,
            )
    return bytes(body)
