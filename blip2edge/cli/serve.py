"""``blip2edge serve``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.flag_groups import add_backend
from blip2edge.cli.flag_types import non_negative_int, positive_int, positive_number
from blip2edge.errors import BackendError, OutputError, option
from blip2edge.packages import require

if TYPE_CHECKING:
    import argparse
    import socket

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``serve``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    add_backend(parser)
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument(
        "--port",
        metavar="N",
        type=non_negative_int,
        default=8000,
        help="port to listen on (8000); 0: a free one",
    )
    parser.add_argument(
        "--max-batch", metavar="N", type=positive_int, default=8, help="captions decoded in one batch (8)"
    )
    parser.add_argument(
        "--queue",
        metavar="N",
        type=positive_int,
        default=64,
        help="requests that may wait (64); more are answered with status 503",
    )
    parser.add_argument(
        "--deadline",
        metavar="S",
        type=positive_number,
        help="seconds within which a caption must be finished; later ones are answered with status 504",
    )


def run(options: argparse.Namespace) -> int:
    """Answer HTTP requests until Ctrl-C."""
    uvicorn = require("uvicorn", "serving", BackendError)
    from blip2edge.runtime.captioning.captioner import Captioner
    from blip2edge.runtime.serving.http import Server

    listening = _listen(options.host, options.port)
    captioner = Captioner.load(options.bundle, backend=options.backend, threads=options.threads)
    server = Server(captioner, max_batch=options.max_batch, max_waiting=options.queue, deadline=options.deadline)
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if options.host not in LOCAL:
        print("reachable from other machines; there is no password", file=sys.stderr)
    config = uvicorn.Config(server, log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        server.close()
        listening.close()
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. It is opened before the model is loaded, so that a port in use is an error at once.

    Raises:
        OutputError: The address or the port cannot be used.
    """
    import socket

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # clients that connect while the model loads wait for it
    except OSError as error:
        listening.close()
        raise OutputError(
            f"cannot listen on {host}:{port} ({error.strerror or error})",
            f"give another {option('host')} or {option('port')}",
        ) from error
    return listening
