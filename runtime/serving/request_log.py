"""Gives each request an id, writes a line of the request log, and measures the time for the metrics."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from typing import Any, TextIO

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope

log = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestLog:
    """ASGI middleware: gives each answer a header ``X-Request-ID``, and writes a line of JSON for each request.

    If the client sends an id, it is used if it has 1 to 64 letters, digits, dots, hyphens and underscores. The lines
    contain no query, headers or body, so that no API key, prompt or picture gets into the log.

    Args:
        app: The application.
        file: File to which the lines are written; None for no log.
        observe: Called with method, path, status and seconds of each answer.
    """

    def __init__(self, app: ASGIApp, file: TextIO | None, observe: Callable[[str, str, int, float], None]) -> None:
        self._app, self._file, self._observe = app, file, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Callable[[Any], Awaitable[None]]) -> None:
        """Handles one connection, as the ASGI specification describes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        start, status, size = time.perf_counter(), 0, 0

        async def observed(message: Any) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(raw=message.setdefault("headers", []))[REQUEST_ID] = request_id
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, observed)
        finally:
            seconds = time.perf_counter() - start
            self._observe(scope["method"], scope["path"], status, seconds)
            self._write(scope, request_id, status, size, seconds)

    def _write(self, scope: Scope, request_id: str, status: int, size: int, seconds: float) -> None:
        if self._file is None:
            return
        client = scope.get("client")
        line = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"],
            "status": status or None,  # None: the client went before the answer
            "bytes": size,
            "ms": round(seconds * 1e3, 3),
            "id": request_id,
        }
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            log.warning("the request log cannot be written (%s); it ends here", error)
            self._file = None
