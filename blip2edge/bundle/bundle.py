"""An opened bundle: its directory, its manifest, and the directories of files that are derived from it."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

from blip2edge.bundle.integrity import check_files, sha256_of
from blip2edge.bundle.manifest import MANIFEST, GraphRecord, Manifest, read_manifest
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import Blip2EdgeError, BundleError, OutputError, UsageError, option
from blip2edge.progress import ProgressCallback


class Bundle:
    """An opened bundle: its directory and its manifest.

    Attributes:
        path: The directory of the bundle.
        manifest: The contents of ``bundle.json``.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.manifest.family}, {self.manifest.precision})"

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads ``bundle.json`` and checks that every file is there and unchanged.

        A file that still has the size and modification time of the last check is not hashed again.

        Raises:
            BundleError: The directory is not a bundle, or its manifest cannot be read.
            BundleVersionError: A newer version of blip2edge wrote the bundle.
            BundleIntegrityError: A file is missing or was changed.
            UsageError: ``path`` is not a str or a path object.
        """
        if not isinstance(path, (str, os.PathLike)):
            raise UsageError(
                f"expected {option('bundle')} to be the path of a directory, got {type(path).__name__}",
                "give a str or a pathlib.Path",
            )
        directory = Path(path)
        bundle = cls(directory, read_manifest(directory))
        bundle._check(use_stamps=True)
        return bundle

    def verify(self, progress: ProgressCallback | None = None) -> None:
        """Hashes every file, also those that did not change since the last check.

        Args:
            progress: Called with a file's name, the number of files done and the number of all files.

        Raises:
            BundleIntegrityError: A file is missing or was changed.
        """
        self._check(use_stamps=False, progress=progress)

    def _check(self, *, use_stamps: bool, progress: ProgressCallback | None = None) -> None:
        check_files(
            self.path,
            self.manifest.files,
            manifest=MANIFEST,
            fix=f"copy the bundle again, or export the checkpoint again with {option('force', on=True)}",
            use_stamps=use_stamps,
            progress=progress,
        )

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
        return self.manifest.engines_of or sha256_of(self.path / MANIFEST)

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
