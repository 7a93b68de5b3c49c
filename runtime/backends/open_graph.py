"""Opens the graphs of a bundle: chooses the file of each graph and the backend that runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.backends.base import (
    BACKENDS,
    OptimizedFile,
    Session,
    check_precision,
    find_backend,
    open_session,
)
from blip2edge.runtime.backends.engine_files import engines_backend
from blip2edge.runtime.backends.optimized_copy import read_copy, weights_of
from blip2edge.runtime.backends.probe import cores


class GraphOpener:
    """Loads the graphs of a bundle, from the backend's optimized copy if it has the graph, else from the bundle.

    Args:
        bundle: An opened bundle.
        backend: ``auto``, or a backend by name.
        threads: CPU threads within an operator; None leaves the choice to the backend.
        portable: Whether to ignore optimized copies.

    Attributes:
        backend: Name of the backend; for ``auto``, the one that was chosen.
        closed: Whether :meth:`close` was called.
        copied: Names of the graphs that were loaded from an optimized copy.

    Raises:
        BackendError: There is no backend of that name, or it cannot run the bundle's precision.
        BundleIntegrityError: A file of the optimized copy is missing or was changed.
    """

    def __init__(
        self, bundle: Bundle, backend: str = "auto", threads: int | None = None, *, portable: bool = False
    ) -> None:
        self._bundle, self.threads = bundle, threads
        self.copied: list[str] = []
        self.closed = False
        self._sessions: list[Session] = []
        if bundle.manifest.engines_of:
            backend = engines_backend(bundle, backend)
        check_precision(backend, bundle.manifest.precision)
        found = find_backend(backend)
        self.backend = next(iter(BACKENDS)) if backend == "auto" else backend
        copy, engines, self._host = found.copy, found.engines, found.host
        self._engines = import_module(found.module).EngineOpener(bundle, engines) if engines else None
        self._copy = read_copy(bundle, copy) if copy and not portable else None

    @property
    def takes_all_cores(self) -> bool:
        """Whether two graphs that run at once would use more threads than there are cores."""
        return self._host and 2 * (self.threads or cores()) > cores()

    def __call__(self, graph: str) -> Session:
        """Loads a graph by its name.

        Raises:
            BundleError: The bundle has no such graph, or the backend cannot load its file.
            BackendError: The backend's package or hardware is missing.
        """
        session = self._open(graph)
        self._sessions.append(session)
        return session

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the graphs loaded so far if the block raises an error."""
        try:
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases all loaded graphs and their memory; harmless when called twice."""
        self.closed = True
        while self._sessions:
            self._sessions.pop().close()

    def _open(self, graph: str) -> Session:
        spec = self._bundle.graph(graph).spec
        if self._engines is not None:
            engine: Session = self._engines(graph)
            return engine
        found = self._copy[1].graphs.get(graph) if self._copy is not None else None
        if self._copy is None or found is None:
            return open_session(self._bundle.file(spec.file), self.backend, self.threads)
        module = import_module(find_backend(self.backend).module)
        directory = self._copy[0]
        self.copied.append(graph)
        optimized = OptimizedFile(weights_of(self._bundle, directory), found.layout)
        session: Session = module.open_graph(directory / found.file, self.threads, optimized)
        return RowByRow(session) if found.one_by_one else session


class RowByRow:
    """Wraps a session and runs each row of a batch separately.

    Needed for quantised graphs that compute the range of an activation at run time, over the whole batch. If rows run
    separately, a row's result does not depend on the other rows.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.input_names, self.output_names = session.input_names, session.output_names

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the graph; returns the outputs by name; see :class:`blip2edge.runtime.backends.base.Session`."""
        rows = len(next(iter(inputs.values())))
        if rows == 1:
            return self._session.run(inputs, outputs)
        parts = [
            self._session.run({name: array[row : row + 1] for name, array in inputs.items()}, outputs)
            for row in range(rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """Releases the graph and its memory; see :class:`blip2edge.runtime.backends.base.Session`."""
        self._session.close()
