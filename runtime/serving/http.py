"""``blip2edge serve``: captions over HTTP, as a Starlette application on one scheduler for each bundle.

``openapi.py`` lists the routes. A request passes ``RequestLog`` (id, log line, time), then ``AccessControl`` (API key,
host name, origin), then its route. ``transfer.py`` reads its body, which is parsed in a thread beside the event loop.

An error is ``{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}``; ``param`` is the wrong key of the
request, or null. A closed connection cancels its request at the next step. A full queue, and an engine that is being
loaded again, are answered with 503; a missed deadline with 504.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope

from blip2edge.bundle.prompt_spec import PromptSpec
from blip2edge.errors import Blip2EdgeError, ImageError, PromptError
from blip2edge.limits import ConnectionLimits, Limits
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.matcher import Matcher
from blip2edge.runtime.captioning.request import CaptionResult, Request
from blip2edge.runtime.captioning.restart import Backoff, RestartingCaptioner
from blip2edge.runtime.captioning.scheduler import Scheduler
from blip2edge.runtime.serving.access import Access, AccessControl
from blip2edge.runtime.serving.chat_keys import NAMES, RequestError, check_type, classified, error_json
from blip2edge.runtime.serving.json_bodies import json_object
from blip2edge.runtime.serving.models.embeddings_api import (
    check_pairs,
    check_vectors,
    embed_steps,
    embeddings_answer,
    match_steps,
    read_embeddings,
)
from blip2edge.runtime.serving.models.match_queue import MatchCall, Steps
from blip2edge.runtime.serving.models.served import ModelSource, Queueing, ServedCaptioner, ServedMatcher, ServedModels
from blip2edge.runtime.serving.openai_api import Answer, read_request
from blip2edge.runtime.serving.openapi import CHAT, EMBEDDINGS, ENDPOINTS, EVENT_KEYS, MATCH, document, route_name
from blip2edge.runtime.serving.picture_forms import (
    FORM_TYPE,
    JSON_TYPE,
    media_type,
    read_caption_request,
    read_match_request,
)
from blip2edge.runtime.serving.request_log import RequestLog
from blip2edge.runtime.serving.transfer import BodyMemory, ClientGoneError, WaitingClient, event_lines, read_body

PAGE = Path(__file__).with_name("page.html")

CODES = {404: "not_found", 405: "method_not_allowed"}
"""``code`` of an error for a path or a method that has no route, by HTTP status."""

RECENT, MAX_EVENT = 100, 64 << 10
"""Number of captions from ``watch --post`` that the page shows, and the largest size of such a caption in bytes."""

FIELDS = {CHAT: "messages", EMBEDDINGS: "input", MATCH: "image"}
"""For each route, the key that an error about a picture or a text names in ``param``, if it names no other key."""

SHARE = "blip2edge.body_share"
"""Key of the ASGI scope for the object that counts the bytes of the request's body (:class:`BodyShare`)."""


class Server:
    """The ASGI application of ``blip2edge serve``.

    Args:
        served: A loaded bundle, or a list of several bundles with their names.
        load: Loads a single bundle again if its engine is broken. If None, later requests to the engine are refused.
        max_batch, max_waiting: As in :class:`Scheduler`.
        deadline: Time limit in seconds for a caption, if the request sets no limit; None for no limit.
        access: Rules of access; None allows all clients except web pages of other origins.
        limits: The largest request.
        connections: Limits of request bodies; ``connections.py`` applies the other limits in this object.
        backoff: The waiting times between attempts to load the engine again.
        log: File to which the request log is written; None for no log.
    """

    def __init__(
        self,
        served: Captioner | Matcher | Sequence[ModelSource],
        *,
        load: Callable[[], Captioner | Matcher] | None = None,
        max_batch: int = 8,
        max_waiting: int = 64,
        deadline: float | None = None,
        access: Access | None = None,
        limits: Limits | None = None,
        connections: ConnectionLimits | None = None,
        backoff: Backoff | None = None,
        log: TextIO | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.connections = connections or ConnectionLimits()
        self.memory = BodyMemory(self.connections.memory_bytes)
        sources = [ModelSource(served, load)] if isinstance(served, (Captioner, Matcher)) else served
        queueing = Queueing(max_batch, max_waiting, deadline, self.limits, backoff or Backoff())
        self.models = ServedModels(sources, queueing, lambda: self.memory.used)
        self.metrics = self.models.metrics
        self._events: deque[dict[str, str]] = deque(maxlen=RECENT)
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
    def model(self) -> str:
        """Returns the name of the first bundle."""
        return next(iter(self.models)).name

    @property
    def engine(self) -> RestartingCaptioner:
        """Returns the captioner with its scheduler, for the first bundle that can caption pictures."""
        return self.models.captioner(None).engine

    @property
    def captioner(self) -> Captioner:
        """Returns the captioner in use, for the first bundle that can caption pictures."""
        return self.engine.captioner

    @property
    def scheduler(self) -> Scheduler:
        """Returns the scheduler in use, for the first bundle that can caption pictures."""
        return self.engine.scheduler

    @property
    def counts(self) -> dict[str, int]:
        """Returns the numbers of requests by their outcome."""
        return self.metrics.counts

    def close(self) -> None:
        """Cancels all open requests."""
        self.models.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """Handles one connection, as the ASGI specification describes; ``headers`` may be missing."""
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
        body = self.models.health()
        return JSONResponse(body, 200) if body["status"] == "ok" else JSONResponse(body, 503, {"retry-after": "1"})

    async def _metrics(self, request: HttpRequest) -> Response:
        content, kind = self.metrics.text(request.headers.get("accept", ""))
        return Response(content, headers={"content-type": kind})

    async def _openapi(self, _request: HttpRequest) -> Response:
        return JSONResponse(document(self.limits, needs_key=self._needs_key))

    async def _models(self, _request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [model.described() for model in self.models]})

    async def _model(self, request: HttpRequest) -> Response:
        return JSONResponse(self.models.by_name(request.path_params["name"]).described())

    async def _caption(self, request: HttpRequest) -> Response:
        return await self._captioned(request, "prompt")

    async def _ask(self, request: HttpRequest) -> Response:
        return await self._captioned(request, "question")

    async def _captioned(self, request: HttpRequest, text: str) -> Response:
        body = await self._body(request, self.models.captioner)
        read = partial(read_caption_request, body, request.headers, request.query_params, text, self.limits)
        wanted = await asyncio.to_thread(read) if media_type(request.headers) in (FORM_TYPE, JSON_TYPE) else read()
        model = request.state.model = self.models.captioner(wanted.model)
        prompt = wanted.text
        if text == "question":
            if prompt is None:
                raise RequestError("the question is missing", "send one", field=text, code="missing_required_parameter")
            prompt = model.captioner.prompts.question(prompt)
        client: WaitingClient[Request] = WaitingClient(request.receive)
        async with client:
            model.submit(client, wanted.pictures, prompt, wanted.options, wanted.deadline)
            return JSONResponse((await self._finished(client, model)).to_json())

    async def _chat(self, request: HttpRequest) -> Response:
        _check_json(request, "send pictures as data: URLs in the messages, or use /caption")
        body = await self._body(request, self.models.captioner)

        def spec(name: str | None) -> PromptSpec:
            return self.models.captioner(name).captioner.prompts.spec

        wanted = await asyncio.to_thread(read_request, body, spec, self.limits)
        request.state.names = wanted.names
        model = request.state.model = self.models.captioner(wanted.model)
        prompt = model.captioner.prompts.question(str(wanted.prompt)) if wanted.ask else wanted.prompt
        answer = Answer.to(wanted, model.name, model.captioner.tokenizer)
        client: WaitingClient[Request] = WaitingClient(request.receive)
        submit = partial(model.submit, client, wanted.images, prompt, wanted.options, wanted.deadline)
        if not wanted.stream:
            async with client:
                submit()
                return JSONResponse(answer.completion(await self._finished(client, model)))
        chunks = self._chunks(client, model, submit, answer, wanted.names)
        first = await anext(chunks)  # an error before the first token has its own HTTP status
        headers = {"content-type": "text/event-stream", "cache-control": "no-cache"}
        return StreamingResponse(event_lines(first, chunks), headers=headers)

    async def _recent(self, _request: HttpRequest) -> Response:
        return JSONResponse({"data": list(self._events)})

    async def _post(self, request: HttpRequest) -> Response:
        values = json_object(await self._body(request, None, MAX_EVENT), self.limits)
        kept = {name: values[name] for name in EVENT_KEYS if values.get(name) is not None}
        if "text" not in kept:
            raise RequestError(
                "the field text is missing", "add it to the request", field="text", code="missing_required_parameter"
            )
        for name, value in kept.items():
            check_type(name, value, str, "a text")
        self._events.append(kept)
        return JSONResponse(kept)

    async def _embeddings(self, request: HttpRequest) -> Response:
        _check_json(request, 'send pictures as {"image": "data:image/...;base64,..."} in input')
        body = await self._body(request, self.models.matcher)
        wanted = await asyncio.to_thread(read_embeddings, body, self.limits)
        model = request.state.model = self.models.matcher(wanted.model)
        check_vectors(model.name, wanted, model.engine.matcher)
        inputs = list(wanted.inputs)
        steps = partial(embed_steps, inputs=inputs, batch_size=model.queueing.max_batch)
        return await self._computed(
            request, model, steps, inputs, wanted.deadline, partial(embeddings_answer, model.name, wanted)
        )

    async def _match(self, request: HttpRequest) -> Response:
        body = await self._body(request, self.models.matcher)
        read = partial(read_match_request, body, request.headers, request.query_params, self.limits)
        wanted = await asyncio.to_thread(read)
        model = request.state.model = self.models.matcher(wanted.model)
        check_pairs(wanted, self.limits)
        pictures = list(wanted.pictures)
        steps = partial(match_steps, pictures=pictures, texts=wanted.texts, batch_size=model.queueing.max_batch)

        def answer(pairs: list[Any]) -> dict[str, Any]:
            return {"object": "list", "data": pairs, "model": model.name}

        return await self._computed(request, model, steps, pictures, wanted.deadline, answer)

    # Captions and calls

    async def _computed(
        self, request: HttpRequest, model: ServedMatcher, steps: Steps, inputs: list[Any], deadline: float | None,
        answer: Callable[[list[Any]], dict[str, Any]],
    ) -> Response:  # fmt: skip
        client: WaitingClient[MatchCall] = WaitingClient(request.receive)
        async with client:
            model.submit(client, steps, inputs, deadline)
            await client.next()
            response = await asyncio.to_thread(lambda: JSONResponse(answer(client.outcome())))
            model.counted(client.pending)
            return response

    async def _body(
        self,
        request: HttpRequest,
        find: Callable[[str | None], ServedCaptioner | ServedMatcher] | None,
        most: int | None = None,
    ) -> bytes:
        """Reads the body. It is not read if the only bundle that may answer has no room or cannot answer.

        Args:
            request: The request.
            find: Finds the bundle that answers, by its name; None for a request that needs no bundle.
            most: Largest number of bytes; None for the limit of pictures.
        """
        name = request.query_params.get("model")
        if find is not None and (len(self.models) == 1 or name is not None):
            model = request.state.model = find(name)
            model.engine.ready().check_room()
        most = self.limits.body_bytes if most is None else most
        return await read_body(request.headers, request.receive, request.scope[SHARE], most, self.connections)

    async def _finished(self, client: WaitingClient[Request], model: ServedCaptioner) -> CaptionResult:
        while await client.next() is not None:
            pass
        return _counted(client, model)

    async def _chunks(
        self,
        client: WaitingClient[Request],
        model: ServedCaptioner,
        submit: Callable[[], None],
        answer: Answer,
        names: Mapping[str, str],
    ) -> AsyncGenerator[dict[str, Any]]:
        """Yields the chunks of a streamed answer. An error after the first chunk is sent as the last object."""
        async with client:
            submit()
            piece = await client.next()
            if piece is None:
                client.outcome()
            outcome = "cancelled"
            try:
                yield answer.chunk("", role=True)
                while piece is not None:
                    yield answer.chunk(piece, client.pending.generation)
                    piece = await client.next()
                outcome = "failed"
                result = _counted(client, model)
                outcome = ""
                yield answer.last_chunk(result)
                if answer.include_usage:
                    yield answer.usage_chunk(result)
            except Blip2EdgeError as error:
                yield error_json(error, names)
            except ClientGoneError:
                pass
            finally:
                if outcome:
                    model.metrics.counts[outcome] += 1

    # Errors

    async def _refused(self, request: HttpRequest, error: Blip2EdgeError) -> Response:
        status = classified(error)[0]
        self._count(request, "failed" if status in (500, 504) else "refused")
        path = request.url.path
        names = getattr(request.state, "names", NAMES if path == CHAT else {"deadline": "deadline_s"})
        content = error_json(error, names)
        if path in FIELDS and isinstance(error, (ImageError, PromptError)):
            content["error"]["param"] = FIELDS[path] if path == CHAT else error.field or FIELDS[path]
        return JSONResponse(content, status, {"retry-after": "1"} if status == 503 else None)

    def _count(self, request: HttpRequest, outcome: str) -> None:
        model = getattr(request.state, "model", None)
        (self.counts if model is None else model.metrics.counts)[outcome] += 1

    async def _failed(self, request: HttpRequest, error: Exception) -> Response:
        self._count(request, "failed")
        return JSONResponse(error_json(Blip2EdgeError(f"the server failed ({type(error).__name__})")), 500)

    async def _no_route(self, request: HttpRequest, error: HTTPException) -> Response:
        if error.headers and "Allow" in error.headers:  # of the first route with this path
            methods = {one.method for one in ENDPOINTS if one.route == request.url.path}
            error.headers = {"Allow": ", ".join(sorted({*error.headers["Allow"].split(", "), *methods}))}
        if request.method == "OPTIONS" and error.headers and "Allow" in error.headers:
            return Response(status_code=204, headers={"Allow": f"{error.headers['Allow']}, OPTIONS"})
        what = RequestError(
            f"there is no {request.method} {request.url.path}",
            f"allowed are {error.headers['Allow']}" if error.headers and "Allow" in error.headers else None,
            code=CODES.get(error.status_code, "invalid_request"),
        )
        return JSONResponse(error_json(what), error.status_code, error.headers)

    async def _gone(self, request: HttpRequest, _error: Exception) -> None:
        self._count(request, "cancelled")


def _check_json(request: HttpRequest, fix: str) -> None:
    """Raises RequestError if the body's content type says that it is a form or a file, not JSON."""
    kind = media_type(request.headers)
    if kind == FORM_TYPE or kind.startswith(("image/", "audio/", "video/")):
        raise RequestError(
            f"expected a body of the type application/json, got {kind}", fix, code="unsupported_media_type", status=415
        )


def _counted(client: WaitingClient[Request], model: ServedCaptioner) -> CaptionResult:
    result: CaptionResult = client.outcome()
    model.counted(client.pending)
    return result
