"""Uploads a bundle to the Hugging Face hub (``blip2edge push``)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.hub.card import base_model, is_edited, model_card
from blip2edge.bundle.hub.download import hub_client
from blip2edge.bundle.hub.errors import LOG_IN, hub_errors
from blip2edge.bundle.hub.names import MAIN, PREFIX, HubName, check_license
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.schema import DERIVED
from blip2edge.bundle.trust.integrity import STAMPS
from blip2edge.bundle.trust.signature import SIGNATURE
from blip2edge.errors import BundleSignatureError, OutputError, UsageError, option
from blip2edge.progress import ProgressCallback, report_bytes, transfer_progress
from blip2edge.reading import read_json

CARD = "README.md"
ALONE = 1_000_000
"""Files of at least this size, in bytes, are uploaded one by one before the commit; smaller files with the commit."""


@dataclass(frozen=True)
class PushReport:
    """The result of :func:`push_bundle`.

    Attributes:
        name: The bundle's name on the hub.
        url: The address of the commit.
        files: Size in bytes of each file of the bundle, by its path in the repository.
        removed: Files that were removed from the repository, because they belonged to its previous bundle.
        card_kept: Whether the repository keeps its old model card, because somebody edited this card.
    """

    name: HubName
    url: str
    files: dict[str, int]
    removed: tuple[str, ...]
    card_kept: bool


def push_bundle(
    bundle: str | Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    derived: bool = False,
    license_id: str | None = None,
    progress: ProgressCallback | None = None,
) -> PushReport:
    """Uploads the files of a bundle and a model card in one commit; the repository is made if it does not exist.

    Files that have not changed are not uploaded again. Files of the repository's previous bundle are removed.

    Args:
        bundle: The directory of the bundle.
        repository: ``ORG/NAME``.
        private: Whether a new repository is private.
        revision: A branch, which is made if it does not exist; None for ``main``.
        message: The commit's message; None for a message that names the bundle.
        derived: Whether optimized copies and engines in the bundle are uploaded as well.
        license_id: The hub's identifier of the license; None for the license that the hub shows for the checkpoint,
            if the checkpoint is on the hub.
        progress: Called with a file's name, the number of files hashed and the number of all files.

    Raises:
        BundleError: The directory is not a bundle.
        BundleIntegrityError: A file is missing or was changed; nothing is uploaded.
        BundleSignatureError: The signature lists derived files, which are not uploaded without ``derived``.
        MissingPackageError: The package ``huggingface_hub`` is not installed.
        OutputError: The hub cannot be reached or does not accept the upload.
        UsageError: ``repository``, ``revision`` or ``license_id`` has a wrong form.
    """
    name = push_name(repository, revision, license_id)
    hub = hub_client(name)
    opened = Bundle.open(bundle)
    files = _files(opened, derived)
    if hub.get_token() is None:  # known at once; to hash a large bundle takes a minute
        raise OutputError(f"{opened.path} could not be pushed to {name}: no account is logged in", LOG_IN)
    opened.verify(progress)
    with hub_errors(f"{opened.path} could not be pushed to {name}", name, OutputError):
        api = hub.HfApi()
        api.create_repo(name.repository, private=private or None, exist_ok=True)
        if name.revision != MAIN:
            api.create_branch(name.repository, branch=name.revision, exist_ok=True)
        found = set(api.list_repo_files(name.repository, revision=name.revision))
        if "config.json" in found and MANIFEST not in found:
            raise OutputError(f"{name} contains a checkpoint; a bundle cannot be added", "give another repository")
        kept = CARD in found and is_edited(_remote_text(hub, name, CARD))
        removed = tuple(sorted(found & _listed(hub, name, found) - files.keys()))
        operations = [hub.CommitOperationAdd(file, str(path)) for file, path in files.items()]
        operations += [hub.CommitOperationDelete(file) for file in removed]
        if not kept:
            license_id = _license(api, base_model(opened.manifest)) if license_id is None else license_id
            card = model_card(opened.manifest, name.repository, name.revision, license_id)
            operations.append(hub.CommitOperationAdd(CARD, card.encode()))
        _upload(api, name, [one for one in operations if isinstance(one, hub.CommitOperationAdd)])
        commit = api.create_commit(
            name.repository,
            operations,
            commit_message=message or f"{opened.manifest.family} in {opened.manifest.precision}, by blip2edge push",
            revision=name.revision,
        )
    sizes = {file: path.stat().st_size for file, path in files.items()}
    return PushReport(name, str(commit.commit_url), sizes, removed, kept)


def push_name(repository: str, revision: str | None = None, license_id: str | None = None) -> HubName:
    """Returns the name that a bundle is pushed to.

    Args:
        repository: ``ORG/NAME``.
        revision: A branch; None for ``main``.
        license_id: The hub's identifier of the license, which is checked; None if it is not given.

    Raises:
        UsageError: An argument has a wrong form. Or ``repository`` is ``ORG/NAME@REVISION``, with an empty REVISION or
            one that differs from ``revision``.
    """
    check_license(license_id)
    repository, mark, inside = repository.removeprefix(PREFIX).partition("@")
    if mark and (not inside or revision not in (None, inside)):
        raise UsageError(
            f"expected one revision, got {inside or 'none'} after the @ of {repository}, and {revision or 'none'} as "
            f"{option('revision')}",
            f"give {option('revision')}, or a branch after the @, but not both",
        )
    return HubName(repository, revision or inside or MAIN)


def _upload(api: Any, name: HubName, additions: list[Any]) -> None:
    """Uploads the large files of a commit one after the other, and reports the bytes that are done.

    A file that the hub already has is not sent. The commit itself uploads all other files.
    """
    total = sum(one.upload_info.size for one in additions)
    done = 0
    with transfer_progress() as report:
        report_bytes(report, f"uploading to {name}", 0, total)
        for one in (one for one in additions if one.upload_info.size >= ALONE):
            api.preupload_lfs_files(name.repository, [one], revision=name.revision)
            done += one.upload_info.size
            report_bytes(report, f"uploading to {name}", done, total)
        report_bytes(report, f"uploading to {name}", total, total)


def _files(bundle: Bundle, derived: bool) -> dict[str, Path]:
    """Returns the files to upload, by their path in the repository.

    Raises:
        BundleSignatureError: The signature lists optimized copies or engines that are not uploaded.
    """
    names = [MANIFEST, *bundle.manifest.files]
    if derived or bundle.manifest.engines_of:
        names += list(_derived_files(bundle.path))
    signature = bundle.path / SIGNATURE
    if signature.is_file():
        names.append(SIGNATURE)
        missing = [name for name in _derived_files(bundle.path) if name not in names and name in _signed(signature)]
        if missing:
            raise BundleSignatureError(
                f"{signature} lists {missing[0]}, which is not uploaded, so `blip2edge verify` would fail",
                f"upload the derived files too ({option('derived', on=True)}), or remove them and sign again",
            )
    return {name: bundle.path / name for name in names}


def _derived_files(directory: Path) -> Iterator[str]:
    """Yields the paths of the files of optimized copies and engines in a bundle."""
    for kind in DERIVED:
        for path in sorted((directory / kind).glob("[!.]*/*")):
            if path.is_file() and path.name != STAMPS and not path.name.startswith("."):
                yield path.relative_to(directory).as_posix()


def _signed(signature: Path) -> set[str]:
    """Returns the paths that a signature lists, without a check of the signature; empty if it cannot be read."""
    import base64

    try:
        envelope = json.loads(signature.read_bytes())["dsseEnvelope"]
        statement = json.loads(base64.b64decode(envelope["payload"]))
        return {resource["name"] for resource in statement["predicate"]["resources"]}
    except (ValueError, KeyError, TypeError):
        return set()


def _remote_text(hub: Any, name: HubName, file: str) -> str:
    path = Path(hub.hf_hub_download(name.repository, file, revision=name.revision))
    return path.read_text(encoding="utf-8", errors="replace")


def _listed(hub: Any, name: HubName, found: set[str]) -> set[str]:
    """Returns the files of the bundle that is in the repository: listed files, optimized copies, engines, signature."""
    if MANIFEST not in found:
        return set()
    path = Path(hub.hf_hub_download(name.repository, MANIFEST, revision=name.revision))
    files = read_json(path, OutputError).get("files", {})
    derived = {file for file in found if file.count("/") == 2 and file.partition("/")[0] in DERIVED}
    return {*files, *derived, SIGNATURE}


def _license(api: Any, checkpoint: str) -> str:
    """Returns the license in the model card of a checkpoint on the hub; empty if it is not known."""
    if not checkpoint:
        return ""
    try:
        data = api.model_info(checkpoint).card_data
    except OSError:  # the hub does not know the checkpoint, or it is private
        return ""
    found = None if data is None else data.get("license")
    return found if isinstance(found, str) else ""
