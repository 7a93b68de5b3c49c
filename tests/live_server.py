"""A server of the command ``serve`` in a thread, for requests over sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blip2edge.cli.serve import _listen, _serve
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving.http import Server
from blip2edge.runtime.serving.models.served import ModelSource

PATIENCE_S = 30.0  # that no test should need


@contextmanager
def live(
    served: Captioner | Sequence[ModelSource], tls: tuple[Path, Path] | None = None, **options: Any
) -> Iterator[tuple[Server, int]]:
    """The server and its port; options are those of ``Server``."""
    server = Server(served, **options)
    with _listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        thread = threading.Thread(target=_serve, args=(server, listening, tls))
        thread.start()
        try:
            yield server, port
        finally:
            server.engine.gave_up()  # ends the loop as an engine that cannot be loaded does
            thread.join(PATIENCE_S)
            server.close()
    assert not thread.is_alive()


@contextmanager
def connected(port: int) -> Iterator[socket.socket]:
    """A connection to the server."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as made:
        yield made


def answered(port: int, sent: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    with connected(port) as made:
        made.sendall(sent)
        return all_of(made)


def all_of(connection: socket.socket) -> bytes:
    """All that comes until the other side closes the connection."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def one_answer(connection: socket.socket) -> bytes:
    """The next answer of a connection that stays open; its length is in its header."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = connection.recv(1)
        assert part, answer
        answer += part
    length = int(answer.lower().partition(b"content-length:")[2].split()[0])
    while length:
        part = connection.recv(length)
        assert part, answer
        answer, length = answer + part, length - len(part)
    return answer
