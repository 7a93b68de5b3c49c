"""A bundle's optimised copies: what stands in ``optimized.json``, and which file a graph is run from.

``optimized/<backend>/`` holds graphs rewritten for one backend and their own manifest, which names the bundle they
were made of by its hash. A copy of another bundle, or by another version of the backend, is passed over: the portable
graph is always right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.contract import Parity
from blip2edge.errors import BundleIntegrityError
from blip2edge.manifest import Bundle, FileRecord, sha256_of
from blip2edge.runtime.engines import engines_backend
from blip2edge.runtime.machine import cores, exact_processor
from blip2edge.runtime.session import Array, Session, Settled, find_backend, open_session

RECORD = "optimized.json"
SCHEMA_VERSION = 2
KIND = "optimized"
PACKAGES = {"cpu": "onnxruntime", "openvino": "openvino"}
"""The package that runs a backend's copies."""

OF_ONE_MACHINE = ("openvino",)
"""Backends whose copies were compiled for a processor, and are passed over on any other."""


@dataclass(frozen=True)
class OptimizedGraph:
    """A graph of a copy.

    Attributes:
        file: Its name in the copy's directory.
        passes: What was done to it.
        one_by_one: Whether rows of a batch are to be run one at a time, as ranges are found over all it is given.
        layout: Whether weights are laid out for the processor when it is loaded.
        parity: How far its outputs are from the portable graph's.
        cosine: The smallest cosine between its outputs and the portable graph's.
        milliseconds: What a run took, portable first, on the machine that made it; of a compiled graph what opening it
            took.
    """

    file: str
    passes: tuple[str, ...]
    one_by_one: bool
    layout: bool
    parity: tuple[Parity, ...]
    cosine: float
    milliseconds: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``optimized.json``."""
        return {**vars(self), "parity": [parity.to_json() for parity in self.parity]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OptimizedGraph:
        """The inverse of :meth:`to_json`."""
        parity = tuple(Parity.from_json(item) for item in values["parity"])
        first, second = values["milliseconds"]
        return cls(
            str(values["file"]), tuple(values["passes"]), bool(values["one_by_one"]), bool(values["layout"]), parity,
            float(values["cosine"]), (float(first), float(second)),
        )  # fmt: skip


@dataclass(frozen=True)
class OptimizedRecord:
    """The contents of ``optimized.json``.

    Attributes:
        backend: What it is for.
        bundle_sha256: Hash of the ``bundle.json`` that it was made of.
        graphs: Those that run or open faster than the portable ones, by name; the others are run from the bundle.
        left: Graphs that are not here, with the reason.
        files: Seal of every file of the copy.
        versions: What made it.
        machine: The processor it was measured on, with the numbers of its generation.
    """

    backend: str
    bundle_sha256: str
    graphs: Mapping[str, OptimizedGraph]
    left: Mapping[str, str]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    machine: str

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``optimized.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            **vars(self),
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "files": {name: dict(vars(record)) for name, record in sorted(self.files.items())},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OptimizedRecord:
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError on a wrong shape."""
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
        """Writes ``optimized.json``."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (directory / RECORD).write_text(text, encoding="utf-8")


def read_copy(bundle: Bundle, backend: str) -> tuple[Path, OptimizedRecord] | None:
    """A bundle's copy for a backend and where it lies; None where there is none of this bundle and version.

    Raises:
        BundleIntegrityError: A file of the copy is missing or was changed.
    """
    directory = bundle.derived(KIND) / backend
    try:
        values = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        if values["schema_version"] != SCHEMA_VERSION:
            return None
        record = OptimizedRecord.from_json(values)
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another version
        return None
    package = PACKAGES.get(record.backend, "")
    if record.backend != backend or record.bundle_sha256 != bundle.sha256:
        return None
    if record.versions.get(package) != installed(package):
        return None
    if backend in OF_ONE_MACHINE and record.machine != exact_processor():
        return None
    _check(directory, record.files)
    return directory, record


def weights_of(bundle: Bundle, directory: Path) -> Path:
    """Where a copy's graphs find their weights: from the bundle on where the copy is in it, so that both share them."""
    return bundle.path if directory.is_relative_to(bundle.path) else directory


def installed(package: str) -> str:
    """The version of a package; empty where it is not installed."""
    for name in (package, f"{package}-gpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def _check(directory: Path, files: Mapping[str, FileRecord]) -> None:
    """Hashes files whose size and time are not those of the last check."""
    stamp_file = directory / ".verified.json"
    try:
        stamps = json.loads(stamp_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no stamp: everything is hashed
        stamps = {}
    fresh: dict[str, list[Any]] = {}
    for name, record in files.items():
        path = directory / name
        status = path.stat() if path.is_file() else None
        stamp = [status.st_size, status.st_mtime_ns, record.sha256] if status is not None else []
        changed = status is None or status.st_size != record.size
        if changed or (stamps.get(name) != stamp and sha256_of(path) != record.sha256):
            raise BundleIntegrityError(
                f"{path} is not the file that was made",
                f"make it again: blip2edge optimize {_bundle_of(directory)} --backend {directory.name}",
            )
        fresh[name] = stamp
    if fresh != stamps:
        try:
            stamp_file.write_text(json.dumps(fresh), encoding="utf-8")
        except OSError:  # read-only: hashed again at the next load
            return


def _bundle_of(directory: Path) -> str:
    return str(directory.parents[1])


class GraphOpener:
    """Loads a bundle's graphs, each from the copy that suits the backend or else from the bundle.

    Args:
        bundle: An opened bundle.
        backend: ``auto``, or a backend by name.
        threads: Threads within an operator.
        portable: Passes over copies.

    Attributes:
        copied: The graphs that were loaded from a copy.

    Raises:
        BackendError: The backend is unknown.
        BundleIntegrityError: A file of the copy was changed.
    """

    def __init__(
        self, bundle: Bundle, backend: str = "auto", threads: int | None = None, *, portable: bool = False
    ) -> None:
        self._bundle, self.backend, self.threads = bundle, backend, threads
        self.copied: list[str] = []
        if bundle.manifest.engines_of:
            backend = engines_backend(bundle, backend)
        found = find_backend(backend)
        copy, engines, self._host = found.copy, found.engines, found.host
        self._engines = import_module(found.module).EngineOpener(bundle, engines) if engines else None
        self._copy = read_copy(bundle, copy) if copy and not portable else None

    @property
    def takes_all_cores(self) -> bool:
        """Whether two graphs that run at once would want more cores than there are."""
        return self._host and 2 * (self.threads or cores()) > cores()

    def __call__(self, graph: str) -> Session:
        """Loads a graph by its name.

        Raises:
            BundleError: The bundle has no such graph.
            BackendError: The backend is not there.
        """
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
        settled = Settled(weights_of(self._bundle, directory), found.layout)
        session: Session = module.open_graph(directory / found.file, self.threads, settled)
        return OneByOne(session) if found.one_by_one else session


class OneByOne:
    """A session whose batches are run a row at a time, so that no row hangs on another."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.input_names, self.output_names = session.input_names, session.output_names

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """See :class:`blip2edge.runtime.session.Session`."""
        rows = len(next(iter(inputs.values())))
        if rows == 1:
            return self._session.run(inputs, outputs)
        parts = [
            self._session.run({name: array[row : row + 1] for name, array in inputs.items()}, outputs)
            for row in range(rows)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def close(self) -> None:
        """See :class:`blip2edge.runtime.session.Session`."""
        self._session.close()
