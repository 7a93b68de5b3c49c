"""An opened bundle: its directory, its manifest, and the directories of files that are derived from it."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from blip2edge.bundle.integrity import CheckedFiles, Listing
from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest, read_manifest
from blip2edge.bundle.signature import Signature, find_signature, read_signature, unsigned_paths
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import Blip2EdgeError, BundleError, OutputError, UsageError, option
from blip2edge.progress import ProgressCallback


class Bundle:
    """An opened bundle: its directory and its manifest.

    Attributes:
        path: The directory of the bundle.
        manifest: The contents of ``bundle.json``.
        signature: The signed files, if a signature is required; None without.
        checked: The checked state of each file that was opened.
        unsigned: Files and folders that are not used because the required signature does not list them; their paths in
            the bundle.
    """

    def __init__(self, path: Path, manifest: Manifest, signature: Signature | None = None) -> None:
        self.path = path
        self.manifest = manifest
        self.signature = signature
        self.checked = CheckedFiles(strict=signature is not None)
        self.unsigned: list[str] = []

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
            path: The directory of the bundle.
            require_signature: A public key in PEM format. The bundle must have a signature of its private key; files
                that the signature does not list are not used. None: no signature is required.
            signature: The signature; None for ``model.sig`` in the bundle, or else ``BUNDLE.sig`` beside it.

        Raises:
            BundleError: The directory is not a bundle, or its manifest cannot be read.
            BundleVersionError: A newer version of blip2edge wrote the bundle.
            BundleIntegrityError: A file is missing or was changed.
            BundleSignatureError: The required signature is missing, is of another key, or lists other files.
            MissingPackageError: A signature is required, and the package ``model-signing`` is not installed.
            UsageError: ``path`` is not a str or a path object, or ``require_signature`` is not a public key.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(
                f"expected {option('bundle')} to be the path of a directory, got {type(path).__name__}",
                "give a str or a pathlib.Path",
            )
        directory, signed = Path(path), None
        if not (directory / MANIFEST).is_file():
            read_manifest(directory)  # raises the error of a directory that is not a bundle
        if require_signature is not None:
            directory = directory.resolve()  # so that a link to the bundle can change without effect
            place = find_signature(directory) if signature is None else Path(signature)
            signed = read_signature(place, Path(require_signature))
        checked = CheckedFiles(strict=signed is not None)
        checked.hash(directory / MANIFEST)
        bundle = cls(directory, read_manifest(directory), signed)
        bundle.checked = checked
        if signed is not None:
            signed.require({MANIFEST: checked.sha256(directory / MANIFEST), **bundle.manifest_hashes()})
            bundle.unsigned += unsigned_paths(directory, signed)
        bundle._check(use_stamps=True)
        return bundle

    def manifest_hashes(self) -> dict[str, str]:
        """The SHA-256 of each file that ``bundle.json`` lists, by file name."""
        return {name: record.sha256 for name, record in self.manifest.files.items()}

    def admits(self, directory: Path, record: str) -> bool:
        """Whether the files of a derived directory may be used: True unless a signature is required and lacks them.

        Args:
            directory: Directory of an optimized copy or of engines.
            record: Name of the file in it that lists the others with their hashes; read it after this call.
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

    def _check(self, *, use_stamps: bool, progress: ProgressCallback | None = None) -> None:
        fix = f"copy the bundle again, or export the checkpoint again with {option('force', on=True)}"
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
        """Returns the path of a file of the bundle."""
        return self.path / name

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of ``bundle.json``; engines and optimized copies record this hash of the bundle they were made from.

        ``bundle.json`` holds the hash of every other file, so its hash identifies the whole bundle. For a bundle that
        holds only engines, this is the hash of the bundle that the engines were built from.
        """
        path = self.path / MANIFEST
        return self.manifest.engines_of or self.checked.sha256(path) or self.checked.hash(path)[0]

    def derived(self, kind: str) -> Path:
        """Returns the directory to read engines or optimized copies from: in the bundle, or in the user's cache.

        Args:
            kind: Kind of the derived files, ``engines`` or ``optimized``.
        """
        places = self._derived(kind)
        return next((place for place in places if place.is_dir()), places[0])

    def derive(self, kind: str) -> Path:
        """Makes the directory to write engines or optimized copies to.

        The directory is in the bundle, or in the user's cache if the bundle is read-only.

        Args:
            kind: Kind of the derived files, ``engines`` or ``optimized``.

        Raises:
            OutputError: Neither the bundle nor the cache can be written.
        """
        places = self._derived(kind)
        for place in places:
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
