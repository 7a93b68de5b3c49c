"""The connections of the server: half and slow requests, bodies that are too large, too many connections."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the bundle is exported here")
pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
pytest.importorskip("uvicorn", reason="the server needs the extra serve")

from blip2edge.limits import ConnectionLimits, Limits
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving import transfer
from blip2edge.runtime.serving.connections import (
    SPARE_FILES,
    ConnectionTable,
    GuardedProtocol,
    ServingLoop,
    allow_files,
)
from blip2edge.runtime.serving.http import Server
from tests.http_calls import png_file
from tests.live_server import all_of, answered, connected, live, one_answer
from tests.waiting import until

LAST = b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def captioner(tiny_bundle: Path) -> Captioner:
    return Captioner.load(tiny_bundle, threads=1)


def post(body: bytes = b"", *lines: str, path: str = "/caption") -> bytes:
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode() + body


def head_and_json(answer: bytes) -> tuple[int, bytes, dict[str, str]]:
    """Status, header and error of an answer that is an error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.lower(), json.loads(body)["error"]


Live = tuple[Server, int]


@pytest.fixture(scope="module")
def usual(captioner: Captioner) -> Iterator[Live]:
    with live(captioner) as made:
        yield made


@pytest.fixture(scope="module")
def strict(captioner: Captioner) -> Iterator[Live]:
    """A server with short times and little memory."""
    limits = ConnectionLimits(connections=4, header_s=1.0, body_s=1.0, memory_bytes=3000)
    with live(captioner, limits=Limits(body_bytes=2000), connections=limits) as made:
        yield made


def test_idle_half_headers_leave_good_requests_answered(usual: Live) -> None:
    server, port = usual
    needed = 2400  # both ends of each connection are in this process
    if allow_files(needed) < needed:
        pytest.skip(f"the hard limit of open files (ulimit -Hn) allows fewer than {needed} connections")
    with ExitStack() as opened:
        for _ in range(1100):
            half = opened.enter_context(connected(port))
            half.sendall(b"GET / HTTP/1.1\r\nHos")
        assert answered(port, LAST).startswith(b"HTTP/1.1 200 ")
        picture = png_file()
        sent = post(picture, f"Content-Length: {len(picture)}", "Content-Type: image/png", "Connection: close")
        assert answered(port, sent).startswith(b"HTTP/1.1 200 ")
        text = answered(port, LAST.replace(b"/health", b"/metrics")).decode()
        closed = [line for line in text.splitlines() if line.startswith("blip2edge_connections_closed_total")]
        assert closed[0].startswith('blip2edge_connections_closed_total{reason="too_many_connections"} ')
        assert float(closed[0].split()[1]) >= 100
        assert len(server.metrics.closed) == 1


def test_a_declared_length_is_checked_before_the_body_is_read(usual: Live) -> None:
    server, port = usual
    for more in ((), ("Expect: 100-continue",)):
        with connected(port) as connection:
            connection.sendall(post(b"", "Content-Length: 104857600", *more))
            status, _, error = head_and_json(one_answer(connection))
        assert (status, error["code"]) == (413, "request_too_large")
    closing = post(b"x" * 200_000, "Content-Length: 104857600", "Connection: close")
    assert head_and_json(answered(port, closing))[0] == 413  # no reset, although the body is not read
    until(lambda: server.memory.used == 0)


def test_the_rest_of_a_refused_body_is_not_read_for_long(usual: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2edge.runtime.serving.connections.LINGER_S", 0.1)
    _, port = usual
    with connected(port) as connection:
        connection.sendall(post(b"x" * 100_000, "Content-Length: 104857600"))
        assert head_and_json(all_of(connection))[0] == 413  # and the connection ends


def test_pipelined_requests_are_answered_in_order(usual: Live) -> None:
    one = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    missing = one.replace(b"/health", b"/nothing")
    answer = answered(usual[1], one + missing + one + LAST)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.index(b"HTTP/1.1 200") < answer.index(b"HTTP/1.1 404") < answer.rindex(b"HTTP/1.1 200")


def test_a_chunked_body_is_read_and_bounded(strict: Live, usual: Live) -> None:
    picture = png_file()
    chunked = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (picture[:9], picture[9:])) + b"0\r\n\r\n"
    sent = post(chunked, "Transfer-Encoding: chunked", "Content-Type: image/png", "Connection: close")
    assert answered(usual[1], sent).startswith(b"HTTP/1.1 200 ")
    with connected(strict[1]) as connection:
        connection.sendall(post(b"bb9\r\n" + b"x" * 0xBB9 + b"\r\n", "Transfer-Encoding: chunked"))
        assert head_and_json(one_answer(connection))[0] == 413


def test_no_http(usual: Live) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/x\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        status, head, error = head_and_json(answered(usual[1], sent))
        assert (status, error["code"]) == (400, "invalid_http")
        assert b"connection: close" in head
    long = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000
    assert head_and_json(answered(usual[1], long))[0] == 400


def test_a_late_header(strict: Live) -> None:
    status, _, error = head_and_json(answered(strict[1], b"GET /health HTTP/1.1\r\nHost:"))
    assert (status, error["code"]) == (408, "header_timeout")
    assert answered(strict[1], b"") == b""


def test_a_header_that_trickles_has_the_same_time(strict: Live) -> None:
    with connected(strict[1]) as connection:
        connection.settimeout(10)
        answer = b""
        for byte in b"GET /health HTTP/1.1\r\n" * 20:
            try:
                connection.sendall(bytes([byte]))
            except OSError:
                break
            connection.setblocking(False)
            try:
                answer += connection.recv(65536)
            except BlockingIOError:
                pass
            except OSError:
                break
            connection.settimeout(10)
            if answer:
                break
            time.sleep(0.02)
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_slow_body(strict: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BODY_GRACE_S", 0.1)
    for limit in ("declared", "chunked"):
        line = "Content-Length: 1000" if limit == "declared" else "Transfer-Encoding: chunked"
        with connected(strict[1]) as connection:
            connection.sendall(post(b"3\r\nabc\r\n", line))
            status, _, error = head_and_json(one_answer(connection))
        assert (status, error["code"]) == (408, "request_timeout")
    until(lambda: strict[0].memory.used == 0)  # freed just after the answer


def test_bodies_share_a_memory(strict: Live) -> None:
    server, port = strict
    with ExitStack() as opened:
        slow = [opened.enter_context(connected(port)) for _ in range(2)]
        for connection in slow:
            connection.sendall(post(b"x" * 1400, "Content-Length: 1900"))
        until(lambda: server.memory.used == 2800)
        status, head, error = head_and_json(
            answered(port, post(b"x" * 1000, "Content-Length: 1000", "Connection: close"))
        )
        assert (status, error["code"], error["type"]) == (503, "overloaded", "server_error")
        assert b"retry-after: 1" in head
        assert {head_and_json(one_answer(connection))[0] for connection in slow} == {408}
    until(lambda: server.memory.used == 0)


def test_too_many_busy_connections(strict: Live) -> None:
    server, port = strict
    with ExitStack() as opened:
        busy = [opened.enter_context(connected(port)) for _ in range(4)]
        for connection in busy:
            connection.sendall(post(b"x", "Content-Length: 100"))
        until(lambda: server.memory.used == 4)
        answer = answered(port, LAST)
        status, head, error = head_and_json(answer)
        assert (status, error["code"]) == (503, "too_many_connections")
        assert b"retry-after" in head
    until(lambda: server.metrics.open() == 0)
    assert answered(port, LAST).startswith(b"HTTP/1.1 200 ")


def test_the_limit_of_open_files_is_raised() -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, before[1]))
        assert allow_files(100) == 100
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 100 + 50 + SPARE_FILES
        assert allow_files(10**9) == (before[1] - SPARE_FILES) * 2 // 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_client_that_takes_nothing_is_closed(captioner: Captioner) -> None:
    limits = ConnectionLimits(write_s=0.2)
    with live(captioner, connections=limits) as (server, port), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: a\r\n\r\n" * 1500)
        until(lambda: "write_timeout" in server.metrics.closed)


@pytest.mark.parametrize("how", ["end", "close_gently", "timeout_keep_alive_handler"])
def test_a_closed_connection_waits_a_limited_time_for_its_client(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2edge.runtime.serving.connections.LINGER_S", 0.01)
    reasons: list[str] = []
    table = ConnectionTable(ConnectionLimits(write_s=0.05), reasons.append)

    async def unread() -> None:
        connection, client = await unread_connection(table)
        with client:
            getattr(connection, how)()
            assert connection.transport.get_write_buffer_size() > 0
            deadline = time.monotonic() + 10
            while len(table):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.005)

    asyncio.run(unread())
    assert reasons == ["write_timeout"]


async def unread_connection(table: ConnectionTable) -> tuple[GuardedProtocol, socket.socket]:
    """A connection with unsent data, and its client."""
    uvicorn = pytest.importorskip("uvicorn")
    client, served = socket.socketpair()
    served.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    connection = GuardedProtocol(table, uvicorn.Config(str), uvicorn.server.ServerState(), {})
    await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, served)
    connection.transport.write(b"x" * 60_000)
    return connection, client


def test_few_refused_connections_wait_for_their_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2edge.runtime.serving.connections.MOST_LINGERING", 1)
    table = ConnectionTable(ConnectionLimits(), lambda reason: None)

    async def refused() -> None:
        made = [await unread_connection(table) for _ in range(4)]
        for connection, _ in made:
            connection.refuse(503, "too_many_connections", "too many connections are open")
        await asyncio.sleep(0.01)
        # The first lingers, the last waits for the data to be sent; those in between are aborted.
        assert [connection._lost for connection, _ in made] == [False, True, True, False]
        for connection, client in made:
            connection.transport.abort()
            client.close()
        await asyncio.sleep(0.01)

    asyncio.run(refused())


def test_tls_handshakes_are_counted_and_few() -> None:
    reasons: list[str] = []
    table = ConnectionTable(ConnectionLimits(connections=4), reasons.append)
    loop = ServingLoop(table)

    async def count(expected: int) -> None:
        deadline = time.monotonic() + 10
        while len(table) != expected:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.005)

    async def flood() -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        clients = []
        for number in (1, 2, 2):  # the third one ends the first
            clients.append(await asyncio.open_connection("127.0.0.1", port))
            await count(number)
        assert await clients[0][0].read() == b""
        assert reasons == ["too_many_handshakes"]
        for _, writer in clients:
            writer.close()
        await count(0)
        server.close()
        await server.wait_closed()

    try:
        loop.run_until_complete(asyncio.wait_for(flood(), 20))
    finally:
        loop.close()
