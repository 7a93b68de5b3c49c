"""Reads and writes ``engine.json``, which describes a folder of engines; finds the folder that fits this machine.

An engine is valid only for one GPU, one TensorRT version and one bundle. ``engine.json`` names these three in a
:class:`Fingerprint`.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.manifest_fields import ENGINES_FIELDS
from blip2edge.bundle.schema import DECODER, DERIVED, GraphSpec
from blip2edge.bundle.trust.integrity import CheckedFiles, FileRecord, Listing, check_unlisted
from blip2edge.bundle.trust.signature import how_to_sign
from blip2edge.errors import BackendError, EngineError, option
from blip2edge.reading import checking, read_json
from blip2edge.runtime.backends import probe

KIND = "engines"
RECORD = DERIVED[KIND]
SCHEMA_VERSION = 3
STEP = "step"
"""Name of the engine that runs between two decode steps: it chooses the token and returns the token's embedding."""

TOKEN_LOGPROBS = "token_logprobs"
"""Name of the ``step`` engine's output with the tokens' log-probabilities; engines of version 0.1 do not have it."""

CONSTANT, IN_PLACE = "constant", "in-place"
"""Kinds of KV cache in engines. ``constant``: ``past`` and ``present`` are two tensors. ``in-place``: they are
the same tensor."""


@dataclass(frozen=True)
class EngineRecord:
    """What ``engine.json`` records about one TensorRT engine.

    Attributes:
        spec: The engine's inputs and outputs, with the range of sizes that each axis was built for.
        file: Size and hash of the engine file.
        precision: Precision of the graph that the engine was built from.
        profiles: Names of the optimization profiles, in the order of their numbers in TensorRT.
        seconds: Duration of the build.
        warnings: Warnings of the TensorRT builder.
        asked: Number of matrix multiplications, by the precision in which the graph computes them.
        landed: Number of layers in the built engine, by the precision that TensorRT chose; None if the engine was built
            without a driver and could not be inspected.
        cache: Kind of the decoder's KV cache, one of ``DECODER_CACHES``; empty if the engine has no KV cache.
    """

    spec: GraphSpec
    file: FileRecord
    precision: str
    profiles: tuple[str, ...]
    seconds: float
    warnings: tuple[str, ...]
    asked: Mapping[str, int]
    landed: Mapping[str, int] | None
    cache: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns the record as a JSON object for ``engine.json``."""
        return {
            "file": f"{self.spec.name}.engine",
            **vars(self.file),
            "precision": self.precision,
            "profiles": list(self.profiles),
            "seconds": self.seconds,
            "warnings": list(self.warnings),
            "asked": dict(self.asked),
            "landed": None if self.landed is None else dict(self.landed),
            "cache": self.cache,
            **self.spec.to_json(),
        }

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> EngineRecord:
        """Reads a record from the JSON object that :meth:`to_json` made; ``name`` is the graph's name."""
        return cls(
            spec=GraphSpec.from_json(name, values),
            file=FileRecord(values["sha256"], values["size"]),
            precision=values["precision"],
            profiles=tuple(values["profiles"]),
            seconds=values["seconds"],
            warnings=tuple(values["warnings"]),
            asked=values["asked"],
            landed=values["landed"],
            cache=values.get("cache", CONSTANT if name == DECODER else ""),  # older versions wrote none
        )


@dataclass(frozen=True)
class EngineSet:
    """The engines of one folder, as its ``engine.json`` describes them.

    Attributes:
        fingerprint: The GPU, TensorRT version and bundle of the engines, as :meth:`Fingerprint.to_json` writes them.
        rebuild: The options of ``blip2edge build`` that built these engines.
        capacity: Number of positions in the decoder's KV cache; 0 if the cache grows, or if there is no cache.
        engines: The engines by graph name.
        directory: The folder of the engines and of ``engine.json``.
    """

    fingerprint: Mapping[str, Any]
    rebuild: tuple[str, ...]
    capacity: int
    engines: Mapping[str, EngineRecord]
    directory: Path

    def write(self) -> None:
        """Writes ``engine.json`` into :attr:`directory`."""
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
        """Reads the ``engine.json`` of a folder of engines.

        Raises:
            EngineError: ``engine.json`` cannot be read, or has another schema version.
        """
        path, fix = directory / RECORD, "build the engines again"
        values = read_json(path, EngineError, fix, strict=True)
        with checking(path, "a record of engines", EngineError, fix):
            if values.get("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"expected schema version {SCHEMA_VERSION}, got {values.get('schema_version')}")
            ENGINES_FIELDS(values, "")
            return cls(
                fingerprint=values["fingerprint"],
                rebuild=tuple(values["rebuild"]),
                capacity=values["capacity"],
                engines={name: EngineRecord.from_json(name, item) for name, item in values["engines"].items()},
                directory=directory,
            )

    def record(self, name: str) -> EngineRecord:
        """Returns the record of the engine that was built from the graph ``name``.

        Raises:
            EngineError: The folder has no engine for this graph.
        """
        if name not in self.engines:
            raise EngineError(
                f"{self.directory} has no engine {name}; it has {', '.join(self.engines)}",
                "build the engines again with this version of blip2edge",
            )
        return self.engines[name]

    def verify(self) -> None:
        """Computes the hash of every engine file, and compares it with ``engine.json``.

        Raises:
            BundleIntegrityError: An engine file is missing, was changed, or is not listed.
        """
        listing = self._listing(*self.engines)
        CheckedFiles().check(listing, use_stamps=False)
        check_unlisted(listing)

    def _listing(self, *names: str) -> Listing:
        files = {f"{name}.engine": self.record(name).file for name in names}
        return Listing(self.directory, files, RECORD, "build the engines again")

    def file(self, name: str, checked: CheckedFiles) -> Path:
        """Returns the path of the engine of the graph ``name``, after checking its hash.

        Args:
            name: The graph's name.
            checked: The bundle's object that checks files by their hash.

        Raises:
            EngineError: The folder has no engine for this graph.
            BundleIntegrityError: The file is missing or was changed.
        """
        checked.check(self._listing(name))
        return self.directory / f"{name}.engine"


@dataclass(frozen=True)
class Fingerprint:
    """The GPU, TensorRT, driver, machine and bundle that an engine was built for.

    Attributes:
        target: ``tensorrt`` or ``rtx``.
        tensorrt: Version of TensorRT.
        gpus: Compute capabilities that the engine supports, as ``sm86``; for ``tensorrt`` only the compute capability
            of the build GPU.
        gpu: The GPU's name; empty if the engine was built without one.
        multiprocessors: Number of multiprocessors (SM). AGX Orin and Orin NX have the same GPU name and differ in this
            number.
        memory_gib: Memory of the GPU, rounded to GiB.
        driver: CUDA version of the driver; empty if the engine was built without a GPU.
        machine: Processor architecture, ``x86_64`` or ``aarch64``.
        bundle_sha256: Hash of ``bundle.json``, which contains the hashes of all other files.
        version_compatible: Whether newer versions of TensorRT with the same major number can run the engine.
        hardware_compatible: Whether every GPU since Ampere can run the engine.
    """

    target: str
    tensorrt: str
    gpus: tuple[str, ...]
    gpu: str
    multiprocessors: int
    memory_gib: int
    driver: str
    machine: str
    bundle_sha256: str
    version_compatible: bool = False
    hardware_compatible: bool = False

    @property
    def name(self) -> str:
        """Returns the name of the folder below ``engines/``: target, TensorRT version, GPUs and machine."""
        size = f"{self.multiprocessors}x{self.memory_gib}g" if self.gpu and self.target == "tensorrt" else ""
        parts = (self.target, self.tensorrt, *self.gpus, size, self.machine)
        return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(part for part in parts if part))

    def to_json(self) -> dict[str, Any]:
        """Returns the fingerprint as a JSON object for ``engine.json``."""
        return {**asdict(self), "gpus": list(self.gpus)}


def fingerprint(target: str, version: str, bundle_sha256: str, compute_capabilities: Sequence[int]) -> Fingerprint:
    """Makes the fingerprint of an engine that is built now on this machine.

    Args:
        target: ``tensorrt`` or ``rtx``.
        version: Version of TensorRT.
        bundle_sha256: SHA-256 of ``bundle.json``.
        compute_capabilities: Compute capabilities from ``--sm``, for example 86; empty for the GPU of this machine.

    Raises:
        EngineError: There is no GPU, and ``compute_capabilities`` is empty.
    """
    driver = probe.Driver() if compute_capabilities else probe.nvidia_driver()
    gpu = next(iter(driver.gpus), None)
    if gpu is None and not compute_capabilities:
        raise EngineError(
            "building engines needs an NVIDIA GPU and its driver, but this machine has none",
            "build on the device that runs the engines, or build here for another GPU, for example of compute "
            f"capability 8.6, with: {option('target')} rtx {option('sm')} 86",
        )
    numbers = compute_capabilities or ([gpu.compute_capability] if gpu else [])
    return Fingerprint(
        target=target,
        tensorrt=version,
        gpus=tuple(f"sm{number}" for number in numbers),
        gpu=gpu.name if gpu else "",
        multiprocessors=gpu.multiprocessors if gpu else 0,
        memory_gib=gpu.memory_gib if gpu else 0,
        driver=driver.version if gpu else "",
        machine=platform.machine(),
        bundle_sha256=bundle_sha256,
    )


FIRST_COMPATIBLE = 80  # Ampere
LABELS = {
    "bundle_sha256": "the bundle",
    "target": "the target",
    "tensorrt": "TensorRT",
    "machine": "the processor architecture",
    "gpus": "the compute capability",
    "gpu": "the GPU",
    "multiprocessors": "the number of multiprocessors",
    "memory_gib": "the GPU's memory in GiB",
}


def check_fingerprint(found: dict[str, Any], here: Fingerprint, engines: Path, rebuild: str) -> None:
    """Checks that this machine can run engines: they must fit its GPU, its TensorRT and the bundle.

    Args:
        found: The value of ``fingerprint`` in ``engine.json``.
        here: The fingerprint that engines would have if they were built now on this machine.
        engines: The folder of the engines, for the error message.
        rebuild: The command that builds the engines again, for the error message.

    Raises:
        EngineError: The engines do not run here; the message names the first difference and the command.
    """
    values = here.to_json()
    for key, label in LABELS.items():
        if found.get(key) == values[key] or _fits(key, found, here):
            continue
        raise EngineError(
            f"the engines in {engines} were built for {label} {_plain(found.get(key))}, "
            f"but {label} here is {_plain(values[key])}",
            f"build the engines again: {rebuild}",
        )


def _fits(key: str, found: dict[str, Any], here: Fingerprint) -> bool:
    """Returns whether engines run on this machine although one value of the fingerprints differs.

    Args:
        key: The key whose values differ.
        found: Fingerprint of the engines.
        here: Fingerprint of this machine.
    """
    gpus, rtx = set(found.get("gpus", ())), found.get("target") == "rtx"
    if key == "tensorrt" and found.get("version_compatible"):
        made, now = (_numbers(text) for text in (str(found.get(key)), here.tensorrt))
        return made[:1] == now[:1] and made <= now
    if key in ("gpu", "multiprocessors", "memory_gib"):
        return rtx or bool(found.get("hardware_compatible"))
    if key == "gpus" and found.get("hardware_compatible"):
        return all(int(name[2:]) >= FIRST_COMPATIBLE for name in here.gpus)
    return key == "gpus" and rtx and set(here.gpus) <= gpus


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _plain(value: Any) -> str:
    return " ".join(value) if isinstance(value, (list, tuple)) else str(value)


def engine_folders(bundle: Bundle) -> list[Path]:
    """Returns the folders with engines of a bundle, in the bundle and in the user's cache."""
    return [path.parent for place in bundle.derived(KIND) for path in sorted(place.glob(f"*/{RECORD}"))]


def find_engines(bundle: Bundle, here: Fingerprint) -> EngineSet:
    """Finds the engines of a bundle that this machine can run.

    Args:
        bundle: The bundle whose engines are searched, in its folder ``engines/`` and in the user's cache.
        here: The fingerprint that engines would have if they were built now on this machine.

    Raises:
        EngineError: The bundle has no engines for this target, or no engines that run here: the message names the first
            difference and the command that builds the engines again.
    """
    build = f"blip2edge build {bundle.path} --target {here.target}"
    refusal: EngineError | None = None
    for folder in engine_folders(bundle):
        if not bundle.admits(folder, RECORD):
            refusal = refusal or unsigned_engines(bundle, folder)
            continue
        try:
            engines = EngineSet.read(folder)
            if engines.fingerprint.get("target") != here.target:
                continue
            check_fingerprint(dict(engines.fingerprint), here, folder, " ".join([build, *engines.rebuild]))
        except EngineError as error:
            refusal = refusal or error
            continue
        return engines
    if refusal is not None:
        raise refusal
    raise no_engines(bundle, here.target)


def unsigned_engines(bundle: Bundle, folder: Path) -> EngineError:
    """Returns the error for engines that are not signed although the user requires a signature."""
    return EngineError(f"the engines in {folder} are not signed", how_to_sign(bundle.path))


def no_engines(bundle: Bundle, target: str) -> EngineError:
    """Returns the error for a bundle that has no engines for ``target``, which is ``tensorrt`` or ``rtx``."""
    build = f"blip2edge build {bundle.path} --target {target}"
    return EngineError(f"{bundle.path} has no engines for {target}", f"build the engines: {build}")


def engines_backend(bundle: Bundle, backend: str) -> str:
    """Chooses the backend for a bundle that contains engines but no graphs.

    Args:
        bundle: The bundle without graphs.
        backend: Value of ``--backend``; ``auto`` chooses the target that the engines were built for.

    Raises:
        BackendError: The engines were not built for this backend.
        EngineError: The bundle contains no engines.
    """
    sets = [EngineSet.read(folder) for folder in engine_folders(bundle)]
    targets = list(dict.fromkeys(str(engines.fingerprint.get("target")) for engines in sets))
    if not targets:
        raise EngineError(f"{bundle.path} contains neither graphs nor engines", "copy the bundle again")
    if backend == "auto":
        return targets[0]
    if backend not in targets:
        raise BackendError(
            f"{bundle.path} contains engines only, which the backend {backend} cannot run",
            f"use {option('backend')} {targets[0]}",
        )
    return backend
