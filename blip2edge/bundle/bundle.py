"""An opened bundle: its directory, its manifest, and the directories of files that are derived from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from blip2edge.bundle.hub.download import find_bundle
from blip2edge.bundle.hub.names import is_downloaded
from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest, read_manifest
from blip2edge.bundle.outputs.locks import recover, recover_in
from blip2edge.bundle.schema import DERIVED
from blip2edge.bundle.trust.integrity import CheckedFiles, Listing
from blip2edge.bundle.trust.signature import Signature, find_signature, read_signature, unsigned_paths
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import Blip2EdgeError, BundleError, OutputError, UsageError, option
from blip2edge.progress import ProgressCallback
from blip2edge.reading import reading

RECORDS = (MANIFEST, *DERIVED.values())
MOST_REPLACED = 8
"""Number of attempts to load a bundle; an attempt fails if another run replaces the bundle during the attempt."""

Loaded = TypeVar("Loaded")


@runtime_checkable
class Closable(Protocol):
    """Something that holds files or memory until it is closed."""

    def close(self) -> None:
        """Releases the files and the memory."""


class Bundle:
    """An opened bundle: its directory and its manifest.

    Attributes:
        path: The directory of the bundle.
        manifest: The contents of ``bundle.json``.
        signature: The signed files with their hashes; None if no signature is required.
        checked: The record of the files that were checked, with their state at that time.
        unsigned: Files and folders that are not used because the required signature does not list them; their paths in
            the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest, signature: Signature | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.signature = signature
        self.checked = CheckedFiles(strict=signature is not None)
        self.unsigned: list[str] = []
        self._status = _status(path)

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.family}, {self.manifest.precision})"

    @classmethod
    def open(
        cls, path: str | Path, *, require_signature: str | Path | None = None, signature: str | Path | None = None
    ) -> Bundle:
        """Reads ``bundle.json`` and checks that every file is there and unchanged.

        A file that still has the size, times and inode of the last check is not hashed again. If a signature is
        required, every file is hashed.

        Args:
            path: The directory of the bundle; or ``hub:ORG/NAME[@REVISION]``, a bundle on the Hugging Face hub, to
                download it into the hub's cache.
            require_signature: A public key in PEM format. The bundle must have a signature that was made with the
                private key of the same pair; files that the signature does not list are not used. None: no signature
                is required.
            signature: The signature file; None for ``model.sig`` in the bundle, or else ``BUNDLE.sig`` beside it.

        Raises:
            BundleError: The directory is not a bundle, its manifest cannot be read, or it cannot be downloaded.
            BundleVersionError: A newer version of blip2edge wrote the bundle.
            BundleIntegrityError: A file is missing or was changed.
            BundleSignatureError: The required signature is missing, is of another key, or lists other files.
            MissingPackageError: The package ``model-signing`` is not installed, and a signature is required; or
                ``huggingface_hub`` is not installed, and a bundle of the hub is named.
            UsageError: ``path`` is not a str or a path object, or ``require_signature`` is not a public key.
        """
        return load_whole(path, lambda bundle: bundle, require_signature=require_signature, signature=signature)

    @classmethod
    def _open(cls, directory: Path, signature: Signature | None) -> Bundle:
        """Opens a bundle. If a signature is required, the caller has already checked it with the public key."""
        if not (directory / MANIFEST).is_file():
            read_manifest(directory)  # raises the error of a directory that is not a bundle
        checked = CheckedFiles(strict=signature is not None)
        with reading(directory / MANIFEST, "a manifest", BundleError):
            sha256, _ = checked.hash(directory / MANIFEST)
        bundle = cls(directory, read_manifest(directory), signature)
        bundle.checked = checked
        if signature is not None:
            signature.require({MANIFEST: sha256, **bundle.manifest_hashes()})
            bundle.unsigned += unsigned_paths(directory, signature)
        bundle._check(use_stamps=True)
        return bundle

    def manifest_hashes(self) -> dict[str, str]:
        """Returns the SHA-256 of each file that ``bundle.json`` lists, by file name."""
        return {name: record.sha256 for name, record in self.manifest.files.items()}

    def admits(self, directory: Path, record: str) -> bool:
        """Returns whether the files of a derived directory may be used.

        They may be used if no signature is required, or if the required signature lists ``record`` with its hash.

        Args:
            directory: Directory of an optimized copy or of engines.
            record: Name of the file in this directory that lists the other files with their hashes; the caller must
                read this file after the call.
        """
        if self.signature is None:
            return True
        if directory.is_relative_to(self.path) and directory == directory.resolve():  # it is no link
            name = (directory / record).relative_to(self.path).as_posix()
            sha256, _ = self.checked.hash(directory / record)
            if self.signature.files.get(name) == sha256:
                return True
        inside = directory.is_relative_to(self.path)
        shown = directory.relative_to(self.path).as_posix() if inside else str(directory)
        if shown not in self.unsigned:
            self.unsigned.append(shown)
        return False

    def verify(self, progress: ProgressCallback | None = None) -> None:
        """Hashes every file, also those that did not change since the last check.

        Args:
            progress: Called with a file's name, the number of files done and the number of all files.

        Raises:
            BundleIntegrityError: A file is missing or was changed.
        """
        self._check(use_stamps=False, progress=progress)

    def check_unchanged(self) -> None:
        """Checks that the bundle was not replaced since it was opened.

        Raises:
            BundleError: Another bundle has its name now.
        """
        if self._status[:-1] != _status(self.path)[:-1]:  # a new link to bundle.json changes the last time
            raise BundleError(f"{self.path} was replaced by another run while it was read", "run the command again")

    def _check(self, *, use_stamps: bool, progress: ProgressCallback | None = None) -> None:
        fix = f"copy the bundle again, or export the checkpoint again with {option('force', on=True)}"
        if is_downloaded(self.path):
            fix = "remove this file, and run the command again: it downloads the file again"
        listing = Listing(self.path, self.manifest.files, MANIFEST, fix)
        self.checked.check(listing, use_stamps=use_stamps, progress=progress)

    def require_graphs(self, purpose: str, error: type[Blip2EdgeError] = BundleError) -> None:
        """Checks that the bundle contains graphs, and not only engines that were built from them.

        Args:
            purpose: What needs the graphs, such as a command; the error begins with it.
            error: Class of the error.

        Raises:
            BundleError: The bundle contains engines only. ``error`` is raised instead if it is given.
        """
        if self.manifest.engines_of:
            raise error(
                f"{purpose} needs graphs, but {self.path} contains engines only",
                "use the bundle that the engines were built from",
            )

    def file(self, name: str) -> Path:
        """Returns the path of a file of the bundle.

        The file must be listed in ``bundle.json``. Engines are never listed there; all other files are.

        Raises:
            BundleError: ``bundle.json`` does not list the file, so its hash was not checked.
        """
        if name not in self.manifest.files:
            raise BundleError(
                f"{self.path / name} is not listed in {MANIFEST}",
                "copy the bundle again, or export the checkpoint again",
            )
        return self.path / name

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of ``bundle.json``; engines and optimized copies record this hash of the bundle they were made from.

        ``bundle.json`` holds the hash of every other file, so its hash identifies the whole bundle. For a bundle that
        holds only engines, this is the hash of the bundle that the engines were built from.
        """
        path = self.path / MANIFEST
        return self.manifest.engines_of or self.checked.sha256(path) or self.checked.hash(path)[0]

    def derived(self, kind: str) -> list[Path]:
        """Returns the directories to read engines or optimized copies from: in the bundle, and in the user's cache.

        The directory that :meth:`derive` writes to comes first, so that what the user makes is used before what came
        with the bundle. If a signature is required, the bundle's directory comes first: the cache is not signed.

        Args:
            kind: Kind of the derived files, ``engines`` or ``optimized``.
        """
        inside, *cached = self._derived(kind)
        if self.manifest.engines_of:  # its engines are all that it has
            cached = []
        written = inside if inside.is_dir() else self.path
        to_cache = is_downloaded(self.path) or not os.access(written, os.W_OK)
        places = [*cached, inside] if to_cache and self.signature is None else [inside, *cached]
        for place in places:
            recover_in(place)
        return [place for place in places if place.is_dir()]

    def derive(self, kind: str) -> Path:
        """Makes the directory to write engines or optimized copies to.

        The directory is in the bundle, or in the user's cache if the bundle is read-only or in the hub's cache.

        Args:
            kind: Kind of the derived files, ``engines`` or ``optimized``.

        Raises:
            OutputError: Neither the bundle nor the cache can be written.
        """
        places = self._derived(kind)
        for place in places[1:] if is_downloaded(self.path) else places:
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(place, os.W_OK):
                return place
        raise OutputError(
            f"none of the directories {', '.join(map(str, places))} can be written",
            "set XDG_CACHE_HOME to a writable directory",
        )

    def _derived(self, kind: str) -> tuple[Path, ...]:
        inside = self.path / kind
        try:
            return inside, cache_directory() / kind / self.sha256[:16]
        except RuntimeError:  # no home directory
            return (inside,)

    def graph(self, name: str) -> GraphRecord:
        """Returns the manifest's record of the graph ``name``.

        Raises:
            BundleError: The bundle has no such graph.
        """
        if name not in self.manifest.graphs:
            raise BundleError(
                f"{self.path} has no graph {name}; it has {', '.join(self.manifest.graphs)}",
                f"this bundle is of the family {self.manifest.family}; use a bundle of another family, or another "
                "command",
            )
        return self.manifest.graphs[name]


def load_whole(
    path: str | Path,
    load: Callable[[Bundle], Loaded],
    *,
    require_signature: str | Path | None = None,
    signature: str | Path | None = None,
) -> Loaded:
    """Opens a bundle and calls ``load`` with it. If a run replaces the bundle meanwhile, both steps are repeated.

    Args:
        path: The directory of the bundle, or its name on the hub, ``hub:ORG/NAME[@REVISION]``.
        load: Function that loads something, such as a captioner, from the opened bundle.
        require_signature: A public key in PEM format, if the bundle must be signed; see :meth:`Bundle.open`.
        signature: The signature file; None for the usual places, see :meth:`Bundle.open`.

    Raises:
        BundleError, BundleVersionError, BundleIntegrityError, UsageError: For the same reasons as in
            :meth:`Bundle.open`. The errors of ``load`` are raised too.
    """
    _check_path(path)
    directory = find_bundle(path, public_key=require_signature)
    recover(directory)
    if require_signature is not None:
        directory = directory.resolve()  # so that a link to the bundle can change without effect
    for _ in range(MOST_REPLACED):
        before = _whole_status(directory)
        try:
            loaded = load(Bundle._open(directory, _signed(directory, require_signature, signature)))
        except (Blip2EdgeError, OSError):
            if before == _whole_status(directory):
                raise
            continue
        if before == _whole_status(directory):
            return loaded
        if isinstance(loaded, Closable):
            loaded.close()
    raise BundleError(f"{directory} is replaced again and again while it is read", "wait until other runs have ended")


def _signed(directory: Path, public_key: str | Path | None, signature: str | Path | None) -> Signature | None:
    """Reads the signature of a bundle and checks it with the public key; returns None if there is no public key."""
    if public_key is None:
        return None
    if not (directory / MANIFEST).is_file():
        read_manifest(directory)  # raises the error of a directory that is not a bundle
    return read_signature(find_signature(directory) if signature is None else Path(signature), Path(public_key))


def _check_path(path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise UsageError(
            f"expected {option('bundle')} to be the path of a directory, got {type(path).__name__}",
            "give a str or a pathlib.Path",
        )


def _whole_status(directory: Path) -> list[tuple[int, ...]]:
    """Returns numbers that change if ``bundle.json``, or an ``engine.json`` or ``optimized.json``, is replaced."""
    return [_status(path) for path in (directory, *sorted(directory.glob("*/[!.]*")))]


def _status(directory: Path) -> tuple[int, ...]:
    """Returns numbers that change if the record in a directory, such as ``bundle.json``, is replaced.

    The tuple is empty if the directory has no record.
    """
    try:
        record = next(path for path in (directory / name for name in RECORDS) if path.is_file())
        status = record.stat()
    except (OSError, ValueError, StopIteration):
        return ()
    # The last: the inode of a removed bundle is used again, and a copy may keep the time of modification.
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
