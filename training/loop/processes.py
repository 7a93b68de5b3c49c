"""Replaces the errors that a process gets when another process of the run has ended by a clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from accelerate import Accelerator

from blip2edge.errors import DataError, ProcessError, one_line
from blip2edge.training.loop.snapshots import Snapshots

_LOST = ("gloo", "connection closed by peer", "connection reset by peer", "broken pipe")
"""Texts, in lower case, by which torch's RuntimeErrors about a lost connection are recognised.

gloo's messages contain the path of a source file of gloo.
"""


@contextmanager
def ended_processes(accelerator: Accelerator, snapshots: Snapshots) -> Iterator[None]:
    """Turns the errors of a lost connection to another process, in a ``with`` block, into a ProcessError.

    Args:
        accelerator: Number of processes; the errors of a single process are not changed.
        snapshots: The snapshots of the run, from which it can be resumed.

    Raises:
        ProcessError: Another process has ended. The error names the newest snapshot, if it can be read.
    """
    try:
        yield
    except RuntimeError as error:
        known = isinstance(error, dist.DistError) or any(part in str(error).lower() for part in _LOST)
        if accelerator.num_processes == 1 or not known:
            raise
        raise ProcessError(
            f"another process of this run has ended, or is not reachable ({one_line(error)})",
            f"see its own message, and start all processes again with the same command: the run continues"
            f" {_beginning(snapshots)}",
        ) from error


def _beginning(snapshots: Snapshots) -> str:
    """Returns where a new run would continue, for messages."""
    try:
        position = snapshots.position
    except DataError:  # the first process may replace the snapshot at this moment
        return f"from the newest snapshot in {snapshots.directory}"
    if position is None:
        return "from the beginning, because there is no snapshot yet"
    return f"from the snapshot of {position} in {snapshots.directory}"
