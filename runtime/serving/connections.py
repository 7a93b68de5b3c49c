"""Limits the server's connections: a protocol class for uvicorn with time limits and a largest number of connections.

uvicorn's own protocol limits only the idle time between two requests. The protocol here has four limits more. It limits
the time in which a header must arrive, and the time in which a client must read its answer. If there are too many
connections, it closes the one that has waited longest for a request. If a request was answered before its whole body
was read (status 413 or 408), it closes the connection.
"""

from __future__ import annotations

import asyncio
import json
import resource
import ssl
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from blip2edge.errors import Blip2EdgeError
from blip2edge.limits import ConnectionLimits
from blip2edge.runtime.serving.chat_keys import RequestError, error_json

LINGER_S = 2.0
"""Seconds in which a client can read an answer that was sent before the client had sent its whole body."""

MOST_LINGERING = 100
"""Largest number of refused connections that stay open until the client has read the error; also the largest number of
closed connections with unsent data. Further connections are closed at once."""

SPARE_FILES = 128 + 2 * MOST_LINGERING
"""Number of file descriptors that are needed besides those of open connections: for graphs, logs, pictures, the event
loop, and refused connections."""


class ConnectionTable:
    """Lists the connections of a server, by their state, and closes some of them if there are too many.

    Args:
        limits: The limits of connections.
        closed: Called with the reason for each connection that is closed because of a limit.
    """

    def __init__(self, limits: ConnectionLimits, closed: Callable[[str], None]) -> None:
        self.limits, self.closed = limits, closed
        self.open: set[GuardedProtocol] = set()
        self.refused: set[GuardedProtocol] = set()
        self.waiting: dict[GuardedProtocol, None] = {}
        self.ending: dict[GuardedProtocol, None] = {}
        self.handshakes: dict[asyncio.Transport, None] = {}

    def __len__(self) -> int:
        """Returns the number of open connections, TLS handshakes included."""
        return len(self.open) + len(self.handshakes)

    def begin_handshake(self, transport: asyncio.Transport, done: asyncio.Future[None]) -> None:
        """Counts a TLS handshake until it is done; if too many are open, ends the oldest handshake."""
        self.handshakes[transport] = None
        done.add_done_callback(lambda _: self.handshakes.pop(transport, None))
        if len(self.handshakes) > most_handshakes(self.limits.connections):
            oldest = next(iter(self.handshakes))
            del self.handshakes[oldest]
            self.closed("too_many_handshakes")
            # The socket of a new transport is not connected to it before the next turn of the loop.
            done.get_loop().call_soon(oldest.abort)

    def add(self, connection: GuardedProtocol) -> None:
        """Adds a connection; above the limit, closes the connection that has waited longest for a request."""
        self.open.add(connection)
        self.waiting[connection] = None
        if len(self.open) > self.limits.connections:
            next(iter(self.waiting)).refuse(503, "too_many_connections", "too many connections are open")

    def remove(self, connection: GuardedProtocol) -> None:
        """Removes a closed connection."""
        self.open.discard(connection)
        self.refused.discard(connection)
        self.waiting.pop(connection, None)
        self.ending.pop(connection, None)

    def end(self, connection: GuardedProtocol) -> None:
        """Lists a connection as closed with unsent data; if too many are listed, aborts the oldest."""
        self.refused.discard(connection)
        if connection not in self.open:
            self.ending[connection] = None
        if len(self.ending) > MOST_LINGERING:
            oldest = next(iter(self.ending))
            del self.ending[oldest]
            oldest.transport.abort()


class GuardedProtocol(H11Protocol):
    """One connection of a client, with time limits; replaces uvicorn's own protocol class.

    Args:
        table: The table of connections.
        *arguments: Arguments from uvicorn.
        **named: Keyword arguments from uvicorn.
    """

    def __init__(self, table: ConnectionTable, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._table = table
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._received = False  # a byte of the request that is awaited
        self._lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called when the connection is open: starts the time limit of the first header."""
        super().connection_made(transport)
        self._table.add(self)
        self._start("header", self._table.limits.header_s, self._header_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the connection is closed: stops all timers."""
        self._lost = True
        for name in list(self._timers):
            self._stop(name)
        self._table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with received bytes; the first byte of a request starts the time limit of its header."""
        if self.transport.is_closing() or self in self._table.refused:
            return
        if self in self._table.waiting and not self._received:
            self._received = True
            self._start("header", self._table.limits.header_s, self._header_late)
        super().data_received(data)

    def handle_events(self) -> None:
        """Called after bytes were parsed; if a header is complete, stops its time limit."""
        super().handle_events()
        cycle: Any = self.cycle  # None before the first request
        if cycle is not None and not isinstance(cycle.transport, GentleTransport):
            cycle.transport = GentleTransport(self)
        if self.conn.their_state is not h11.IDLE:
            self._stop("header")
            self._table.waiting.pop(self, None)
        elif "linger" in self._timers:  # the body has ended after its answer
            self._close("body_not_read")

    def on_response_complete(self) -> None:
        """Called after an answer: waits for the next request, or closes the connection if the body was not all read."""
        unread = self.conn.their_state is h11.SEND_BODY
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if unread:
            self._unset_keepalive_if_required()
            self._start("linger", LINGER_S, partial(self._close, "body_not_read"))
        elif self.conn.their_state is h11.IDLE:
            self._received = bool(self.conn.trailing_data[0])
            self._table.waiting.pop(self, None)
            self._table.waiting[self] = None
            if self._received:
                self._start("header", self._table.limits.header_s, self._header_late)

    def pause_writing(self) -> None:
        """Called when the client does not read what was sent: starts the time limit for reading."""
        super().pause_writing()
        self._start("write", self._table.limits.write_s, partial(self._abort, "write_timeout"))

    def resume_writing(self) -> None:
        """Called when the client has read what was sent: stops the time limit for reading."""
        super().resume_writing()
        self._stop("write")

    def timeout_keep_alive_handler(self) -> None:
        """Called when the connection has been idle for too long after an answer: closes it."""
        if not self.transport.is_closing():
            super().timeout_keep_alive_handler()
            self.end()

    def send_400_response(self, msg: str) -> None:
        """Called for bytes that are not HTTP: answers with an error in the server's JSON format."""
        self.refuse(400, "invalid_http", msg.rstrip(".").lower())

    def refuse(self, status: int, code: str, problem: str) -> None:
        """Answers with an error, and closes the connection when the client has read it."""
        self._table.closed(code)
        self._table.remove(self)
        self._stop("header")
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error: Blip2EdgeError = RequestError(problem, code=code, status=status)
            content = json.dumps(error_json(error)).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(content))),
                ("connection", "close"),
                ("x-content-type-options", "nosniff"),
                *([("retry-after", "1")] if status == 503 else []),
            ]
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(content), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.close_gently()

    def close_gently(self) -> None:
        """Closes the connection after :data:`LINGER_S` seconds, in which the client can read the answer.

        If a connection with unread data is closed at once, the client may not get the answer (TCP reset).
        """
        if len(self._table.refused) < MOST_LINGERING and self.transport.can_write_eof():
            self._table.refused.add(self)
            self.transport.write_eof()
            self._start("linger", LINGER_S, self.end)
        else:
            self.end()

    def end(self) -> None:
        """Closes the connection; if the client does not read the unsent data in time, drops the data.

        asyncio alone would keep a closed connection, without a time limit, until its data is sent.
        """
        self.transport.close()
        self._table.end(self)
        if not self._lost:
            self._start("end", self._table.limits.write_s, partial(self._abort, "write_timeout"))

    def _header_late(self) -> None:
        if self._received:
            self.refuse(408, "header_timeout", f"expected the header within {self._table.limits.header_s:g} s")
        else:
            self._close("header_timeout")

    def _close(self, reason: str) -> None:
        self._table.closed(reason)
        self.end()

    def _abort(self, reason: str) -> None:
        self._table.closed(reason)
        self.transport.abort()

    def _start(self, name: str, seconds: float, then: Callable[[], None]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, then)

    def _stop(self, name: str) -> None:
        timer = self._timers.pop(name, None)
        if timer is not None:
            timer.cancel()


class GentleTransport:
    """Replaces a connection's transport while uvicorn answers a request, and changes only :meth:`close`.

    Args:
        connection: The connection.
    """

    def __init__(self, connection: GuardedProtocol) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        """Returns every other attribute of the connection's own transport."""
        return getattr(self._connection.transport, name)

    def close(self) -> None:
        """Closes the connection after an answer, with ``close_gently`` if the body was not read to its end."""
        if self._connection.conn.their_state is h11.SEND_BODY:
            self._connection.close_gently()
        else:
            self._connection.end()


class ServingLoop(asyncio.SelectorEventLoop):
    """An event loop that limits the time and the number of TLS handshakes, which uvicorn does not limit.

    Args:
        table: The table of connections.
    """

    def __init__(self, table: ConnectionTable) -> None:
        super().__init__()
        self._table = table

    async def create_server(self, *arguments: Any, **named: Any) -> Any:
        """Creates a server as asyncio does, with time limits for the beginning and the end of TLS connections."""
        if isinstance(named.get("ssl"), ssl.SSLContext):
            named.setdefault("ssl_handshake_timeout", self._table.limits.header_s)
            if sys.version_info >= (3, 11):
                named.setdefault("ssl_shutdown_timeout", LINGER_S)
        return await super().create_server(*arguments, **named)

    def _make_ssl_transport(
        self, rawsock: Any, protocol: Any, sslcontext: Any, waiter: Any = None, **named: Any
    ) -> asyncio.Transport:
        """Called by asyncio to begin a TLS handshake, which is counted until ``waiter`` is done.

        asyncio has no public method for this.
        """
        made: Any = super()
        transport: asyncio.Transport = made._make_ssl_transport(rawsock, protocol, sslcontext, waiter, **named)
        self._table.begin_handshake(transport, waiter)
        return transport


def most_handshakes(connections: int) -> int:
    """Returns the largest number of unfinished TLS handshakes in addition to ``connections`` open connections."""
    return max(1, connections // 2)


def allow_files(connections: int) -> int:
    """Raises the system's limit on open files of this process (the soft limit), so that all connections fit.

    Returns:
        The number of connections that fit, at most ``connections``; fewer if the hard limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + most_handshakes(connections) + SPARE_FILES
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == unlimited else max(1, min(connections, (soft - SPARE_FILES) * 2 // 3))
