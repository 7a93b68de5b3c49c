"""Optimized copies of a bundle: their record ``optimized.json``, and which copy can be used.

The folder ``optimized/<backend>/`` of a bundle contains graphs that were rewritten for one backend: an optimized copy.
Its ``optimized.json`` has the hash of the bundle from which the copy was made. A copy is ignored if it was made from
another bundle or by another version of the backend, or if the user requires a signature and the signature does not list
the copy. Then the exported graphs of the bundle (the portable graphs) are used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest_fields import OPTIMIZED_FIELDS
from blip2edge.bundle.schema import DERIVED, Parity
from blip2edge.bundle.trust.integrity import FileRecord, Listing, check_unlisted, sha256_of
from blip2edge.errors import BundleError, BundleIntegrityError
from blip2edge.packages import installed
from blip2edge.reading import checking, read_json
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.probe import exact_processor

KIND = "optimized"
RECORD = DERIVED[KIND]
SCHEMA_VERSION = 2
PACKAGES = {"cpu": "onnxruntime", "openvino": "openvino", "cuda": "", "cuda-decoder": ""}
"""For each backend, the package that must have the same version as when the copy was made. The name is empty if any
version can load the copy: ONNX Runtime optimizes a copy for CUDA again while loading it, and the driver loads compiled
kernels."""

GPU = "gpu"
"""Key in ``versions``; its value is the name of the GPU in the machine that made the copy."""

CONDITIONS = {
    GPU: "GPU",
    "driver": "CUDA version of the driver",
    "onnxruntime": "version of ONNX Runtime",
    "cuda_copy": "copy for the backend cuda",
}
"""Keys of :func:`timing_conditions`, each with its meaning."""

OF_ONE_MACHINE = ("openvino",)
"""Backends whose optimized copies are compiled for one processor, and are not used on other processors."""


@dataclass(frozen=True)
class OptimizedGraph:
    """What ``optimized.json`` records about one graph of an optimized copy.

    Attributes:
        file: Name of the graph's file in the copy's directory. For ``cuda-decoder``, it is the file that describes the
            decoder for the kernels.
        passes: Names of the optimization passes that rewrote the graph.
        one_by_one: Whether to run the rows of a batch separately, because rows in one batch would change each other.
        layout: Whether ONNX Runtime prepacks the weights for the processor when it loads the file.
        parity: Difference between the outputs of this graph and those of the portable graph; empty if they are compared
            by cosine only, as those of quantized graphs are.
        cosine: The smallest cosine similarity between outputs of this graph and of the portable graph; None for
            compiled kernels, which are not run where they are made.
        milliseconds: CPU time of the portable graph and of this graph, on the machine that made the copy. It is the
            time of one run or, for a compiled graph, the time to open its file. None if nothing was measured.
        timed_with: What the time of compiled kernels was compared with and on which GPU, see
            :func:`timing_conditions`; empty for other graphs.
    """

    file: str
    passes: tuple[str, ...]
    one_by_one: bool
    layout: bool
    parity: tuple[Parity, ...]
    cosine: float | None
    milliseconds: tuple[float, float] | None
    timed_with: Mapping[str, str] = field(default_factory=dict)

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
            None if values["cosine"] is None else float(values["cosine"]),
            None if times is None else (float(times[0]), float(times[1])),
            values.get("timed_with", {}),
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
        if not isinstance(record, str):
            _check_copy(bundle, directory, record, use_stamps)
            return directory, record
    return None


def why_unused(bundle: Bundle, backend: str) -> str:
    """Says why :func:`read_copy` finds no copy for a backend; empty if no directory has a copy, or one can be used."""
    found = (_usable_record(bundle, place / backend, backend) for place in bundle.derived(KIND))
    return next((reason for reason in found if isinstance(reason, str) and reason), "")


def _usable_record(bundle: Bundle, directory: Path, backend: str) -> OptimizedRecord | str:
    """Reads the ``optimized.json`` of a copy; if the copy must be ignored, returns the reason, empty without a copy."""
    path = directory / RECORD
    if not path.is_file():
        return ""
    if not bundle.admits(directory, RECORD):
        return "the signature of the bundle does not list it"
    try:
        values = read_json(path, BundleError, strict=True)
        if values.get("schema_version") != SCHEMA_VERSION:
            return "another version of blip2edge made it"
        with checking(path, "the record of an optimized copy", BundleError):
            record = OptimizedRecord.from_json(values)
    except BundleError:  # a broken one
        return f"its {RECORD} is damaged"
    return _misfit(bundle, record, backend)


def _misfit(bundle: Bundle, record: OptimizedRecord, backend: str) -> OptimizedRecord | str:
    """Returns the record if it fits the bundle, the backend and this machine, else the reason why it does not."""
    package = PACKAGES.get(record.backend, "")
    if record.backend != backend:
        return f"it was made for the backend {record.backend}"
    if record.bundle_sha256 != bundle.sha256:
        return "it was made from another bundle, or the bundle has changed since"
    if package and record.versions.get(package) != installed(package):
        return f"it was made with another version of {package}"
    if backend in OF_ONE_MACHINE and record.machine != exact_processor():
        return "it was made on another processor"
    return record


def _check_copy(bundle: Bundle, directory: Path, record: OptimizedRecord, use_stamps: bool) -> None:
    """Checks the hashes of a copy's files, and that the list of files contains the file of every graph."""
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


def timing_conditions(bundle: Bundle) -> dict[str, str]:
    """Returns the conditions on this machine for a timing of compiled kernels, by the keys of :data:`CONDITIONS`.

    The timing compares the kernels with the backend ``cuda``; it is valid as long as these values stay equal.
    ``cuda_copy`` is the hash of the ``optimized.json`` of the bundle's copy for ``cuda``; empty without such a copy.
    """
    driver = probe.nvidia_driver()
    copy = read_copy(bundle, "cuda")
    return {
        GPU: driver.gpus[0].name if driver.gpus else "",
        "driver": driver.version,
        "onnxruntime": installed("onnxruntime"),
        "cuda_copy": sha256_of(copy[0] / RECORD) if copy is not None else "",
    }


def changed_conditions(bundle: Bundle, graph: OptimizedGraph) -> list[str]:
    """Returns the conditions that have changed since a graph was timed, each as a text; empty if none has changed."""
    if not graph.timed_with:
        return ["the record does not say what the kernels were compared with"]
    here = timing_conditions(bundle)
    return [
        f"another {meaning} ({graph.timed_with.get(key) or 'none'} then, {here[key] or 'none'} now)"
        if key != "cuda_copy"
        else f"another {meaning}"
        for key, meaning in CONDITIONS.items()
        if graph.timed_with.get(key) != here[key]
    ]
