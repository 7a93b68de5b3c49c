"""``blip2edge serve``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli import interrupt
from blip2edge.cli.flag_groups import add_backend, add_bundle, add_number, print_unsigned
from blip2edge.cli.flag_types import port, positive_number
from blip2edge.cli.messages import print_note
from blip2edge.errors import BackendError, OutputError, UsageError, one_line, option
from blip2edge.packages import require

if TYPE_CHECKING:
    import socket

    from blip2edge.cli.parser import Parser


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
    access = parser.add_argument_group("access", "who may use the server, and over TLS")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get("BLIP2EDGE_API_KEY", argparse.SUPPRESS),
        help="key that requests must send as Authorization: Bearer KEY (default: the environment variable "
        "BLIP2EDGE_API_KEY, else none)",
    )
    access.add_argument(
        "--cors",
        metavar="ORIGIN",
        action="append",
        default=[],
        help="origin of web pages that may use the server, such as https://example.org; *: all; may be repeated",
    )
    access.add_argument(
        "--allowed-host",
        metavar="NAME",
        action="append",
        default=[],
        help="host name that requests may use for the server; may be repeated (default: on a loopback address its own "
        "names, else any name)",
    )
    access.add_argument("--tls-cert", metavar="FILE", type=Path, help="certificate chain in PEM format, to serve https")
    access.add_argument("--tls-key", metavar="FILE", type=Path, help="private key of the certificate in PEM format")


def run(options: argparse.Namespace) -> int:
    """Answer HTTP requests until Ctrl-C."""
    for package in ("starlette", "prometheus_client", "python_multipart"):
        require(package, "serving", BackendError)
    uvicorn = require("uvicorn", "serving", BackendError)
    tls = _tls(options.tls_cert, options.tls_key)
    from blip2edge.runtime.captioning.captioner import Captioner
    from blip2edge.runtime.serving.access import LOOPBACK, Access
    from blip2edge.runtime.serving.http import Server

    listening = _listen(options.host, options.port)
    captioner = Captioner.load(
        options.bundle,
        backend=options.backend,
        threads=options.threads,
        require_signature=options.require_signature,
    )
    print_unsigned(captioner.bundle)
    local, key = options.host in LOOPBACK, getattr(options, "api_key", "")
    hosts = (*LOOPBACK, *options.allowed_host) if local else tuple(options.allowed_host)
    access = Access(key, tuple(options.cors), tuple(name.lower() for name in hosts))
    server = Server(
        captioner, max_batch=options.max_batch, max_waiting=options.queue, deadline=options.deadline, access=access
    )
    host, number = listening.getsockname()[:2]
    print(f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{number}", flush=True)
    if not local and not key:
        print_note("warning: other machines can reach this server, and it has no --api-key")
    config = uvicorn.Config(server, log_level="warning", lifespan="on", timeout_graceful_shutdown=5, **tls)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except (KeyboardInterrupt, interrupt.Interrupted):  # uvicorn raises the signal again when it has ended
        interrupt.forget()
    finally:
        server.close()
        listening.close()
    return 0


def _tls(certificate: Path | None, key: Path | None) -> dict[str, Path]:
    """Makes the TLS options of uvicorn.

    Raises:
        UsageError: One of the two flags is missing, or the files are not a certificate and its key.
    """
    if certificate is None and key is None:
        return {}
    if certificate is None or key is None:
        raise UsageError(f"expected {option('tls_cert')} and {option('tls_key')}, got one of them", "give both")
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        reason = one_line(error)
        raise UsageError(
            f"expected {option('tls_cert')} and {option('tls_key')} to be a certificate and its key in PEM format "
            f"({reason})",
            "check both files",
        ) from error
    return {"ssl_certfile": certificate, "ssl_keyfile": key}


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
