"""Running a graph: the protocol that every backend follows, and which backends there are.

A backend is a module with a function ``open_graph(path, threads, settled)``; it is imported when it is asked for, so
that a package that is not installed is missed by those alone who want it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, UsageError, option


class Session(Protocol):
    """A loaded graph."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """What it takes."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """What it gives."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Computes outputs.

        Args:
            inputs: Every input by name, in the dtype of the graph.
            outputs: Which outputs are wanted; None for all.

        Returns:
            The outputs by name.
        """

    def close(self) -> None:
        """Lets go of the graph and its memory; nothing can be run afterwards."""


@dataclass(frozen=True)
class Settled:
    """How a graph is loaded that was optimised for its backend when it was written, and is taken as it is.

    Attributes:
        weights: The directory that its weights are found from.
        layout: Whether weights are still to be laid out for the processor, which a file cannot carry to another.
    """

    weights: Path
    layout: bool = False


@dataclass(frozen=True)
class Backend:
    """What ``--backend`` can name.

    Attributes:
        module: Has ``open_graph(path, threads, settled)``.
        function: Its name, where the module opens graphs for more than one backend.
        copy: Which of a bundle's optimised copies it runs where there is one; empty for none.
        host: Whether it computes on the cores that the rest of the program runs on.
        engines: What a bundle's engines were built for, where it runs those: then the module has an
            ``EngineOpener(bundle, engines)``.
    """

    module: str
    function: str = "open_graph"
    copy: str = ""
    engines: str = ""
    host: bool = False


BACKENDS = {
    "cpu": Backend("blip2edge.runtime.backends.onnxruntime_cpu", copy="cpu", host=True),
    "openvino": Backend("blip2edge.runtime.backends.openvino", copy="openvino", host=True),
    "cuda": Backend("blip2edge.runtime.backends.onnxruntime_cuda"),
    "tensorrt": Backend("blip2edge.runtime.tensorrt.backend", engines="tensorrt"),
    "rtx": Backend("blip2edge.runtime.tensorrt.backend", engines="rtx"),
    "ort-tensorrt": Backend(
        "blip2edge.runtime.backends.onnxruntime_cuda", function="open_graph_with_tensorrt"
    ),
}
"""The backends of this version; ``auto`` is the first."""

MOST_THREADS = 1024


def check_threads(threads: object) -> None:
    """Raises UsageError unless a number of threads is None or one that a machine can have."""
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise UsageError(f"{option('threads')} must be from 1 to {MOST_THREADS}, not {threads!r}")


def find_backend(name: str) -> Backend:
    """A backend by its name; ``auto`` is the first.

    Raises:
        BackendError: It is unknown.
    """
    if name == "auto":
        return next(iter(BACKENDS.values()))
    if name not in BACKENDS:
        raise BackendError(
            f"the backend {name} is not part of this version",
            f"use {option('backend')} auto or {' or '.join(BACKENDS)}",
        )
    return BACKENDS[name]


def open_session(path: Path, backend: str = "auto", threads: int | None = None) -> Session:
    """Loads a graph on a backend.

    Raises:
        BackendError: The backend is unknown or not there.
        BundleError: The file is no graph that it can run.
    """
    row = find_backend(backend)
    session: Session = getattr(import_module(row.module), row.function)(path, threads)
    return session
