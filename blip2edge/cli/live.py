"""``blip2edge watch`` and ``blip2edge serve``."""

from __future__ import annotations

import json
import socket
import sys
from typing import TYPE_CHECKING

from blip2edge.cli.running_flags import given_generation
from blip2edge.errors import BackendError, OutputError

if TYPE_CHECKING:
    import argparse

LOCAL = ("127.0.0.1", "localhost", "::1")


def watch(options: argparse.Namespace) -> int:
    """Print a caption of the newest frame, again and again, until the source ends or Ctrl-C."""
    from blip2edge.runtime.captioning.captioner import Captioner
    from blip2edge.runtime.serving.watch import open_source
    from blip2edge.runtime.serving.watch import watch as live

    frames = open_source(options.source, follow=not options.once)
    captioner = Captioner.load(options.bundle, backend=options.backend, threads=options.threads)
    flags = given_generation(options)
    dropped = 0
    for seen in live(
        captioner,
        frames,
        prompt=options.prompt,
        every=options.once,
        reuse_below=options.reuse_below,
        **flags,
    ):
        dropped += seen.dropped
        if seen.result is None:
            print(f"{seen.frame}: {seen.error}", file=sys.stderr, flush=True)
        elif options.json:
            extra = {
                "frame": seen.frame,
                "dropped": seen.dropped,
                "age_ms": round(seen.age_ms, 1),
                "reused": seen.reused,
            }
            print(json.dumps({**seen.result.to_json(), **extra}), flush=True)
        else:
            print(f"{seen.frame}: {seen.result.text}", flush=True)
    if dropped:
        print(f"{dropped} frames came faster than captions and were dropped", file=sys.stderr)
    return 0


def serve(options: argparse.Namespace) -> int:
    """Answer HTTP requests until Ctrl-C."""
    try:
        import uvicorn
    except ImportError as error:
        raise BackendError(
            "serving needs uvicorn, which is not installed", 'pip install "blip2edge[serve]"'
        ) from error
    from blip2edge.runtime.captioning.captioner import Captioner
    from blip2edge.runtime.serving.http import Server

    listening = _listen(options.host, options.port)
    captioner = Captioner.load(options.bundle, backend=options.backend, threads=options.threads)
    server = Server(
        captioner, max_batch=options.max_batch, max_waiting=options.queue, deadline=options.deadline
    )
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
    """A bound socket, before the model is loaded: a port in use is told at once.

    Raises:
        OutputError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)  # who calls while the model loads waits for it
    except OSError as error:
        listening.close()
        raise OutputError(
            f"{host}:{port} cannot be listened on ({error.strerror or error})",
            "give another --host or --port",
        ) from error
    return listening
