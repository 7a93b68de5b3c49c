"""Connections of the server: a protocol for uvicorn with time limits and a limit on the number of connections.

uvicorn's own protocol limits only the idle time between two requests. The protocol here also limits the time of a
header, closes the oldest waiting connection when there are too many, gives a client limited time to take its answer,
and closes a connection whose body was not read to its end (an answer of 413 or 408).
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
"""Seconds in which a client can still read an answer that came before the end of its body."""

MOST_LINGERING = 100
"""Largest number of refused connections that stay open until their clients have read the answer. The same limit holds
for closed connections whose clients still read. Further connections are closed at once.
"""

SPARE_FILES = 128 + 2 * MOST_LINGERING
"""File descriptors besides those of connections: graphs, logs, pictures, the event loop; and refused connections."""


class ConnectionTable:
    """Lists all connections of a server; also the connections that wait for a request, longest wait first.

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
        """Adds a connection; above the limit, closes the connection that waits longest (perhaps this connection)."""
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
        """Notes a closed connection with unsent data; aborts the oldest such connection if there are too many."""
        self.refused.discard(connection)
        if connection not in self.open:
            self.ending[connection] = None
        if len(self.ending) > MOST_LINGERING:
            oldest = next(iter(self.ending))
            del self.ending[oldest]
            oldest.transport.abort()


class GuardedProtocol(H11Protocol):
    """A connection with limits.

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
        """Begins to wait for the first request."""
        super().connection_made(transport)
        self._table.add(self)
        self._start("header", self._table.limits.header_s, self._header_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends all timers."""
        self._lost = True
        for name in list(self._timers):
            self._stop(name)
        self._table.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Handles a piece of a request; the time limit of a header starts with the header's first byte."""
        if self.transport.is_closing() or self in self._table.refused:
            return
        if self in self._table.waiting and not self._received:
            self._received = True
            self._start("header", self._table.limits.header_s, self._header_late)
        super().data_received(data)

    def handle_events(self) -> None:
        """Handles the received events; a complete header ends the wait for a request."""
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
        """Waits for the next request, or closes a connection whose body is not read to its end."""
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
        """Called when the client does not read what was sent: starts its time limit."""
        super().pause_writing()
        self._start("write", self._table.limits.write_s, partial(self._abort, "write_timeout"))

    def resume_writing(self) -> None:
        """Called when the client has read what was sent: ends its time limit."""
        super().resume_writing()
        self._stop("write")

    def timeout_keep_alive_handler(self) -> None:
        """Closes a connection that has been idle for too long after an answer."""
        if not self.transport.is_closing():
            super().timeout_keep_alive_handler()
            self.end()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP with an error in the server's usual form."""
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
        """Closes the connection; if the client still sends, only after it has read the answer or after some time.

        Closing a connection with unread data at once would discard the answer (TCP reset).
        """
        if len(self._table.refused) < MOST_LINGERING and self.transport.can_write_eof():
            self._table.refused.add(self)
            self.transport.write_eof()
            self._start("linger", LINGER_S, self.end)
        else:
            self.end()

    def end(self) -> None:
        """Closes the connection; unsent data that the client does not read in time is dropped.

        asyncio keeps a closed connection until its data is sent, without a limit.
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
    """The transport that uvicorn uses while it answers a request; replaces the connection's own transport.

    Args:
        connection: The connection; if its body is not read to its end, it is closed by
            :meth:`GuardedProtocol.close_gently`.
    """

    def __init__(self, connection: GuardedProtocol) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        """Returns every other attribute from the connection's own transport."""
        return getattr(self._connection.transport, name)

    def close(self) -> None:
        """Closes the connection after an answer."""
        if self._connection.conn.their_state is h11.SEND_BODY:
            self._connection.close_gently()
        else:
            self._connection.end()


class ServingLoop(asyncio.SelectorEventLoop):
    """An event loop that limits TLS handshakes in time and number: uvicorn does not.

    Args:
        table: The table of connections.
    """

    def __init__(self, table: ConnectionTable) -> None:
        super().__init__()
        self._table = table

    async def create_server(self, *arguments: Any, **named: Any) -> Any:
        """Creates a server as asyncio does, with the limits of time."""
        if isinstance(named.get("ssl"), ssl.SSLContext):
            named.setdefault("ssl_handshake_timeout", self._table.limits.header_s)
            if sys.version_info >= (3, 11):
                named.setdefault("ssl_shutdown_timeout", LINGER_S)
        return await super().create_server(*arguments, **named)

    def _make_ssl_transport(
        self, rawsock: Any, protocol: Any, sslcontext: Any, waiter: Any = None, **named: Any
    ) -> asyncio.Transport:
        """Begins a handshake (asyncio has no public call for it). ``waiter`` is done when the handshake ends."""
        made: Any = super()
        transport: asyncio.Transport = made._make_ssl_transport(rawsock, protocol, sslcontext, waiter, **named)
        self._table.begin_handshake(transport, waiter)
        return transport


def most_handshakes(connections: int) -> int:
    """Returns how many TLS handshakes may be open besides ``connections`` connections."""
    return max(1, connections // 2)


def allow_files(connections: int) -> int:
    """Raises this process's soft limit of open files to the number that connections need, up to the hard limit.

    Returns:
        The number of connections that the limit allows, at most ``connections``.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + most_handshakes(connections) + SPARE_FILES
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < needed:
        soft = needed if hard == unlimited else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == unlimited else max(1, min(connections, (soft - SPARE_FILES) * 2 // 3))
