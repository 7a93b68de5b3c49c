"""The command ``blip2edge serve``: its flags, and the function that runs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

from blip2edge.cli import interrupt
from blip2edge.cli.credentials import FORM, filled_text
from blip2edge.cli.flag_groups import (
    add_backend,
    add_bundle,
    add_limits,
    add_number,
    add_queries,
    given_limits,
    print_unsigned,
)
from blip2edge.cli.flag_types import any_text, port, positive_number
from blip2edge.cli.messages import print_note
from blip2edge.errors import BackendError, OutputError, UsageError, one_line, option
from blip2edge.limits import ConnectionLimits, Limits
from blip2edge.packages import require

if TYPE_CHECKING:
    import socket

    from blip2edge.cli.parser import Parser
    from blip2edge.runtime.serving.http import Server
    from blip2edge.runtime.serving.models.served import ModelSource

API_KEY = "BLIP2EDGE_API_KEY"
"""Environment variable with the API key."""

SWITCH_S = 0.0005
"""Python's switch interval while the server runs, in seconds: the longest time for which a thread blocks another one.

The thread of the event loop may wait this long after each system call, because the scheduler's threads run meanwhile.
With Python's default of 5 ms, this thread would be too slow to refuse requests at overload.
"""


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``serve``."""
    add_bundle(parser)
    parser.add_argument(
        "models",
        metavar="NAME=BUNDLE",
        nargs="*",
        default=[],
        help="further bundles; the key `model` of a request chooses one by NAME (default: the directory's name)",
    )
    add_backend(parser)
    add_queries(parser, "for requests that do not set it, of elastic bundles (default: all)")
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
    _add_access(parser)
    parser.add_argument(
        "--access-log",
        metavar="FILE",
        help="append a line of JSON for each request to this file; -: standard output. Keys, prompts and pictures are "
        "not written",
    )
    add_limits(parser, Limits)
    add_limits(parser, ConnectionLimits)


def _add_access(parser: Parser) -> None:
    """Adds the flags for the API key, the allowed hosts and origins, and TLS."""
    access = parser.add_argument_group("access", "who may use the server, and over TLS")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        type=any_text,
        default=argparse.SUPPRESS,  # a default of the environment would be shown by --help
        help="key that requests must send as Authorization: Bearer KEY (default: the environment variable "
        f"{API_KEY}, else none). Other users of this machine can see a key on the command line, so write {FORM}",
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
        help="host name that requests may use for the server; may be repeated (default: if --host is a loopback "
        "address, the names of this address; otherwise any name)",
    )
    access.add_argument("--tls-cert", metavar="FILE", type=Path, help="certificate chain in PEM format, to serve https")
    access.add_argument("--tls-key", metavar="FILE", type=Path, help="private key of the certificate in PEM format")
    access.add_argument(
        "--self-signed",
        action="store_true",
        help="serve https with a certificate that is made for the names and addresses of this machine, and kept in the "
        "user's cache; its fingerprint is printed",
    )


def _api_key(options: argparse.Namespace) -> str:
    """Returns the API key from the flag or the environment; empty if there is none.

    Raises:
        UsageError: The key is given, but empty: if a variable in a script were not set, the server would be open to
            everyone. Or a credential in the key is missing.
    """
    given = getattr(options, "api_key", os.environ.get(API_KEY))
    if given is not None and not given.strip():
        raise UsageError(
            f"the API key ({option('api_key')} or {API_KEY}) is empty",
            "give a key, or leave both out for a server without one",
        )
    return filled_text(given or "")


def run(options: argparse.Namespace) -> int:
    """Answer HTTP requests until Ctrl-C."""
    for package in ("starlette", "prometheus_client", "python_multipart"):
        require(package, "serving", BackendError)
    require("uvicorn", "serving", BackendError)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every broken form
    tls = _tls(options)
    from blip2edge.runtime.serving.access import LOOPBACK, Access
    from blip2edge.runtime.serving.connections import allow_files
    from blip2edge.runtime.serving.http import Server

    limits, connections = given_limits(options, Limits), given_limits(options, ConnectionLimits)
    allowed = allow_files(connections.connections)
    if allowed < connections.connections:
        print_note(f"warning: the limit of open files (ulimit -n) allows {allowed} connections only")
        connections = replace(connections, connections=allowed)
    local, key = options.host in LOOPBACK, _api_key(options)
    hosts = (*LOOPBACK, *options.allowed_host) if local else tuple(options.allowed_host)
    origins = tuple(origin.lower() for origin in options.cors)
    access = Access(key, origins, tuple(name.lower() for name in hosts))
    with ExitStack() as opened:
        listening = opened.enter_context(_listen(options.host, options.port))
        log = _open_log(options.access_log, opened)
        sources = [_source(name, path, options, limits) for name, path in _bundles(options)]
        server = Server(
            sources,
            max_batch=options.max_batch,
            max_waiting=options.queue,
            deadline=options.deadline,
            access=access,
            limits=limits,
            connections=connections,
            log=log,
        )
        opened.callback(server.close)
        host, number = listening.getsockname()[:2]
        print(f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{number}", flush=True)
        if not local and not key:
            print_note("warning: other machines can reach this server, and it has no --api-key")
        _serve(server, listening, tls)
    for model in server.models:
        if model.engine.state == "failed":
            problem = model.engine.problem
            raise BackendError(f"the engine could not be loaded again ({problem})", "start the server again")
    return 0


def _bundles(options: argparse.Namespace) -> list[tuple[str, Path]]:
    """Returns the name and the directory of each bundle; an empty name stands for the directory's name.

    Raises:
        UsageError: Two bundles have the same name, or a name is empty.
    """
    from blip2edge.bundle.hub.names import bundle_name

    bundles: list[tuple[str, Path]] = []
    for given in (str(options.bundle), *options.models):
        name, equals, path = given.partition("=")
        if not bundles and ("/" in name or Path(given).exists()):  # the path of the first one may have a =
            name, equals = "", ""
        if equals and not (name and path):
            raise UsageError(f"expected NAME=BUNDLE, got {given!r}", "name a bundle as in: clip=bundles/clip")
        bundles.append((name, Path(path)) if equals else ("", Path(given)))
    names = [name or bundle_name(path) for name, path in bundles]
    for name in names:
        if names.count(name) > 1:  # found here, before any bundle is loaded
            raise UsageError(f"two bundles have the name {name!r}", f"give one of them another name: {name}-2=BUNDLE")
    return bundles


def _source(name: str, path: Path, options: argparse.Namespace, limits: Limits) -> ModelSource:
    """Loads a bundle for the server."""
    from blip2edge.bundle.hub.download import find_bundle
    from blip2edge.runtime.serving.models.served import ModelSource, load_served

    load = partial(
        load_served,
        find_bundle(path, public_key=options.require_signature),  # the same revision at each load
        backend=options.backend,
        threads=options.threads,
        limits=limits,
        require_signature=options.require_signature,
        queries=options.queries,
    )
    loaded = load()
    print_unsigned(loaded.bundle)
    return ModelSource(loaded, load, name)


def _serve(server: Server, listening: socket.socket, tls: tuple[Path, Path] | None) -> None:
    """Runs uvicorn on the listening socket until a signal ends it, or a failed engine cannot be loaded again."""
    import asyncio

    import uvicorn

    from blip2edge.runtime.serving.connections import ConnectionTable, GuardedProtocol, ServingLoop

    certificate, key = tls or (None, None)
    table = ConnectionTable(server.connections, server.metrics.add_closed)
    server.metrics.open = lambda: len(table)
    config = uvicorn.Config(
        server,
        log_level="warning",
        lifespan="on",
        timeout_graceful_shutdown=5,
        http=cast("type[asyncio.Protocol]", partial(GuardedProtocol, table)),
        ws="none",
        server_header=False,
        proxy_headers=False,
        access_log=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    running = uvicorn.Server(config)

    def give_up() -> None:
        running.should_exit = True

    for model in server.models:
        model.engine.gave_up = give_up
    loop = ServingLoop(table)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        loop.run_until_complete(running.serve(sockets=[listening]))
    except (KeyboardInterrupt, interrupt.Interrupted):  # uvicorn raises the signal again when it has ended
        interrupt.forget()
    finally:
        sys.setswitchinterval(interval)
        loop.close()


def _open_log(name: str | None, opened: ExitStack) -> TextIO | None:
    """Opens the request log for appending.

    Raises:
        OutputError: The file cannot be written.
    """
    if name is None or name == "-":
        return sys.stdout if name else None
    try:
        return opened.enter_context(open(name, "a", encoding="utf-8"))
    except OSError as error:
        raise OutputError(
            f"{name}: the request log cannot be written ({error.strerror or error})", "give another file"
        ) from error


def _tls(options: argparse.Namespace) -> tuple[Path, Path] | None:
    """Returns the files of the certificate and its key; None for http.

    Raises:
        UsageError: One of the two flags is missing, the files are not a certificate and its key, or ``--self-signed``
            is given as well.
    """
    certificate, key = options.tls_cert, options.tls_key
    if options.self_signed:
        if certificate is not None or key is not None:
            raise UsageError(f"{option('self_signed')} and {option('tls_cert')} cannot be combined", "give one of them")
        from blip2edge.cli.certificate import self_signed

        made = self_signed(options.host, *options.allowed_host)
        print_note(f"certificate: {made.certificate}, SHA-256 {made.fingerprint}, for {', '.join(made.names)}")
        return made.certificate, made.key
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise UsageError(f"expected {option('tls_cert')} and {option('tls_key')}, got one of them", "give both")
    import ssl

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        reason = one_line(error)
        unusable = UsageError(
            f"expected {option('tls_cert')} and {option('tls_key')} to be a certificate and its key in PEM format "
            f"({reason})",
            "check both files",
        )
        unusable.exit_status = 1  # as for every input that is missing or broken
        raise unusable from error
    return certificate, key


def _listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket before the model is loaded, so that a port in use is an error at once.

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
