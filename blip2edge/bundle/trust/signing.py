"""Signs and verifies whole bundles (``blip2edge sign`` and ``verify``)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.hub.names import is_downloaded
from blip2edge.bundle.manifest import MANIFEST
from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.bundle.schema import DERIVED
from blip2edge.bundle.trust.integrity import STAMPS
from blip2edge.bundle.trust.signature import SIGNATURE, Signature, how_to_sign, model_signing, reading_key
from blip2edge.errors import BundleError, BundleIntegrityError, BundleSignatureError, UsageError, option
from blip2edge.progress import ProgressCallback
from blip2edge.reading import read_json, reading

ENCRYPTED = b"ENCRYPTED"
"""Text in the first or second line of a private key that is protected by a password."""


@dataclass(frozen=True)
class SigningReport:
    """The result of :func:`sign_bundle` and :func:`verify_bundle`.

    Attributes:
        signature: The file of the signature.
        files: SHA-256 of each signed file in hexadecimal, by its path in the bundle.
    """

    signature: Path
    files: Mapping[str, str]


def sign_bundle(
    bundle: str | Path,
    key: str | Path,
    *,
    output: str | Path | None = None,
    ask_password: Callable[[], str] | None = None,
) -> SigningReport:
    """Signs every file of a bundle, with the optimized copies and engines that are in it.

    Args:
        bundle: The directory of the bundle.
        key: A private key in PEM format, of the elliptic curve P-256, P-384 or P-521.
        output: The signature; None for ``model.sig`` in the bundle, which must not be in the hub's cache. An older
            signature is replaced.
        ask_password: Returns the password of a protected key; None if the key needs none.

    Raises:
        BundleError: The directory is not a bundle.
        BundleIntegrityError: A file is missing or was changed; nothing is signed.
        MissingPackageError: The package ``model-signing`` is not installed.
        OutputError: The signature cannot be written.
        UsageError: The key cannot be read, or the bundle is in the hub's cache and there is no ``output``.
    """
    opened, private = Bundle.open(bundle), Path(key)
    if output is None and is_downloaded(opened.path):
        raise UsageError(
            f"{opened.path} is in the hub's cache, where nothing is written",
            f"give {option('output')}, or sign your own copy of the bundle and upload it with `blip2edge push`",
        )
    target = opened.path / SIGNATURE if output is None else Path(output)
    check_file(target, "output")
    package = model_signing()
    hashing = _CheckedHashing(opened, package.hashing.Config().set_ignored_paths(paths=_left_out(opened.path, target)))
    signer = package.signing.Config().set_hashing_config(hashing)
    with reading_key(private, "private key"):
        protected = ask_password is not None and ENCRYPTED in private.read_bytes()
        password = ask_password().encode() if protected and ask_password is not None else None
        signer.use_elliptic_key_signer(private_key=private, password=password)
    with tempfile.TemporaryDirectory() as folder:
        signer.sign(opened.path, written := Path(folder, target.name))
        write_output(target, written.read_bytes(), "output")
    return SigningReport(target, hashing.files)


def verify_bundle(
    bundle: str | Path,
    key: str | Path,
    *,
    signature: str | Path | None = None,
    progress: ProgressCallback | None = None,
) -> SigningReport:
    """Checks that a signature lists exactly the files of a bundle, and that each has the signed hash.

    Args:
        bundle: The directory of the bundle.
        key: The signer's public key in PEM format.
        signature: The signature; None for ``model.sig`` in the bundle or ``BUNDLE.sig`` beside it.
        progress: Called with a file's name, the number of files done and the number of all files.

    Raises:
        BundleError: The directory is not a bundle.
        BundleIntegrityError: A file is missing or was changed.
        BundleSignatureError: The signature is missing or of another key, or the bundle has files that are not signed.
        MissingPackageError: The package ``model-signing`` is not installed.
        UsageError: The key cannot be read.
    """
    opened = Bundle.open(bundle, require_signature=key, signature=signature)
    signed = opened.signature
    if signed is None:  # never: it was required
        raise BundleSignatureError(f"{bundle} has no signature", how_to_sign(opened.path))
    if opened.unsigned:
        raise BundleSignatureError(
            f"{signed.path} does not list {', '.join(opened.unsigned)} of {opened.path}",
            "remove the files that are not yours, or sign the bundle again",
        )
    files = {name: sha256 for name, sha256 in signed.files.items() if Path(name).name != STAMPS}
    for done, (name, sha256) in enumerate(files.items()):
        if progress is not None:
            progress(name, done, len(files))
        _check_signed(opened, signed, name, sha256)
    if progress is not None:
        progress("verified", len(files), len(files))
    opened.checked.check_unchanged()
    return SigningReport(signed.path, files)


def _check_signed(bundle: Bundle, signature: Signature, name: str, sha256: str) -> None:
    """Raises an error if a file does not have the signed hash; files that were hashed before are not read again."""
    path = bundle.path / name
    try:
        found = bundle.checked.sha256(path) or bundle.checked.hash(path)[0]
    except OSError as error:
        raise BundleIntegrityError(
            f"{path} is missing, though {signature.path} lists it", "copy the bundle again"
        ) from error
    if found != sha256:
        signature.require({name: found})


class _CheckedHashing:
    """Hashes a bundle as model_signing does, and refuses files that differ from the bundle's own records.

    Attributes:
        files: SHA-256 of each file in hexadecimal, by its path in the bundle.
    """

    def __init__(self, bundle: Bundle, hashing: Any) -> None:
        self._bundle = bundle
        self._hashing = hashing
        self.files: dict[str, str] = {}

    def hash(self, path: Path) -> Any:
        """Hashes the files and compares the hashes with the bundle's records; model_signing calls this method.

        Returns the manifest that model_signing makes of the files.
        """
        try:
            manifest = self._hashing.hash(path)
        except ValueError as error:  # a symbolic link, or something that is no file
            raise BundleIntegrityError(
                str(error), "copy the bundle with its files in place of links (cp -rL)"
            ) from error
        self.files = {str(one.identifier): one.digest.digest_hex for one in manifest.resource_descriptors()}
        records = {MANIFEST: self._bundle.checked.sha256(path / MANIFEST), **self._bundle.manifest_hashes()}
        for folder in DERIVED:
            for record in sorted((path / folder).glob(f"*/{DERIVED[folder]}")):
                inside = record.parent.relative_to(path).as_posix()
                records |= {f"{inside}/{name}": sha256 for name, sha256 in _listed_hashes(record).items()}
        for name, sha256 in records.items():
            if self.files.get(name) != sha256:
                raise BundleIntegrityError(
                    f"{path / name} does not have its recorded SHA-256, so the bundle is not signed",
                    f"see blip2edge inspect {path} --verify",
                )
        return manifest


def _listed_hashes(record: Path) -> dict[str, str]:
    """Returns the SHA-256 of each file that a record lists; empty if the record cannot be read."""
    try:
        values = read_json(record, BundleError)
        with reading(record, "a record", BundleError):
            if record.name == DERIVED["engines"]:
                return {str(one["file"]): str(one["sha256"]) for one in values["engines"].values()}
            return {str(name): str(one["sha256"]) for name, one in values["files"].items()}
    except BundleError:
        return {}


def _left_out(bundle: Path, target: Path) -> list[Path]:
    """Returns the paths in a bundle that are not signed: the signature, and the stamps of checked files."""
    stamps = [folder / STAMPS for folder in (Path(), *(path.relative_to(bundle) for path in _derived_folders(bundle)))]
    signature = [target.resolve().relative_to(bundle.resolve())] if _is_inside(target, bundle) else []
    return list(dict.fromkeys([Path(SIGNATURE), *signature, *stamps]))


def _derived_folders(bundle: Path) -> list[Path]:
    return sorted(path for kind in DERIVED for path in (bundle / kind).glob("*") if path.is_dir())


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
