"""Connects this process with a Ray cluster (the extra `ray`), or raises an error within a minute.

Ray itself tries for minutes to reach an address at which nothing listens, and then ends the process. While it tries, in
C++, this process handles no signals. So the address is checked before Ray gets it.
"""

from __future__ import annotations

import logging
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from blip2edge.errors import Blip2EdgeError, UsageError, one_line, option
from blip2edge.packages import require

LOCAL, AUTO = "local", "auto"
"""Values of ``address``: ``local`` starts Ray on this machine alone, ``auto`` uses the cluster that runs here."""

PROBE_S = 5.0
"""Longest wait, in seconds, until something at the address accepts a connection."""

CONNECT_S = 60.0
"""Longest wait, in seconds, until Ray has connected with a cluster."""

_HOST_PORT = re.compile(r"(?:ray://)?(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):(?P<port>\d{1,5})")


class ClusterError(Blip2EdgeError):
    """Raised if a Ray cluster cannot be reached."""


def check_ray(address: str) -> None:
    """Checks the address of a cluster, that Ray is installed, and that something listens at the address.

    Raises:
        UsageError: The address is not ``local``, ``auto`` or ``HOST:PORT``, or Ray Data is not installed.
        ClusterError: Nothing listens at the address, or its host is unknown.
    """
    place = _place_of(address)
    require("ray", option("ray"), UsageError)
    require("ray.data", option("ray"), UsageError, extra="ray")
    if place is None:
        return
    try:
        socket.create_connection(place, PROBE_S).close()
    except OSError as error:
        raise _failed(address, error) from error


def _place_of(address: str) -> tuple[str, int] | None:
    """Returns host and port of an address; None for :data:`LOCAL` and :data:`AUTO`.

    Raises:
        UsageError: The address is not one of these two and has no host and port.
    """
    if address in (LOCAL, AUTO):
        return None
    found = _HOST_PORT.fullmatch(address)
    if found is None or not 0 < int(found["port"]) < 1 << 16:
        raise UsageError(
            f"expected {option('ray')} to be {LOCAL}, {AUTO}, HOST:PORT or ray://HOST:PORT, got {address!r}",
            f"give the address that `ray start --head` printed, or {LOCAL} for this machine alone",
        )
    return found["host"].strip("[]"), int(found["port"])


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Connects this process with a cluster for the time of a ``with`` block; an earlier connection is used and kept.

    Raises:
        UsageError: The address is not ``local``, ``auto`` or ``HOST:PORT``, or Ray Data is not installed.
        ClusterError: The cluster cannot be reached, or Ray does not connect within :data:`CONNECT_S` seconds.
    """
    check_ray(address)
    import ray

    if ray.is_initialized():
        yield
        return
    if address != LOCAL:
        _connect(ray, address)
    try:
        if address == LOCAL:
            _start_here(ray)
        yield
    finally:
        ray.shutdown()


def _start_here(ray: Any) -> None:
    """Starts Ray on this machine, without its dashboard, which would open a port.

    Ray replaces the handler of SIGTERM by one that exits with status 15. The handler of this process is put back.
    Ray is started in this thread and not in another one: when a thread ends, the system also ends the processes that
    the thread started.
    """
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=LOCAL, include_dashboard=False, log_to_driver=False)
    except SystemExit as error:
        if error.code == signal.SIGTERM and callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def _connect(ray: Any, address: str) -> None:
    """Connects with a running cluster in another thread, so that signals end this process meanwhile.

    If this function gives up, or Ray fails, the other thread also disconnects Ray, so that two threads never call Ray
    at the same time.
    """
    failures: list[BaseException] = []
    ended = threading.Lock()  # taken by the other thread when Ray has connected, or by this one when it gives up

    def connect() -> None:
        try:
            with _quiet_worker():
                ray.init(address=address, log_to_driver=False)
        except BaseException as error:  # noqa: BLE001 - raised in the other thread
            failures.append(error)
        if failures or not ended.acquire(blocking=False):
            ray.shutdown()

    thread = threading.Thread(target=connect, name="blip2edge-ray", daemon=True)
    thread.start()
    try:
        thread.join(CONNECT_S)
    finally:  # also after a signal
        gave_up = ended.acquire(blocking=False)
    if failures:
        raise _failed(address, failures[0]) from failures[0]
    if gave_up:
        raise _failed(address, TimeoutError(f"no answer of Ray within {CONNECT_S:.0f} s"))


@contextmanager
def _quiet_worker() -> Iterator[None]:
    """Hides, in the ``with`` block, Ray's warnings that this thread does not handle signals."""
    logger, thread = logging.getLogger("ray._private.worker"), threading.get_ident()

    def shown(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or record.thread != thread

    logger.addFilter(shown)
    try:
        yield
    finally:
        logger.removeFilter(shown)


def _failed(address: str, error: BaseException) -> ClusterError:
    """Returns the error for a failed connection; it advises to start a cluster only if none seems to run."""
    if isinstance(error, (ConnectionError, TimeoutError)):
        return ClusterError(
            f"the Ray cluster at {address} cannot be reached ({one_line(error)})",
            f"start it with `ray start --head`, or give the address of another one with {option('ray')}",
        )
    return ClusterError(
        f"connecting with the Ray cluster at {address} failed ({one_line(error)})",
        f"correct this, or give the address of another cluster with {option('ray')}",
    )
