"""Opens the graphs of a bundle: chooses the file of each graph and the backend that runs it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER, GraphSpec
from blip2edge.errors import BackendError, Blip2EdgeWarning, BundleError, EngineError, option
from blip2edge.packages import missing
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.base import (
    BACKENDS,
    Backend,
    OptimizedFile,
    Session,
    check_precision,
    find_backend,
    open_session,
)
from blip2edge.runtime.backends.engine_files import EngineSet, engine_folders, engines_backend
from blip2edge.runtime.backends.optimized_copy import (
    OptimizedRecord,
    changed_conditions,
    read_copy,
    weights_of,
    why_unused,
)
from blip2edge.runtime.backends.probe import cores


def choose_backend(bundle: Bundle, backend: str) -> tuple[str, Any]:
    """Chooses the backend of a bundle, and opens its engines if the backend runs engines.

    ``auto`` chooses the backend of the engines if the bundle has engines for this GPU; else ``cuda`` if ONNX Runtime
    can compute on this GPU; else ``cpu``. ONNX Runtime has no fused kernels for INT8 activations on a GPU. So for a
    bundle with such activations, ``auto`` chooses ``cuda`` only if the bundle has an optimized copy for CUDA.

    In place of ``cuda``, ``auto`` chooses ``cuda-decoder`` (this project's CUDA kernels) if a timing in the bundle says
    that these kernels are faster. The timing is valid for the same GPU, the same versions of driver and ONNX Runtime,
    and the same copy for ``cuda``. If one of them has changed, ``auto`` chooses ``cuda``, and a
    :class:`StaleTimingWarning` says what has changed.

    Returns:
        The name of the backend, and its ``EngineOpener`` (None if the backend runs graphs).

    Raises:
        BackendError: There is no backend of that name, or it cannot run the bundle.
        EngineError: The bundle or the backend needs engines, and no engine fits this machine.
    """
    manifest = bundle.manifest
    if manifest.engines_of:
        backend = engines_backend(bundle, backend)
    elif backend == "auto":
        gpus = probe.nvidia_driver().gpus
        opened = _engines_that_fit(bundle) if gpus else None
        if opened is not None:
            return opened
        backend = next(iter(BACKENDS))
        integers = any(graph.precision == "int8" for graph in manifest.graphs.values())
        if gpus and (not integers or read_copy(bundle, "cuda") is not None) and _cuda_works(manifest.precision):
            backend = "cuda-decoder" if _kernels_are_faster(bundle) else "cuda"
    check_precision(backend, manifest.precision, engines_only=bool(manifest.engines_of))
    row = find_backend(backend)
    return backend, import_module(row.module).EngineOpener(bundle, row.engines) if row.engines else None


def _engines_that_fit(bundle: Bundle) -> tuple[str, Any] | None:
    """Finds engines that fit this machine; returns the name of their backend and their opener, or None."""
    targets = set()
    for folder in engine_folders(bundle):
        with suppress(EngineError):  # of another version: `inspect` names the folder
            targets.add(str(EngineSet.read(folder).fingerprint.get("target")))
    for name, row in BACKENDS.items():
        if row.engines in targets and bundle.manifest.precision not in row.refuses:
            with suppress(BackendError, EngineError):
                return name, import_module(row.module).EngineOpener(bundle, row.engines)
    return None


class StaleTimingWarning(Blip2EdgeWarning):
    """Warns that ``auto`` ignores a timing of ``cuda-decoder`` that was made with another GPU or other versions."""


def _kernels_are_faster(bundle: Bundle) -> bool:
    """Returns whether a timing that is valid on this machine says that the bundle's CUDA kernels beat ``cuda``."""
    found = read_copy(bundle, "cuda-decoder")
    graph = found[1].graphs.get(DECODER) if found is not None else None
    if graph is None or graph.milliseconds is None or graph.milliseconds[1] >= graph.milliseconds[0]:
        return False
    if found is None or missing(("cuda",)):
        return False
    fault = import_module(find_backend("cuda-decoder").module).fault_of_copy(bundle, found[0])
    changes = [fault] if fault else changed_conditions(bundle, graph)
    if changes:
        warnings.warn(
            f"auto chooses cuda, not cuda-decoder, whose timing no longer holds: {', '.join(changes)}; time it again: "
            f"blip2edge optimize {bundle.path} --backend cuda-decoder",
            StaleTimingWarning,
            stacklevel=2,
        )
    return not changes


def _cuda_works(precision: str) -> bool:
    """Returns whether ONNX Runtime can run a bundle of this precision on a GPU of this machine."""
    if precision in BACKENDS["cuda"].refuses or missing(("onnxruntime",)):
        return False
    import onnxruntime

    return probe.check_provider(onnxruntime, "CUDAExecutionProvider").ok


class GraphOpener:
    """Loads the graphs of a bundle: engines, graphs of the backend's optimized copy, or the bundle's own graphs.

    Args:
        bundle: An opened bundle.
        backend: ``auto``, or a backend by name.
        threads: CPU threads within an operator; None leaves the choice to the backend.
        portable: Whether to ignore optimized copies.

    Attributes:
        backend: Name of the backend; for ``auto``, the backend that was chosen.
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
        self.copied: set[str] = set()
        self.closed = False
        self._sessions: list[Session] = []
        self._ahead: dict[str, Future[Session]] = {}
        self.backend, self._engines = choose_backend(bundle, backend)
        row = find_backend(self.backend)
        self._host = row.host
        self._copies = [] if portable else list(_copies(bundle, self.backend))

    @property
    def takes_all_cores(self) -> bool:
        """Returns whether two graphs that run at once would use more threads than there are cores."""
        return 2 * self.host_threads > cores()

    @property
    def host_threads(self) -> int:
        """Returns the number of CPU threads that a running graph uses; 0 if the backend computes on a GPU."""
        return (self.threads or cores()) if self._host else 0

    def open_ahead(self, graphs: Iterable[str], after: str = "") -> None:
        """Begins to load graphs in threads of their own; a later call of this object waits for its graph.

        Opening a graph mostly copies weights on one core, so that several cores load several graphs at once. Nothing
        is done on a machine with one core, or if the backend loads graphs on another device.

        Args:
            graphs: Names of graphs; those that the bundle does not have are left out.
            after: Name of the graph that is loaded first and alone. This must be the decoder: while it is loaded, all
                memory that the process allocates is moved to huge pages, and no other graph needs huge pages.
        """
        names = [name for name in graphs if name in self._bundle.manifest.graphs]
        if self._host and min(cores(), len(names)) > 1:
            pool = ThreadPoolExecutor(min(cores(), len(names)), thread_name_prefix="open-graph")
            for name in sorted(names, key=lambda name: name != after):  # stable: `after` is submitted first
                alone = None if name == after else self._ahead.get(after)
                self._ahead[name] = pool.submit(self._open_after, alone, name)
            pool.shutdown(wait=False)

    def _open_after(self, first: Future[Session] | None, graph: str) -> Session:
        """Loads a graph once another graph is loaded, or has failed to load."""
        if first is not None:
            wait([first])
        return self._open(graph)

    def __call__(self, graph: str) -> Session:
        """Loads a graph by its name.

        Raises:
            BundleError: The bundle has no such graph, or the backend cannot load its file.
            BackendError: The backend's package or hardware is missing.
        """
        ahead = self._ahead.get(graph)
        session = self._open(graph) if ahead is None else ahead.result()
        self._sessions.append(session)
        self._ahead.pop(graph, None)
        return session

    @contextmanager
    def closed_on_error(self) -> Iterator[None]:
        """Closes the graphs loaded so far if the block raises an error."""
        try:
            yield
        except BaseException:
            with suppress(Exception):  # the first error says what is wrong
                self.close()
            raise

    def close(self) -> None:
        """Releases all loaded graphs and their memory. A second call does nothing."""
        self.closed = True
        for ahead in self._ahead.values():
            with suppress(Exception, CancelledError):  # nobody asked for this graph, or its error was raised before
                if not ahead.cancel():
                    self._sessions.append(ahead.result())
        self._ahead.clear()
        with ExitStack() as all_of_them:  # also after one of them has failed
            if self._engines is not None:
                all_of_them.callback(self._engines.close)
                self._engines = None
            while self._sessions:
                all_of_them.callback(self._sessions.pop(0).close)

    def _open(self, graph: str) -> Session:
        record = self._bundle.graph(graph)
        spec = record.spec
        if self._engines is not None:
            engine: Session = self._engines(graph)
            return engine
        for row, directory, copy in self._copies:
            found = copy.graphs.get(graph)
            if found is None:
                continue
            self.copied.add(graph)
            module = import_module(row.module)
            if row.others:
                decoder: Session = module.open_decoder(self._bundle, directory)
                return decoder
            optimized = OptimizedFile(weights_of(self._bundle, directory), found.layout)
            session: Session = module.open_graph(directory / found.file, self.threads, optimized)
            return RowByRow(session) if found.one_by_one else session
        precisions = (self._bundle.manifest.precision, record.precision)
        path = self._bundle.file(spec.file)
        backend = find_backend(self.backend).others or self.backend
        portable = open_session(path, backend, self.threads, spec, precisions)
        _check_names(portable, spec, path)
        return portable


def _copies(bundle: Bundle, backend: str) -> Iterator[tuple[Backend, Path, OptimizedRecord]]:
    """Yields the bundle's optimized copy for a backend.

    If the backend runs the decoder only, then also yields the copy for the backend that runs the other graphs.

    Raises:
        BackendError: The backend needs a copy, and the bundle has none that can be used.
    """
    row = find_backend(backend)
    for one in (row, find_backend(row.others)) if row.others else (row,):
        found = read_copy(bundle, one.copy) if one.copy else None
        if found is not None and (not one.others or DECODER in found[1].graphs):
            yield one, *found
        elif one.others:
            reason = "it has no decoder" if found is not None else why_unused(bundle, one.copy)
            raise BackendError(
                f"{bundle.path} has a copy for the backend {backend} that cannot be used: {reason}"
                if reason
                else f"{bundle.path} has no kernels for the backend {backend}",
                f"make them, on any machine: blip2edge optimize {bundle.path} {option('backend')} {one.copy}",
            )


def _check_names(session: Session, spec: GraphSpec, path: Path) -> None:
    """Raises BundleError if the graph has other inputs or outputs than ``bundle.json`` says."""
    for kind, found, listed in (
        ("inputs", session.input_names, spec.inputs),
        ("outputs", session.output_names, spec.outputs),
    ):
        expected = {tensor.name for tensor in listed}
        if set(found) != expected:
            session.close()
            raise BundleError(
                f"{path} does not fit bundle.json: expected the {kind} {', '.join(sorted(expected))}, got "
                f"{', '.join(sorted(found))}",
                "copy the bundle again, or export the checkpoint again",
            )


class RowByRow:
    """Wraps a session, and runs each row of a batch separately.

    Some quantised graphs compute the range of an activation at run time, from the whole batch. In such a graph, the
    result of a row would depend on the other rows.
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
