"""Reads and writes ``optimized.json``, the record of an optimized copy, and finds the copy that fits this machine.

``optimized/<backend>/`` holds graphs rewritten for one backend, and the record names the bundle they were made from
by its hash. A copy of another bundle, or made by another version of the backend, is not used; the portable graph is
used instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.integrity import FileRecord, check_files
from blip2edge.bundle.schema import Parity
from blip2edge.packages import installed
from blip2edge.runtime.backends.probe import exact_processor

RECORD = "optimized.json"
SCHEMA_VERSION = 2
KIND = "optimized"
PACKAGES = {"cpu": "onnxruntime", "openvino": "openvino"}
"""The package that runs the copies, by backend."""

OF_ONE_MACHINE = ("openvino",)
"""Backends whose copies are compiled for one processor, and not used on any other."""


@dataclass(frozen=True)
class OptimizedGraph:
    """What ``optimized.json`` records about one graph of an optimized copy.

    Attributes:
        file: Name of the graph's file in the copy's directory.
        passes: Names of the optimization passes that rewrote the graph.
        one_by_one: Whether to run the rows of a batch separately; see :class:`open_graph.RowByRow`.
        layout: Whether ONNX Runtime prepacks the weights for the processor when it loads the file.
        parity: Difference between the outputs of this graph and those of the portable graph.
        cosine: The smallest cosine similarity between outputs of this graph and of the portable graph.
        milliseconds: CPU time of the portable graph and of this graph, on the machine that made the copy: of one run,
            or of opening the file if the graph is compiled.
    """

    file: str
    passes: tuple[str, ...]
    one_by_one: bool
    layout: bool
    parity: tuple[Parity, ...]
    cosine: float
    milliseconds: tuple[float, float]

    def to_json(self) -> dict[str, Any]:
        """The graph's record as a JSON object for ``optimized.json``."""
        return {**vars(self), "parity": [parity.to_json() for parity in self.parity]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> OptimizedGraph:
        """Reads a graph's record from the JSON object that :meth:`to_json` made."""
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
        backend: The backend that runs the copy.
        bundle_sha256: SHA-256 of the ``bundle.json`` of the bundle that was optimized.
        graphs: The graphs that run or open faster than the portable ones, by name; the others run from the bundle.
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
        """The record as the JSON object of ``optimized.json``."""
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
            KeyError, TypeError, ValueError: A key is missing, or a value has the wrong type.
        """
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
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (directory / RECORD).write_text(text, encoding="utf-8")


def read_copy(bundle: Bundle, backend: str) -> tuple[Path, OptimizedRecord] | None:
    """Finds a bundle's optimized copy for a backend, and checks the files of the copy.

    Returns:
        Directory and record of the copy; None if there is no copy, or if it was made from another bundle, by another
        version of the backend's package or, for some backends, on another processor.

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
    check_files(
        directory,
        record.files,
        manifest=RECORD,
        fix=f"make the copy again: blip2edge optimize {bundle.path} --backend {backend}",
    )
    return directory, record


def weights_of(bundle: Bundle, directory: Path) -> Path:
    """Returns the directory of a copy's external weights: the bundle's if the copy is inside the bundle."""
    return bundle.path if directory.is_relative_to(bundle.path) else directory
