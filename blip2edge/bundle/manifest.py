"""``bundle.json``: what a bundle holds, sealed by the hash of every file."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from blip2edge.bundle.schema import (
    CacheSpec,
    CrossSpec,
    DraftSpec,
    GraphSpec,
    MergingRecord,
    Parity,
    PromptSpec,
    TensorSpec,
)
from blip2edge.errors import BundleError, BundleIntegrityError, BundleVersionError, OutputError, option
from blip2edge.progress import ProgressCallback

MANIFEST = "bundle.json"
SCHEMA_VERSION = 1
STAMP = ".verified.json"
CHUNK = 1 << 20  # bytes hashed at a time


def sha256_of(path: Path) -> str:
    """Hash of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """A file's seal."""

    sha256: str
    size: int  # bytes

    @classmethod
    def of(cls, path: Path) -> FileRecord:
        """The record of a file as it is now."""
        return cls(sha256_of(path), path.stat().st_size)


@dataclass(frozen=True)
class GraphRecord:
    """A graph of the bundle: its tensors, its precision and what parity was seen."""

    spec: GraphSpec
    precision: str
    parity: tuple[Parity, ...] = ()
    fp32_exceptions: tuple[str, ...] = ()
    data_files: tuple[str, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All of its files: the graph's own, and those of its weights."""
        return (self.spec.file, *self.data_files)

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``bundle.json``."""
        return {
            "file": self.spec.file,
            "data_files": list(self.data_files),
            "precision": self.precision,
            "fp32_exceptions": list(self.fp32_exceptions),
            "inputs": [spec.to_json() for spec in self.spec.inputs],
            "outputs": [spec.to_json() for spec in self.spec.outputs],
            "parity": [parity.to_json() for parity in self.parity],
        }

    @classmethod
    def from_json(cls, name: str, values: Mapping[str, Any]) -> GraphRecord:
        """The inverse of :meth:`to_json`."""
        spec = GraphSpec(
            name,
            tuple(TensorSpec.from_json(item) for item in values["inputs"]),
            tuple(TensorSpec.from_json(item) for item in values["outputs"]),
        )
        return cls(
            spec=spec,
            precision=values["precision"],
            parity=tuple(Parity.from_json(item) for item in values.get("parity", ())),
            fp32_exceptions=tuple(values.get("fp32_exceptions", ())),
            data_files=tuple(values.get("data_files", ())),
        )


@dataclass(frozen=True)
class Manifest:
    """The contents of ``bundle.json``.

    Attributes:
        family: ``model_type`` of the source checkpoint.
        source: ``checkpoint`` (where it lay) and ``sha256`` (over names and hashes of its files).
        precision: ``fp32``, ``fp16`` or ``bf16``; of a calibrated bundle that of what was not quantised.
        verify: How it was checked: ``full`` or ``sample``.
        max_positions: Longest context of the language model, or longest text of a model that compares.
        vocab_size: Logits, or tokens that a text can have.
        cache, prompt: None where nothing is generated.
        generation: Defaults: ``eos_token_ids``, ``pad_token_id``, ``max_new_tokens``; empty where there is no such.
        files: Seal of every file of the bundle but ``bundle.json`` itself.
        versions: What made it.
        cross: What the decoder looks at beside its own text; None for nothing.
        draft: The small captioner inside the bridge; None where the checkpoint has none.
        calibration: How ``calibrate`` made it from another bundle (docs/precision.md); empty where it did not.
        merging: Patches that the vision encoder merges; None where it merges none.
        engines_of: Hash of the ``bundle.json`` whose engines this bundle holds in place of its graphs; empty where it
            holds the graphs.
    """

    family: str
    source: Mapping[str, str]
    precision: str
    verify: str
    graphs: Mapping[str, GraphRecord]
    cache: CacheSpec | None
    max_positions: int
    vocab_size: int
    preprocessing: Mapping[str, Any]
    prompt: PromptSpec | None
    generation: Mapping[str, Any]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    cross: CrossSpec | None = None
    draft: DraftSpec | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    merging: MergingRecord | None = None
    engines_of: str = ""

    def to_json(self) -> dict[str, Any]:
        """The JSON object of ``bundle.json``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "family": self.family,
            "source": dict(self.source),
            "precision": self.precision,
            "verify": self.verify,
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "cache": None if self.cache is None else dict(vars(self.cache)),
            "cross": None if self.cross is None else dict(vars(self.cross)),
            "max_positions": self.max_positions,
            "vocab_size": self.vocab_size,
            "preprocessing": dict(self.preprocessing),
            "prompt": None if self.prompt is None else self.prompt.to_json(),
            "generation": dict(self.generation),
            "files": {name: dict(vars(record)) for name, record in sorted(self.files.items())},
            "versions": dict(self.versions),
            "draft": None if self.draft is None else dict(vars(self.draft)),
            "calibration": dict(self.calibration),
            **({"merging": dict(vars(self.merging))} if self.merging is not None else {}),
            **({"engines_of": self.engines_of} if self.engines_of else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Manifest:
        """The inverse of :meth:`to_json`; raises KeyError, TypeError or ValueError on a wrong shape."""
        return cls(
            family=values["family"],
            source=values["source"],
            precision=values["precision"],
            verify=values["verify"],
            graphs={name: GraphRecord.from_json(name, graph) for name, graph in values["graphs"].items()},
            cache=CacheSpec(**values["cache"]) if values["cache"] else None,
            cross=CrossSpec(**values["cross"]) if values.get("cross") else None,
            max_positions=int(values["max_positions"]),
            vocab_size=int(values["vocab_size"]),
            preprocessing=values["preprocessing"],
            prompt=PromptSpec.from_json(values["prompt"]) if values["prompt"] else None,
            generation=values["generation"],
            files=_sealed(values),
            versions=values["versions"],
            draft=DraftSpec(**values["draft"]) if values.get("draft") else None,
            calibration=values.get("calibration", {}),
            merging=MergingRecord(**values["merging"]) if values.get("merging") else None,
            engines_of=values.get("engines_of", ""),
        )

    def graph_bytes(self, graph: GraphRecord) -> int:
        """The size of a graph's files; those that this bundle does not hold count nothing."""
        return sum(self.files[file].size for file in graph.files if file in self.files)

    def write(self, directory: Path) -> None:
        """Writes ``bundle.json``."""
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False) + "\n"
        (directory / MANIFEST).write_text(text, encoding="utf-8")


def _sealed(values: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The seals, one for every file that a graph needs, and none outside the bundle."""
    files = {name: FileRecord(**record) for name, record in values["files"].items()}
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"{name} is not a file of the bundle")
    for name, graph in () if values.get("engines_of") else values["graphs"].items():
        for needed in (f"{name}.onnx", *graph.get("data_files", ())):
            if needed not in files:
                raise ValueError(f"{needed} is not sealed")
    return files


class Bundle:
    """An opened bundle: its directory and its manifest."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads ``bundle.json`` and checks that every file is there and unchanged.

        A file whose size and modification time are those of the last check is taken as unchanged; any other is
        hashed again.

        Raises:
            BundleError: No bundle, or a manifest that cannot be read.
            BundleVersionError: Written by a newer version.
            BundleIntegrityError: A file is missing or changed.
        """
        directory = Path(path)
        bundle = cls(directory, _read(directory))
        bundle._check(_read_stamps(directory))
        return bundle

    def verify(self, progress: ProgressCallback | None = None) -> None:
        """Hashes every file, whatever the stamps say.

        Args:
            progress: Called with a file's name, how many are done and how many there are.

        Raises:
            BundleIntegrityError: A file is missing or changed.
        """
        self._check({}, progress)

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        return self.path / name

    @cached_property
    def sha256(self) -> str:
        """Hash of ``bundle.json``, and by the hashes in it of the whole bundle: what is derived names its parent so.

        Of a bundle that holds engines alone, the hash of the bundle that they were built from.
        """
        return self.manifest.engines_of or sha256_of(self.path / MANIFEST)

    def derived(self, kind: str) -> Path:
        """Where derived files of a kind (``engines``) are read: in the bundle, or in the cache of this user."""
        places = self._derived(kind)
        return next((place for place in places if place.is_dir()), places[0])

    def derive(self, kind: str) -> Path:
        """The directory that derived files of a kind are written to, made: the first of both that can be written.

        Raises:
            OutputError: Neither can.
        """
        places = self._derived(kind)
        for place in places:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(place, os.W_OK):
                return place
        raise OutputError(f"none of {', '.join(map(str, places))} can be written", "set XDG_CACHE_HOME")

    def _derived(self, kind: str) -> tuple[Path, ...]:
        inside = self.path / kind
        try:
            return inside, cache_directory() / kind / self.sha256[:16]
        except RuntimeError:  # no home directory, as in a container with a number for a user
            return (inside,)

    def graph(self, name: str) -> GraphRecord:
        """The record of a graph.

        Raises:
            BundleError: It has no such graph.
        """
        if name not in self.manifest.graphs:
            raise BundleError(
                f"{self.path} has no graph {name}; it has {', '.join(self.manifest.graphs)}",
                f"it was exported from a {self.manifest.family} checkpoint: use a command that fits it",
            )
        return self.manifest.graphs[name]

    def _check(self, stamps: Mapping[str, Any], progress: ProgressCallback | None = None) -> None:
        fresh: dict[str, list[Any]] = {}
        total = len(self.manifest.files)
        for done, (name, record) in enumerate(self.manifest.files.items()):
            if progress is not None:
                progress(name, done, total)
            path = self.path / name
            try:
                status = path.stat()
            except OSError as error:
                raise BundleIntegrityError(
                    f"{path} is missing, though bundle.json lists it",
                    f"export the checkpoint again with {option('force', on=True)}",
                ) from error
            stamp = [status.st_size, status.st_mtime_ns, record.sha256]
            if status.st_size != record.size or (
                stamps.get(name) != stamp and sha256_of(path) != record.sha256
            ):
                raise BundleIntegrityError(
                    f"{path} is not the file that was exported (its hash differs from bundle.json)",
                    f"copy the bundle again, or export the checkpoint again with {option('force', on=True)}",
                )
            fresh[name] = stamp
        if progress is not None:
            progress("verified", total, total)
        if fresh != stamps:
            _write_stamps(self.path, fresh)


def _read(directory: Path) -> Manifest:
    path = directory / MANIFEST
    if not directory.is_dir():
        raise BundleError(
            f"{directory} is not a directory, and a bundle is one",
            "make it with: blip2edge export CHECKPOINT -o BUNDLE",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        hint = "make a bundle of it with: blip2edge export CHECKPOINT -o BUNDLE"
        raise BundleError(f"{directory} has no {MANIFEST}, so it is not a bundle", hint) from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(
            f"{path} cannot be read as JSON ({error})",
            f"export the checkpoint again with {option('force', on=True)}",
        ) from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise BundleError(
            f"{path} has no schema_version", f"export the checkpoint again with {option('force', on=True)}"
        )
    if version > SCHEMA_VERSION:
        raise BundleVersionError(
            f"{path} has schema version {version}, and this blip2edge reads up to {SCHEMA_VERSION}",
            "upgrade it: pip install --upgrade blip2edge",
        )
    try:
        return Manifest.from_json(values)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(
            f"{path} does not follow schema version {version} ({type(error).__name__}: {error})",
            f"export the checkpoint again with {option('force', on=True)}",
        ) from error


def cache_directory() -> Path:
    """Where this user's derived files go: ``$XDG_CACHE_HOME/blip2edge`` or ``~/.cache/blip2edge``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "blip2edge"


def _stamp_paths(directory: Path) -> Iterator[Path]:
    """Beside the files; where that is read-only, in the user's cache, where there is a user."""
    yield directory / STAMP
    key = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    try:
        yield cache_directory() / "verified" / f"{key}.json"
    except RuntimeError:  # no home directory, as in a container with a number for a user
        return


def _read_stamps(directory: Path) -> Mapping[str, Any]:
    for path in _stamp_paths(directory):
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (
            OSError,
            ValueError,
        ):  # no stamp, or a broken one: everything is hashed, which is always right
            continue
        if isinstance(values, dict):
            return values
    return {}


def _write_stamps(directory: Path, stamps: Mapping[str, Any]) -> None:
    for path in _stamp_paths(directory):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(stamps), encoding="utf-8")
            return
        except OSError:  # read-only: the next place, and without any the files are hashed at every load
            continue
