"""``blip2edge serve``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from blip2edge.cli import interrupt
from blip2edge.cli.flag_groups import add_backend, add_bundle, add_number
from blip2edge.cli.flag_types import port, positive_number
from blip2edge.errors import BackendError, OutputError, option
from blip2edge.packages import require

if TYPE_CHECKING:
    import argparse
    import socket

    from blip2edge.cli.parser import Parser

LOCAL = ("127.0.0.1", "localhost", "::1")


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``serve``."""
    add_bundle(parser)
    add_backend(parser)
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="IP address or host name to listen on")
    add_number(parser, "--port", "TCP port to listen on; 0: any free port", 8000, kind=port)
    add_number(parser, "--max-batch", "largest number of captions decoded in one batch", 8)
    add_number(parser, "--queue", "largest number of waiting requests; more are answered with status 503", 64)
    add_number(
        parser,
        "--deadline",
        "time limit of a request in seconds; a request that exceeds it is answered with status 504 (default: no limit)",
        kind=positive_number,
        metavar="S",
    )


def run(options: argparse.Namespace) -> int:
    """Answer HTTP requests until Ctrl-C."""
    for package in ("starlette", "prometheus_client", "python_multipart"):
        require(package, "serving", BackendError)
    uvicorn = require("uvicorn", "serving", BackendError)
    from blip2edge.runtime.captioning.captioner import Captioner
    from blip2edge.runtime.serving.http import Server

    listening = _listen(options.host, options.port)
    captioner = Captioner.load(options.bundle, backend=options.backend, threads=options.threads)
    server = Server(captioner, max_batch=options.max_batch, max_waiting=options.queue, deadline=options.deadline)
    host, port = listening.getsockname()[:2]
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    if options.host not in LOCAL:
        print("warning: other machines can reach this server, and it has no password", file=sys.stderr)
    config = uvicorn.Config(server, log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except (KeyboardInterrupt, interrupt.Interrupted):  # uvicorn raises the signal again when it has ended
        interrupt.forget()
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
