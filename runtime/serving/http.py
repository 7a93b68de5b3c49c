"""``blip2edge serve``: captions over HTTP, as a Starlette application on one scheduler.

The routes are in ``openapi.py``, as data. A request passes ``RequestLog`` (id, log line, time), ``AccessControl`` (key,
names, origins) and the routes. Its body is read by ``transfer.py``, and parsed in a thread beside the event loop.

An error is ``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``; ``param`` is the wrong key of the
request, or null. A closed connection cancels its request at the next step. A full queue, and an engine that is being
loaded again, are answered with 503; a missed deadline with 504.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope

from blip2edge.errors import Blip2EdgeError, ImageError, PromptError, UsageError, option
from blip2edge.limits import ConnectionLimits, Limits
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import CaptionResult
from blip2edge.runtime.captioning.restart import Backoff, RestartingCaptioner
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.decoding.options import GenerationOptions, shown
from blip2edge.runtime.serving.access import Access, AccessControl
from blip2edge.runtime.serving.chat_keys import NAMES, RequestError, check_type, classified, error_json
from blip2edge.runtime.serving.json_bodies import json_object
from blip2edge.runtime.serving.metrics import Metrics
from blip2edge.runtime.serving.openai_api import Answer, event_lines, read_request
from blip2edge.runtime.serving.openapi import CHAT, ENDPOINTS, EVENT_KEYS, document, route_name
from blip2edge.runtime.serving.picture_forms import FORM_TYPE, JSON_TYPE, media_type, read_caption_request
from blip2edge.runtime.serving.request_log import RequestLog
from blip2edge.runtime.serving.transfer import BodyMemory, BodyShare, ClientGoneError, WaitingClient, read_body
from blip2edge.runtime.text.prompt import Dialog, PromptText

PAGE = Path(__file__).with_name("page.html")

CODES = {404: "not_found", 405: "method_not_allowed"}
"""``code`` of the errors that are found before a route is called."""

RECENT, MAX_EVENT = 100, 64 << 10
"""Posted captions that are kept, and the largest body of one in bytes."""

SHARE = "blip2edge.body_share"
"""Key of the ASGI scope: the request's share of the memory for bodies."""


class Server:
    """The ASGI application of ``blip2edge serve``.

    Args:
        captioner: A loaded bundle.
        load: Loads the bundle again if the engine is broken; None: a broken engine stays broken.
        max_batch, max_waiting: As of :class:`Scheduler`.
        deadline: Time limit in seconds for a caption, if the request gives none; None for no limit.
        access: Rules of access; None allows all clients except web pages of other origins.
        limits: The largest request.
        connections: Limits of bodies; those of connections are kept by ``connections.py``.
        backoff: Waits between attempts to load the engine again.
        log: Where the request log goes; None for nowhere.
    """

    def __init__(
        self,
        captioner: Captioner,
        *,
        load: Callable[[], Captioner] | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
        deadline: float | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
        connections: ConnectionLimits | None = None,
        backoff: Backoff | None = None,
        log: TextIO | None = None,
    ) -> None:
        self.model = captioner.bundle.path.resolve().name
        self.deadline, self.limits = deadline, limits or Limits()
        self.connections = connections or ConnectionLimits()
        self.memory = BodyMemory(self.connections.memory_bytes)
        self.metrics = Metrics(lambda: self.scheduler.load, lambda: self.engine.restarts, lambda: self.memory.used)
        self.engine = RestartingCaptioner(
            captioner,
            load,
            backoff or Backoff(),
            max_batch=max_batch,
            max_waiting=max_waiting,
            trace=self.metrics.add_span,
        )
        self._events: deque[dict[str, str]] = deque(maxlen=RECENT)
        self._made = int((captioner.bundle.path / "bundle.json").stat().st_mtime)
        handlers: dict[Any, Any] = {
            Blip2EdgeError: self._refused,
            HTTPException: self._no_route,
            ClientGoneError: self._gone,
            Exception: self._failed,
        }
        app = Starlette(
            routes=[Route(one.route, getattr(self, f"_{one.name}"), methods=[one.method]) for one in ENDPOINTS],
            exception_handlers=handlers,
            lifespan=self._lifespan,
        )
        app.router.redirect_slashes = False
        self._needs_key = bool(access and access.api_key)
        guarded = AccessControl(app, access or Access(), PAGE.read_text(encoding="utf-8"))
        self._app = RequestLog(guarded, log, self._observe)

    @property
    def captioner(self) -> Captioner:
        """The captioner in use."""
        return self.engine.captioner

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler in use."""
        return self.engine.scheduler

    @property
    def counts(self) -> dict[str, int]:
        """Requests by their outcome."""
        return self.metrics.counts

    def close(self) -> None:
        """Cancels all open requests."""
        self.engine.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """One connection, by the ASGI specification, where ``headers`` may be missing."""
        with self.memory.share() as share:
            await self._app({"headers": [], **scope, SHARE: share}, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        yield
        self.close()

    def _observe(self, method: str, path: str, status: int, seconds: float) -> None:
        self.metrics.add_request(route_name(method, path), status, seconds)

    # Routes

    async def _page(self, _request: HttpRequest) -> Response:
        return HTMLResponse(PAGE.read_bytes())

    async def _health(self, _request: HttpRequest) -> Response:
        state = self.engine.state
        body = {"status": state, "model": self.model, "load": self.scheduler.load}
        return JSONResponse(body, 200) if state == "ok" else JSONResponse(body, 503, {"retry-after": "1"})

    async def _metrics(self, request: HttpRequest) -> Response:
        content, kind = self.metrics.text(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": kind})

    async def _openapi(self, _request: HttpRequest) -> Response:
        return JSONResponse(document(self.limits, needs_key=self._needs_key))

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
        self.engine.ready().check_room()
        body = await self._body(request)
        read = partial(read_caption_request, body, request.headers, request.query_params, text, self.limits)
        wanted = await asyncio.to_thread(read) if media_type(request.headers) in (FORM_TYPE, JSON_TYPE) else read()
        prompt = wanted.text
        if text == "question":
            if prompt is None:
                raise RequestError("the question is missing", "send one", field=text, code="missing_required_parameter")
            prompt = self.captioner.prompts.question(prompt)
        async with WaitingClient(request.receive) as client:
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
        self.engine.ready().check_room()
        body = await self._body(request)
        wanted = await asyncio.to_thread(read_request, body, self.captioner.prompts.spec, self.limits)
        request.state.names = wanted.names
        prompt = self.captioner.prompts.question(str(wanted.prompt)) if wanted.ask else wanted.prompt
        answer = Answer(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self.model, wanted.include_usage)
        client = WaitingClient(request.receive)
        submit = partial(self._submit, client, wanted.images, prompt, wanted.options, wanted.deadline)
        if not wanted.stream:
            async with client:
                submit()
                return JSONResponse(answer.completion(await self._finished(client)))
        chunks = self._chunks(client, submit, answer, wanted.names)
        first = await anext(chunks)  # an error before the first token has its own HTTP status
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        return StreamingResponse(event_lines(first, chunks), headers=headers)

    async def _recent(self, _request: HttpRequest) -> Response:
        return JSONResponse({"data": list(self._events)})

    async def _post(self, request: HttpRequest) -> Response:
        values = json_object(await self._body(request, MAX_EVENT), self.limits)
        kept = {name: values[name] for name in EVENT_KEYS if values.get(name) is not None}
        for name in ("text", *kept):
            check_type(name, kept.get(name, 0), str, "a text")
        self._events.append(kept)
        return JSONResponse(kept)

    # Captions

    def _submit(
        self,
        client: WaitingClient,
        pictures: tuple[bytes, ...],
        prompt: PromptText | None,
        options: Mapping[str, Any],
        deadline: float | None,
    ) -> None:
        scheduler = self.engine.ready()
        self._check_limits(pictures, prompt, options)
        stop = options.get("stop")
        if isinstance(stop, list):  # besides those of the bundle's template
            options = {**options, "stop": [*self.captioner.options().stop, *stop]}
        client.caption = scheduler.submit(
            pictures[0] if len(pictures) == 1 else list(pictures),
            self._limited(self.captioner.options(**options)),
            prompt=prompt,
            deadline=self.deadline if deadline is None else deadline,
            wait=False,
            on_piece=client.put,
        )

    def _check_limits(self, pictures: tuple[bytes, ...], prompt: PromptText | None, options: Mapping[str, Any]) -> None:
        limits = self.limits
        for name, most in (("num_beams", limits.beams), ("max_new_tokens", limits.new_tokens)):
            value = options.get(name)
            if isinstance(value, int) and value > most:
                raise UsageError(f"expected {option(name)} of at most {most}, got {shown(value)}")
        if len(pictures) > limits.pictures:
            raise RequestError(f"expected at most {limits.pictures} pictures, got {len(pictures)}", "send fewer")
        length = sum(map(len, prompt.texts if isinstance(prompt, Dialog) else [prompt or ""]))
        if length > limits.prompt_chars:
            raise PromptError(
                f"expected a prompt of at most {limits.prompt_chars} characters, got {length}", "shorten the prompt"
            )

    def _limited(self, options: GenerationOptions) -> GenerationOptions:
        """Limits the length that the bundle or ``min_new_tokens`` gives."""
        most = self.limits.new_tokens
        if options.max_new_tokens <= most:
            return options
        return replace(options, max_new_tokens=most, min_new_tokens=min(options.min_new_tokens, most))

    async def _body(self, request: HttpRequest, most: int | None = None) -> bytes:
        share: BodyShare = request.scope[SHARE]
        most = self.limits.body_bytes if most is None else most
        return await read_body(request.headers, request.receive, share, most, self.connections)

    async def _finished(self, client: WaitingClient) -> CaptionResult:
        while await client.next() is not None:
            pass
        return self._counted(client)

    async def _chunks(
        self, client: WaitingClient, submit: Callable[[], None], answer: Answer, names: Mapping[str, str]
    ) -> AsyncGenerator[dict[str, Any]]:
        """The chunks of a streamed answer. A late error is an object as well, and the last one."""
        async with client:
            submit()
            piece = await client.next()
            if piece is None:
                client.outcome()
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
            except ClientGoneError:
                pass
            finally:
                if outcome:
                    self.counts[outcome] += 1

    def _counted(self, client: WaitingClient) -> CaptionResult:
        result = client.outcome()
        self.metrics.add_caption(client.caption)
        self.engine.succeeded()
        return result

    def _described(self) -> dict[str, Any]:
        return {"id": self.model, "object": "model", "created": self._made, "owned_by": "blip2edge"}

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
