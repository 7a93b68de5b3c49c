"""Finds the directory of a bundle by its name, and downloads a bundle of the Hugging Face hub.

Everything is in the hub's own cache, in the directory of the repository, ``models--ORG--NAME``:

    snapshots/COMMIT/FILE        links to blobs, made by the hub's client
    blobs/ETAG                   links to the files of the bundle
    blobs/ETAG.*.incomplete      a download that was cut off; the next run continues it
    bundles/COMMIT/NAME/FILE     the bundle

ONNX Runtime, ONNX and the check of a required signature refuse weights that are hard links, or symbolic links to
another directory. So the bundle is a directory of regular files, and the blobs are links to them. Only files that
``bundle.json`` lists are downloaded, and those that a required signature lists. A file is compared with its SHA-256
before it gets its name. Optimized copies and engines go to the user's cache.
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any, BinaryIO

from blip2edge.bundle.fields import is_file_name
from blip2edge.bundle.hub.errors import hub_errors, is_answer
from blip2edge.bundle.hub.names import MAIN, HubName, bundle_directory, is_hub_name
from blip2edge.bundle.manifest import MANIFEST, read_manifest
from blip2edge.bundle.schema import DERIVED
from blip2edge.bundle.trust.integrity import sha256_of
from blip2edge.bundle.trust.signature import SIGNATURE, read_signature
from blip2edge.errors import BundleError, BundleIntegrityError, MissingPackageError, option
from blip2edge.packages import require
from blip2edge.progress import ProgressCallback, report_bytes, transfer_progress

CONTINUES = "run the command again: it continues where this download ended"


def find_bundle(name: str | Path, *, public_key: str | Path | None = None) -> Path:
    """Returns the directory of a bundle.

    Args:
        name: A directory; or ``hub:ORG/NAME[@REVISION]``, which is downloaded if it is not in the hub's cache.
        public_key: The public key if the bundle must be signed, else None. Optimized copies and engines of a repository
            are downloaded only if the signature lists them.

    Raises:
        BundleError: The repository cannot be downloaded, or is not a bundle.
        BundleIntegrityError: A downloaded file has another SHA-256 than the manifest or the signature lists.
        BundleSignatureError: The signature is of another key.
        MissingPackageError: The package ``huggingface_hub`` is not installed.
        OutputError: The disk is full.
        UsageError: The name of the repository has a wrong form.
    """
    if not is_hub_name(name):
        return Path(name)
    download = _Download(HubName.parse(os.fspath(name)))
    download.files(engines=public_key is not None)
    if public_key is not None:
        download.signed_files(Path(public_key))
    return download.finish()


def find_manifest(name: str | Path) -> Path:
    """Returns a directory with the ``bundle.json`` of a bundle. For a bundle on the hub, only this file is downloaded.

    Raises:
        BundleError, MissingPackageError, OutputError, UsageError: For the same reasons as in :func:`find_bundle`.
    """
    return _Download(HubName.parse(os.fspath(name))).snapshot if is_hub_name(name) else Path(name)


def hub_client(name: HubName | str) -> Any:
    """Imports ``huggingface_hub`` with the modules that are used here; raises MissingPackageError without it."""
    package = require("huggingface_hub", str(name), MissingPackageError)
    for module in ("constants", "errors", "file_download", "utils"):
        importlib.import_module(f"huggingface_hub.{module}")
    return package


def first_file(hub: Any, repository: str, file: str, revision: str = MAIN) -> Path:
    """Downloads a file of a repository to the hub's cache.

    Without a network, the cached file is returned; if there is none, the call fails at once.

    For a file that is not in its cache, the hub's client repeats a request for 23 seconds if the connection fails or
    the hub answers with a status such as 503. So the request is sent once here; its timeout is ``HF_HUB_ETAG_TIMEOUT``
    seconds (10 by default). With ``HF_HUB_OFFLINE``, nothing is sent.

    Args:
        hub: The package, from :func:`hub_client`.
        repository: ``ORG/NAME``.
        file: Path of the file in the repository.
        revision: Branch, tag or commit.

    Returns:
        Path of the file in the cache.

    Raises:
        Exception: Any exception of the hub's client; call this function inside ``hub_errors``.
    """
    if not isinstance(hub.try_to_load_from_cache(repository, file, revision=revision), str):
        try:
            url = hub.hf_hub_url(repository, file, revision=revision)
            hub.get_hf_file_metadata(url, timeout=hub.constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:
            if not is_answer(error):
                raise
    return Path(hub.hf_hub_download(repository, file, revision=revision))  # its error of an answer is more exact


class _Download:
    """Downloads one revision of a repository.

    Attributes:
        snapshot: The revision's directory in the hub's cache.
        directory: The directory of the bundle.
    """

    def __init__(self, name: HubName) -> None:
        self._hub, self._name = hub_client(name), name
        with self._errors("check the network, and HF_ENDPOINT if it is set"):
            try:
                found = first_file(self._hub, name.repository, MANIFEST, name.revision)
            except self._hub.errors.RemoteEntryNotFoundError as error:
                raise self._no_bundle() from error
        self.snapshot = found.parent
        self._storage = self.snapshot.parents[1]
        self.directory = bundle_directory(self._storage, self.snapshot.name, name)

    def files(self, *, engines: bool) -> None:
        """Downloads the files that the manifest lists.

        Raises BundleError if the bundle contains only engines and ``engines`` is false.
        """
        manifest = read_manifest(self.snapshot)
        if manifest.engines_of and not engines:
            raise BundleError(
                f"{self._name} contains engines, which are programs: they are used only with a checked signature",
                f"give the public key of its author ({option('require_signature')})",
            )
        for file in manifest.files:
            if not is_file_name(file):
                raise BundleIntegrityError(
                    f"{MANIFEST} of {self._name} lists {file!r}, which is not the name of a file",
                    "use another repository",
                )
        wanted = {file: record for file, record in manifest.files.items() if not (self.directory / file).is_file()}
        if not wanted:
            return
        with transfer_progress() as report:
            counted = _Counted(report, f"downloading {self._name}", sum(record.size for record in wanted.values()))
            for file, record in wanted.items():
                self._get(file, record.sha256, MANIFEST, counted)
                counted.complete(record.size)

    def signed_files(self, public_key: Path) -> None:
        """Downloads and checks the signature, then the optimized copies and engines that it lists."""
        with self._errors():
            try:
                found = first_file(self._hub, self._name.repository, SIGNATURE, self.snapshot.name)
            except self._hub.errors.EntryNotFoundError:  # the error of a missing signature comes later
                return
        signature = read_signature(found, public_key)
        for file, sha256 in signature.files.items():
            kind, *names = file.split("/")
            if kind in DERIVED and len(names) == 2 and all(map(is_file_name, names)):
                self._get(file, sha256, SIGNATURE)
        with self._errors():
            _copy(found, self.directory / SIGNATURE)

    def finish(self) -> Path:
        """Copies the manifest into the directory, which is then a complete bundle; returns the directory."""
        with self._errors():
            _copy(self.snapshot / MANIFEST, self.directory / MANIFEST)
        return self.directory

    def _errors(self, advice: str = CONTINUES) -> Any:
        place = Path(self._hub.constants.HF_HUB_CACHE)
        return hub_errors(f"{self._name} could not be downloaded", self._name, BundleError, place, advice)

    def _no_bundle(self) -> BundleError:
        """Makes the error for a repository without ``bundle.json``."""
        name = self._name
        if self._hub.HfApi().file_exists(name.repository, "config.json", revision=name.revision):
            return BundleError(
                f"{name} is a checkpoint, not a bundle: it has config.json and no {MANIFEST}",
                f"export it: blip2edge export {name.repository} -o BUNDLE",
            )
        return BundleError(f"{name} is not a bundle: it has no {MANIFEST}", "check the name of the repository")

    def _get(self, file: str, sha256: str, listing: str, counted: _Counted | None = None) -> None:
        """Puts one file into the bundle's directory: from the hub's cache, or downloaded.

        Args:
            file: Path of the file in the repository.
            sha256: The expected SHA-256 of the file.
            listing: Name of the file that lists this hash, for errors.
            counted: Counter of the bytes of a whole download; None for no report.
        """
        target = self.directory / file
        if target.is_file():
            return
        with self._errors():
            hub, commit = self._hub, self.snapshot.name
            pointer = self.snapshot / file
            if pointer.is_file() and sha256_of(pointer) == sha256:
                _take(pointer.resolve(), target)
                return
            url = hub.hf_hub_url(self._name.repository, file, revision=commit)
            try:
                metadata = hub.get_hf_file_metadata(url)
            except hub.errors.RemoteEntryNotFoundError as error:
                raise BundleError(
                    f"{self._name} is incomplete: its {listing} lists {file}, which is not in the repository",
                    "report it to the owner of the repository, or name another revision: hub:ORG/NAME@REVISION",
                ) from error
            lock = self._storage.parent / ".locks" / self._storage.name / f"{metadata.etag}.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            with hub.utils.WeakFileLock(lock):  # the client's own lock: one process downloads a file
                if not target.is_file():
                    blob = self._storage / "blobs" / metadata.etag
                    if not blob.is_file() or sha256_of(blob) != sha256:
                        self._fetch(url, metadata.size, blob, sha256, f"{file} of {self._name}", listing, counted)
                    _take(blob, target)
            hub.hf_hub_download(self._name.repository, file, revision=commit)  # makes the link in the snapshot

    def _fetch(
        self, url: str, size: int | None, blob: Path, sha256: str, file: str, listing: str, counted: _Counted | None
    ) -> None:
        """Downloads one file to ``blob``; ``size`` is its size in bytes, None if it is not known."""
        part = blob.with_name(f"{blob.name}.blip2edge.incomplete")
        self._continue(url, part, size, counted)
        if sha256_of(part) != sha256:
            part.unlink()
            raise BundleIntegrityError(
                f"{file} does not match its {listing}: expected the SHA-256 {sha256}, got another one; the file was "
                "not kept",
                "run the command again; if it fails again, the repository is damaged: report it to its owner",
            )
        part.replace(blob)

    def _continue(self, url: str, part: Path, size: int | None, counted: _Counted | None) -> None:
        """Downloads the rest of a partial file; ``size`` is the size of the whole file in bytes, None if not known."""
        if part.is_file() and (size is None or part.stat().st_size > size):
            part.unlink()
        headers = {**self._hub.utils.build_hf_headers(), "Accept-Encoding": "identity"}
        with part.open("ab") as file:
            target = file if counted is None else counted.around(file)
            self._hub.file_download.http_get(url, target, resume_size=file.tell(), headers=headers, expected_size=size)


class _Counted:
    """Counts the bytes of a download of several files, and reports them."""

    def __init__(self, report: ProgressCallback, what: str, total: int) -> None:
        self._report, self._what, self._total = report, what, total
        self._done = 0  # bytes of complete files

    def complete(self, size: int) -> None:
        """Counts a whole file of ``size`` bytes, also if it was not downloaded because it is in the cache."""
        self._done += size
        self.show(0)

    def show(self, size: int) -> None:
        """Reports the complete files and ``size`` bytes of the file that is downloaded now."""
        report_bytes(self._report, self._what, self._done + size, self._total)

    def around(self, file: BinaryIO) -> Any:
        """Returns a file that writes to ``file`` and reports each write."""
        self.show(file.tell())
        return _CountedFile(file, self)


class _CountedFile:
    """A file that the hub's client writes; the client calls only ``tell``, ``seek``, ``truncate`` and ``write``."""

    def __init__(self, file: BinaryIO, counted: _Counted) -> None:
        self._file, self._counted = file, counted
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, data: bytes) -> int:
        """Write data, and report the size of the file."""
        written = self._file.write(data)
        self._counted.show(self._file.tell())
        return written


def _take(blob: Path, target: Path) -> None:
    """Moves a file of ``blobs`` to the bundle, and puts a link in its place.

    If the file was moved to another bundle before, it is copied instead.
    """
    if blob.is_symlink() or blob.parent.name != "blobs":
        _copy(blob, target)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    blob.replace(target)
    try:
        blob.symlink_to(os.path.relpath(target, blob.parent))
    except OSError:  # a file system without links
        _copy(target, blob)


def _copy(source: Path, target: Path) -> None:
    """Copies a file; the target gets its name only when the copy is complete."""
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.copyfile(source, part)
    part.replace(target)
