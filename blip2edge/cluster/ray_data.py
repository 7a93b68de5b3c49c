"""Maps rows with the same worker class on many machines, with Ray Data (the extra `ray`); keeps the order of the rows.

All machines must see models and files under the same paths, as on a shared disk.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from blip2edge.cluster.connection import connected
from blip2edge.errors import Blip2EdgeError

MOST_BLOCKS = 10_000  # a block is the unit of work: what is lost with a machine, and what is given back at once


def map_on_ray(
    address: str,
    workers: int,
    worker: Any,
    arguments: Sequence[Any],
    rows: Sequence[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Maps rows on the machines of a Ray cluster.

    If a machine is lost, its worker starts again as soon as another machine has a free CPU, and maps its rows again.

    Args:
        address: Address of a Ray cluster (``HOST:PORT``), "auto" for the cluster of this machine, or "local" for this
            machine alone.
        workers: Number of workers. Each uses one CPU of the cluster.
        worker: Class whose objects map one row.
        arguments: The arguments that each object is made with.
        rows: The rows.

    Yields:
        The mapped rows, in the order of ``rows``.

    Raises:
        UsageError: Ray is not installed, or the address is not ``local``, ``auto`` or ``HOST:PORT``.
        ClusterError: The cluster cannot be reached.
        Blip2EdgeError: The error that a worker raised, if it is an error of this project.
    """
    with connected(address):
        import ray
        import ray.data

        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        try:
            data = ray.data.from_items(list(rows), override_num_blocks=max(1, min(len(rows), MOST_BLOCKS)))
            mapped = data.map(
                worker,
                fn_constructor_args=tuple(arguments),
                concurrency=workers,
                num_cpus=1,
            )
            yield from mapped.iter_rows()
        except ray.exceptions.RayError as error:
            own = _own_error(error)
            if own is None:
                raise
            raise own from error


def _own_error(error: BaseException | None) -> Blip2EdgeError | None:
    """Returns the Blip2EdgeError that a worker raised, without Ray's wrapper; None for any other kind of error."""
    while error is not None:
        if isinstance(error, Blip2EdgeError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
