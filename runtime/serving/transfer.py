"""Reads request bodies of limited size, and sends pieces of text to a client, which may close its connection."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from concurrent.futures import CancelledError
from contextlib import aclosing, contextmanager
from typing import Any, Generic, TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive

from blip2edge.errors import OverloadError
from blip2edge.limits import BODY_GRACE_S, ConnectionLimits
from blip2edge.runtime.captioning.request import Pending
from blip2edge.runtime.serving.chat_keys import RequestError

Submitted = TypeVar("Submitted", bound=Pending[Any])


class ClientGoneError(Exception):
    """Raised if the client has closed the connection, so that no answer is needed."""


class BodyMemory:
    """Limits the total memory for the bodies of all requests that are not answered yet.

    Args:
        most: Largest number of bytes of all these bodies together.

    Attributes:
        used: Number of bytes that these bodies have now.
    """

    def __init__(self, most: int) -> None:
        self.most, self.used = most, 0

    @contextmanager
    def share(self) -> Iterator[BodyShare]:
        """Makes the object that counts one request's bytes; the end of the ``with`` block subtracts them again."""
        share = BodyShare(self)
        try:
            yield share
        finally:
            self.used -= share.bytes


class BodyShare:
    """Counts the bytes of one request's body, as a part of the total in :class:`BodyMemory`."""

    def __init__(self, memory: BodyMemory) -> None:
        self._memory, self.bytes = memory, 0

    def add(self, count: int) -> None:
        """Counts ``count`` more bytes of the request's body.

        Raises:
            RequestError: All bodies together would have too many bytes (status 503).
        """
        if self._memory.used + count > self._memory.most:
            raise RequestError(
                f"the bodies of open requests have {self._memory.used} bytes, at most {self._memory.most} are allowed",
                "try again later",
                code="overloaded",
                status=503,
            )
        self._memory.used += count
        self.bytes += count


async def read_body(headers: Headers, receive: Receive, share: BodyShare, most: int, limits: ConnectionLimits) -> bytes:
    """Reads a request's body. A declared length is checked before any byte is read.

    Args:
        headers: Headers of the request.
        receive: The ASGI connection's function ``receive``.
        share: Counts the bytes.
        most: Largest number of bytes.
        limits: Total time and rate.

    Raises:
        RequestError: The body is too large (413), too slow (408), or memory for bodies is used up (503).
        ClientGoneError: The client has closed the connection.
    """
    declared = headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most:
        raise _too_large(most, declared)
    loop = asyncio.get_running_loop()
    start, body = loop.time(), bytearray()
    while True:
        allowed = min(limits.body_s, BODY_GRACE_S + len(body) / limits.body_rate)
        try:
            message = await asyncio.wait_for(receive(), max(0.001, start + allowed - loop.time()))
        except asyncio.TimeoutError as error:
            raise RequestError(
                f"expected the body within {limits.body_s:g} s and at {limits.body_rate} bytes per second, "
                f"got {len(body)} bytes in {loop.time() - start:.0f} s",
                "send it faster",
                code="request_timeout",
                status=408,
            ) from error
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        part = message.get("body", b"")
        if len(body) + len(part) > most:
            raise _too_large(most, "more")
        share.add(len(part))
        body += part
        if not message.get("more_body", False):
            return bytes(body)


def _too_large(most: int, got: str) -> RequestError:
    return RequestError(
        f"expected a body of at most {most} bytes, got {got}",
        "scale the picture down",
        code="request_too_large",
        status=413,
    )


class WaitingClient(Generic[Submitted]):
    """Represents a client that waits for an answer; other threads pass it pieces of the text.

    The object also notices if the client closes the connection. At the end of the ``async with`` block, the client's
    request is cancelled if it is not finished.

    Attributes:
        pending: The client's request, after it was submitted to a queue.
    """

    pending: Submitted

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()

    async def __aenter__(self) -> WaitingClient[Submitted]:
        """Starts to watch whether the connection is closed."""
        self._gone = asyncio.ensure_future(self._disconnected())
        return self

    async def __aexit__(self, *_: object) -> None:
        """Cancels the client's request if it is not finished."""
        self._gone.cancel()
        if hasattr(self, "pending"):
            self.pending.cancel()

    async def _disconnected(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    def put(self, piece: str | None) -> None:
        """Passes a piece of the text to the client, or None after the last piece; any thread may call this method."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def next(self) -> str | None:
        """Waits for the next piece of the text and returns it; returns None after the last piece.

        The wait also ends when the request's deadline passes. Raises ClientGoneError if the connection is closed.
        """
        piece = asyncio.ensure_future(self._pieces.get())
        try:
            while not piece.done():
                left = None
                if self.pending.expires is not None and not self.pending.over:  # its end is already queued otherwise
                    left = max(0.0, self.pending.expires - time.monotonic())
                await asyncio.wait({self._gone, piece}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if self._gone.done() and not piece.done():
                    raise ClientGoneError
            return piece.result()
        finally:
            piece.cancel()

    def outcome(self) -> Any:
        """Returns the result of the client's finished request, or raises the error with which it ended."""
        try:
            return self.pending.result(0)
        except CancelledError as error:  # the server is closing
            raise OverloadError("the server is closing", "try again later") from error


async def event_lines(first: dict[str, Any], events: AsyncGenerator[dict[str, Any]]) -> AsyncIterator[str]:
    """Formats server-sent events; ``[DONE]`` follows the last event, unless that event is an error."""
    event = first
    yield _line(event)
    async with aclosing(events):
        async for event in events:
            yield _line(event)
    if "error" not in event:
        yield "data: [DONE]\n\n"


def _line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"
