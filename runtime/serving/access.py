"""Checks whether a request is allowed (API key, host names, origins of web pages); sets headers for browsers."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope

from blip2edge.errors import UsageError, option, shown
from blip2edge.runtime.serving.chat_keys import RequestError, error_json

Send = Callable[[Any], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names under which a browser on this machine calls a server that listens on the loopback address."""

ORIGIN = r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]*A-Z]+)(:\d{1,5})?"
"""Regular expression of a page's origin, written as browsers send it (RFC 6454, section 6.2)."""

OPEN = ("/", "/health")
"""Paths that need no API key: the page on which a user enters the key, and the health check."""


@dataclass(frozen=True)
class Access:
    """The rules that decide which requests the server answers.

    Attributes:
        api_key: Key that a request must send as ``Authorization: Bearer KEY``; empty for none.
        origins: Origins of other pages that may use the server, such as ``https://example.org``; ``*`` for all.
        hosts: Names that a request's ``Host`` header may have; empty for any. A request with another name is
            refused, so that no page can use the server under a name of its own (DNS rebinding).

    Raises:
        UsageError: An origin or a host name is not written as browsers write it.
    """

    api_key: str = ""
    origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Checks how origins and host names are written; they are later compared letter by letter."""
        for origin in self.origins:
            if origin not in ("*", "null") and not re.fullmatch(ORIGIN, origin):
                raise UsageError(
                    f"expected {option('cors')} to be an origin, SCHEME://HOST[:PORT] in small letters, or *, got "
                    f"{origin!r}",
                    "give it as in https://example.org:8443, without a path and without a slash at its end",
                )
        for host in self.hosts:
            if host_name(f"[{host}]" if host.count(":") > 1 else host) != host or "/" in host or not host:
                raise UsageError(
                    f"expected {option('allowed_host')} to be the name of a host without a port, got {host!r}",
                    "give it as in example.org",
                )


class AccessControl:
    """ASGI middleware that applies the rules; a request that breaks a rule gets an error in OpenAI's format.

    Args:
        app: The application.
        access: The rules.
        page: The HTML page of the server; browsers are told to run no other script than that of this page.
    """

    def __init__(self, app: ASGIApp, access: Access, page: str) -> None:
        self._access = access
        self._policy = content_security_policy(page)
        guarded: ASGIApp = self._guarded
        self._app = app
        if access.origins:
            guarded = CORSMiddleware(
                guarded,
                allow_origins=list(access.origins),
                allow_methods=["GET", "HEAD", "POST"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            )
        self._outer = guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one connection, as the ASGI specification describes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message.setdefault("headers", []))
                headers.setdefault("x-content-type-options", "nosniff")
                headers.setdefault("content-security-policy", self._policy)
                headers.setdefault("referrer-policy", "no-referrer")
            await send(message)

        await self._outer(scope, receive, with_headers)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        if refusal is None:
            await self._app(scope, receive, send)
            return
        headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
        await JSONResponse(error_json(refusal), refusal.status, headers)(scope, receive, send)

    def _refusal(self, path: str, headers: Mapping[str, str]) -> RequestError | None:
        """Returns the error if a request breaks a rule; None if it is allowed."""
        host = headers.get("host", "")
        if self._access.hosts and host and host_name(host) not in self._access.hosts:
            return RequestError(
                f"expected a Host header with a name of this server, got {host_name(host) or shown(host)}",
                "start the server with --allowed-host and this name, or use a name that the server allows",
                code="host_not_allowed",
                status=421,
            )
        origin = headers.get("origin", "")
        own = re.sub(r"^\w+://", "", origin) == host
        if origin and not own and not {origin, "*"} & set(self._access.origins):
            return RequestError(
                f"pages of the origin {origin} may not use this server",
                "start the server with --cors and this origin",
                code="origin_not_allowed",
                status=403,
            )
        if self._access.api_key and path not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.encode(), self._access.api_key.encode()):
                return RequestError(
                    "expected the API key in the header Authorization: Bearer KEY",
                    "send the key that the server was started with",
                    code="invalid_api_key",
                    status=401,
                )
        return None


def host_name(host: str) -> str:
    """Returns the name in a ``Host`` header, in lower case and without the port: ``[::1]:8000`` is ``::1``.

    Returns an empty text for a malformed header.
    """
    found = re.fullmatch(r"\[(.*)\](?::\d*)?|([^:]*)(?::\d*)?", host.strip())
    return "" if found is None else (found[1] or found[2] or "").lower()


def content_security_policy(page: str) -> str:
    """Returns the ``Content-Security-Policy`` of a page: only its inline scripts run, and it calls only this server."""
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    ]
    scripts = " ".join(hashes) or "'none'"
    return (
        f"default-src 'self'; script-src {scripts}; style-src 'unsafe-inline'; img-src 'self' blob: data:; "
        "media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )
