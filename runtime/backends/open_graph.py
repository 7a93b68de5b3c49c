"""Opens the graphs of a bundle: chooses the file of each graph and the backend that runs it.

The folder ``optimized/<backend>/`` of a bundle contains graphs that were rewritten for one backend: an optimized copy.
Its ``optimized.json`` has the hash of the bundle from which the copy was made. A copy is ignored if it was made from
another bundle or by another version of the backend, or if the user requires a signature and the signature does not list
the copy. Then the exported graphs of the bundle (the portable graphs) are used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest_fields import OPTIMIZED_FIELDS
from blip2edge.bundle.schema import DERIVED, GraphSpec, Parity
from blip2edge.bundle.trust.integrity import FileRecord, Listing, check_unlisted
from blip2edge.errors import BackendError, BundleError, BundleIntegrityError, EngineError
from blip2edge.packages import installed, missing
from blip2edge.reading import checking, read_json
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.base import (
    BACKENDS,
    OptimizedFile,
    Session,
    check_precision,
    find_backend,
    open_session,
)
from blip2edge.runtime.backends.engine_files import EngineSet, engine_folders, engines_backend
from blip2edge.runtime.backends.probe import cores, exact_processor

KIND = "optimized"
RECORD = DERIVED[KIND]
SCHEMA_VERSION = 2
PACKAGES = {"cpu": "onnxruntime", "openvino": "openvino", "cuda": ""}
"""For each backend, the package whose version must be the one that made the copy; empty if every version can load it,
because ONNX Runtime still optimizes a copy for CUDA when it is loaded."""

OF_ONE_MACHINE = ("openvino",)
"""Backends whose optimized copies are compiled for one processor, and are not used on other processors."""


@dataclass(frozen=True)
class OptimizedGraph:
    """What ``optimized.json`` records about one graph of an optimized copy.

    Attributes:
        file: Name of the graph's file in the copy's directory.
        passes: Names of the optimization passes that rewrote the graph.
        one_by_one: Whether to run the rows of a batch separately, because rows in one batch would change each other.
        layout: Whether ONNX Runtime prepacks the weights for the processor when it loads the file.
        parity: Difference between the outputs of this graph and those of the portable graph; empty if they are compared
            by cosine only, as those of quantized graphs are.
        cosine: The smallest cosine similarity between outputs of this graph and of the portable graph.
        milliseconds: CPU time of the portable graph and of this graph, on the machine that made the copy: of one run,
            or of opening the file if the graph is compiled; None if nothing was measured.
    """

    file: str
    passes: tuple[str, ...]
    one_by_one: bool
    layout: bool
    parity: tuple[Parity, ...]
    cosine: float
    milliseconds: tuple[float, float] | None

    def to_json(self) -> dict[str, Any]:
        """Returns the graph's record as a JSON object for ``optimized.json``."""
        return {**vars(self), "parity": [parity.to_json() for parity in self.parity]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OptimizedGraph:
        """Reads a graph's record from the JSON object that :meth:`to_json` made."""
        parity = tuple(Parity.from_json(item) for item in values["parity"])
        times = values["milliseconds"]
        return cls(
            str(values["file"]), tuple(values["passes"]), bool(values["one_by_one"]), bool(values["layout"]), parity,
            float(values["cosine"]), None if times is None else (float(times[0]), float(times[1])),
        )  # fmt: skip


@dataclass(frozen=True)
class OptimizedRecord:
    """The contents of ``optimized.json``.

    Attributes:
        backend: The backend that runs the copy.
        bundle_sha256: SHA-256 of the ``bundle.json`` of the bundle that was optimized.
        graphs: The graphs that run or open faster than the portable graphs, by name; all other graphs are loaded from
            the bundle.
        left: Names of the graphs that were not optimized, each with the reason.
        files: Size and hash of every file of the copy.
        versions: Versions of the packages that made the copy.
        machine: The processor that the graphs were measured on, with family, model and stepping.
    """

    backend: str
    bundle_sha256: str
    graphs: Mapping[str, OptimizedGraph]
    left: Mapping[str, str]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    machine: str

    def to_json(self) -> dict[str, Any]:
        """Returns the record as the JSON object of ``optimized.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "files": {name: dict(vars(record)) for name, record in sorted(self.files.items())},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OptimizedRecord:
        """Reads a record from the JSON object that :meth:`to_json` made.

        Raises:
            ValueError: A key is missing, or a value has the wrong type or range.
        """
        OPTIMIZED_FIELDS(values, "")
        return cls(
            backend=values["backend"],
            bundle_sha256=values["bundle_sha256"],
            graphs={name: OptimizedGraph.from_json(graph) for name, graph in values["graphs"].items()},
            left=values["left"],
            files={name: FileRecord(**record) for name, record in values["files"].items()},
            versions=values["versions"],
            machine=values["machine"],
        )

    def write(self, directory: Path) -> None:
        """Writes ``optimized.json`` into ``directory``."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (directory / RECORD).write_text(text, encoding="utf-8")


def read_copy(bundle: Bundle, backend: str, *, use_stamps: bool = True) -> tuple[Path, OptimizedRecord] | None:
    """Finds a bundle's optimized copy for a backend, and checks the files of the copy; see :class:`CheckedFiles`.

    Returns:
        Directory and record of the first copy that can be used; None if there is none. A copy is not used if it was
        made from another bundle, by another version of the backend's package or, for some backends, on another
        processor, or if a required signature does not list it.

    Raises:
        BundleIntegrityError: A file of the copy is missing or was changed, or is not listed in ``optimized.json``.
    """
    for directory in (place / backend for place in bundle.derived(KIND)):
        record = _usable_record(bundle, directory, backend)
        if record is not None:
            _check_copy(bundle, directory, record, use_stamps)
            return directory, record
    return None


def _usable_record(bundle: Bundle, directory: Path, backend: str) -> OptimizedRecord | None:
    """Reads the ``optimized.json`` of a copy; None if the file is damaged or the copy must be ignored."""
    path = directory / RECORD
    if not path.is_file() or not bundle.admits(directory, RECORD):
        return None
    try:
        values = read_json(path, BundleError, strict=True)
        if values.get("schema_version") != SCHEMA_VERSION:
            return None
        with checking(path, "the record of an optimized copy", BundleError):
            record = OptimizedRecord.from_json(values)
    except BundleError:  # none, or a broken one
        return None
    package = PACKAGES.get(record.backend, "")
    if record.backend != backend or record.bundle_sha256 != bundle.sha256:
        return None
    if package and record.versions.get(package) != installed(package):
        return None
    if backend in OF_ONE_MACHINE and record.machine != exact_processor():
        return None
    return record


def _check_copy(bundle: Bundle, directory: Path, record: OptimizedRecord, use_stamps: bool) -> None:
    """Checks the hashes of a copy's files, and that no graph is missing in the list of files."""
    fix = f"make the copy again: blip2edge optimize {bundle.path} --backend {record.backend}"
    for graph in record.graphs.values():
        if graph.file not in record.files:
            raise BundleIntegrityError(f"{directory / graph.file} is not listed in {RECORD}", fix)
    listing = Listing(directory, record.files, RECORD, fix, _weights(bundle, directory, record))
    bundle.checked.check(listing, use_stamps=use_stamps)
    if not use_stamps:
        check_unlisted(listing)


def _weights(bundle: Bundle, directory: Path, record: OptimizedRecord) -> set[str]:
    """Returns the files that a copy's graphs may use as external weights; paths are relative to :func:`weights_of`."""
    if weights_of(bundle, directory) == directory:
        return set(record.files)
    folder = directory.relative_to(bundle.path).as_posix()
    return {*bundle.manifest.files, *(f"{folder}/{name}" for name in record.files)}


def weights_of(bundle: Bundle, directory: Path) -> Path:
    """Returns the directory of a copy's external weights: the bundle if it contains the copy, else the copy itself."""
    return bundle.path if directory.is_relative_to(bundle.path) else directory


def choose_backend(bundle: Bundle, backend: str) -> tuple[str, Any]:
    """Chooses the backend of a bundle, and opens its engines if the backend runs engines.

    ``auto`` chooses the backend of the engines if the bundle has engines for this GPU; else ``cuda`` if ONNX Runtime
    can compute on this GPU; else ``cpu``. ONNX Runtime has no fused kernels for INT8 activations on a GPU. So for a
    bundle with such activations, ``auto`` chooses ``cuda`` only if the bundle has an optimized copy for CUDA.

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
            backend = "cuda"
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
        self.copied: list[str] = []
        self.closed = False
        self._sessions: list[Session] = []
        self.backend, self._engines = choose_backend(bundle, backend)
        row = find_backend(self.backend)
        copy, self._host = row.copy, row.host
        self._copy = read_copy(bundle, copy) if copy and not portable else None

    @property
    def takes_all_cores(self) -> bool:
        """Returns whether two graphs that run at once would use more threads than there are cores."""
        return 2 * self.host_threads > cores()

    @property
    def host_threads(self) -> int:
        """Returns the number of CPU threads that a running graph uses; 0 if the backend computes on a GPU."""
        return (self.threads or cores()) if self._host else 0

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
        """Releases all loaded graphs and their memory. A second call does nothing."""
        self.closed = True
        while self._sessions:
            self._sessions.pop().close()
        if self._engines is not None:
            self._engines.close()
            self._engines = None

    def _open(self, graph: str) -> Session:
        record = self._bundle.graph(graph)
        spec = record.spec
        if self._engines is not None:
            engine: Session = self._engines(graph)
            return engine
        found = self._copy[1].graphs.get(graph) if self._copy is not None else None
        if self._copy is None or found is None:
            precisions = (self._bundle.manifest.precision, record.precision)
            path = self._bundle.file(spec.file)
            portable = open_session(path, self.backend, self.threads, spec, precisions)
            _check_names(portable, spec, path)
            return portable
        module = import_module(find_backend(self.backend).module)
        directory = self._copy[0]
        self.copied.append(graph)
        optimized = OptimizedFile(weights_of(self._bundle, directory), found.layout)
        session: Session = module.open_graph(directory / found.file, self.threads, optimized)
        return RowByRow(session) if found.one_by_one else session


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
