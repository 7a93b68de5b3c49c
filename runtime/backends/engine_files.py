"""The engines of a bundle: what stands in ``engine.json``, and which folder of engines this machine runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.manifest import STAMP, Bundle, FileRecord, sha256_of
from blip2edge.bundle.schema import GraphSpec, TensorSpec
from blip2edge.errors import BackendError, BundleIntegrityError, EngineError, option
from blip2edge.runtime.backends.fingerprint import Fingerprint, check_fingerprint

KIND = "engines"
RECORD = "engine.json"
SCHEMA_VERSION = 2
STEP = "step"
"""The engine between two steps: choice of the token, its row of the table."""


@dataclass(frozen=True)
class EngineRecord:
    """An engine of a folder.

    Attributes:
        spec: Its tensors, with the axes that it was built for.
        file: Its file's seal.
        precision: Of the graph that it was built from.
        profiles: Names, in the order of their numbers.
        seconds: What the build took.
        warnings: What the builder said.
        asked: Products of the graph by precision.
        landed: Layers of the engine by precision; None where no driver was there to look.
    """

    spec: GraphSpec
    file: FileRecord
    precision: str
    profiles: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]
    asked: Mapping[str, int]
    landed: Mapping[str, int] | None

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``engine.json``."""
        return {
            "file": f"{self.spec.name}.engine",
            **vars(self.file),
            "precision": self.precision,
            "profiles": list(self.profiles),
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "asked": dict(self.asked),
            "landed": None if self.landed is None else dict(self.landed),
            "inputs": [tensor.to_json() for tensor in self.spec.inputs],
            "outputs": [tensor.to_json() for tensor in self.spec.outputs],
        }

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> EngineRecord:
        """The inverse of :meth:`to_json`."""
        inputs, outputs = (
            tuple(TensorSpec.from_json(item) for item in values[key]) for key in ("inputs", "outputs")
        )
        return cls(
            spec=GraphSpec(name, inputs, outputs),
            file=FileRecord(values["sha256"], values["size"]),
            precision=values["precision"],
            profiles=tuple(values["profiles"]),
            seconds=values["seconds"],
            warnings=tuple(values["warnings"]),
            asked=values["asked"],
            landed=values["landed"],
        )


@dataclass(frozen=True)
class EngineSet:
    """The contents of ``engine.json``.

    Attributes:
        fingerprint: What the engines are tied to, as it was written.
        rebuild: The options of ``blip2edge build`` that made them.
        capacity: Slots of the decoder's cache; 0 where its cache grows, or where there is none.
        engines: By the graph's name.
        directory: Where they lie.
    """

    fingerprint: Mapping[str, Any]
    rebuild: tuple[str, ...]
    capacity: int
    engines: Mapping[str, EngineRecord]
    directory: Path

    def write(self) -> None:
        """Writes ``engine.json``."""
        document = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": dict(self.fingerprint),
            "rebuild": list(self.rebuild),
            "capacity": self.capacity,
            "engines": {name: record.to_json() for name, record in self.engines.items()},
        }
        (self.directory / RECORD).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> EngineSet:
        """Reads a folder's ``engine.json``.

        Raises:
            EngineError: It cannot be read, or is of another version.
        """
        path = directory / RECORD
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"schema version {values['schema_version']}, not {SCHEMA_VERSION}")
            return cls(
                fingerprint=values["fingerprint"],
                rebuild=tuple(values["rebuild"]),
                capacity=int(values["capacity"]),
                engines={
                    name: EngineRecord.from_json(name, item) for name, item in values["engines"].items()
                },
                directory=directory,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EngineError(
                f"{path} cannot be read ({type(error).__name__}: {error})", "build the engines again"
            ) from error

    def record(self, name: str) -> EngineRecord:
        """The record of an engine.

        Raises:
            EngineError: There is none.
        """
        if name not in self.engines:
            raise EngineError(
                f"{self.directory} has no engine {name}; it has {', '.join(self.engines)}",
                "build the engines again with this version",
            )
        return self.engines[name]

    def file(self, name: str) -> Path:
        """The file of an engine, whole: hashed unless its size and time are those of the last check.

        Raises:
            BundleIntegrityError: It is missing or changed.
        """
        record, path = self.record(name), self.directory / f"{name}.engine"
        status = path.stat() if path.is_file() else None
        stamp = [] if status is None else [status.st_size, status.st_mtime_ns, record.file.sha256]
        stamps = self._stamps()
        whole = status is not None and status.st_size == record.file.size
        if not whole or (stamps.get(name) != stamp and sha256_of(path) != record.file.sha256):
            raise BundleIntegrityError(
                f"{path} is missing or not the file that was built", "build the engines again"
            )
        if stamps.get(name) != stamp:
            self._stamp({**stamps, name: stamp})
        return path

    def _stamps(self) -> dict[str, Any]:
        try:
            values = json.loads((self.directory / STAMP).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # no stamps: every engine is hashed
            return {}
        return values if isinstance(values, dict) else {}

    def _stamp(self, stamps: Mapping[str, Any]) -> None:
        try:
            (self.directory / STAMP).write_text(json.dumps(stamps), encoding="utf-8")
        except OSError:  # read-only: hashed again at the next load
            return


def find_engines(bundle: Bundle, here: Fingerprint) -> EngineSet:
    """The engines of a bundle that this machine runs.

    Args:
        bundle: The bundle.
        here: What engines built now would be tied to.

    Raises:
        EngineError: There are none, or only such as were built for something else: the nearest is named, with the
            first thing in which it differs and the command that builds it again.
    """
    root = bundle.derived(KIND)
    folders = sorted(path.parent for path in root.glob(f"*/{RECORD}")) if root.is_dir() else []
    build = f"blip2edge build {bundle.path} --target {here.target}"
    refusal: EngineError | None = None
    for folder in folders:
        engines = EngineSet.read(folder)
        if engines.fingerprint.get("target") != here.target:
            continue
        try:
            check_fingerprint(dict(engines.fingerprint), here, folder, " ".join([build, *engines.rebuild]))
        except EngineError as error:
            refusal = refusal or error
            continue
        return engines
    if refusal is not None:
        raise refusal
    raise EngineError(f"{bundle.path} has no engines for {here.target}", f"build them: {build}")


def engines_backend(bundle: Bundle, backend: str) -> str:
    """The backend that runs a bundle of engines alone.

    Args:
        bundle: It.
        backend: As the user says it; ``auto`` for what the engines were built for.

    Raises:
        BackendError: A backend that runs graphs, of which there are none.
        EngineError: There are no engines either.
    """
    folders = sorted(bundle.derived(KIND).glob(f"*/{RECORD}"))
    targets = list(
        dict.fromkeys(str(EngineSet.read(path.parent).fingerprint.get("target")) for path in folders)
    )
    if not targets:
        raise EngineError(f"{bundle.path} holds neither graphs nor engines", "copy it again")
    if backend == "auto":
        return targets[0]
    if backend not in targets:
        raise BackendError(
            f"{bundle.path} holds engines alone, which the backend {backend} does not run",
            f"use {option('backend')} {targets[0]}",
        )
    return backend
