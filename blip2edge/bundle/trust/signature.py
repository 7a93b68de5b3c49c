"""Reads signatures of bundles, in the model-signing format of the OpenSSF, and checks them with a public key.

A signature is one file beside the signed files. It holds the name and the SHA-256 of every file (an in-toto statement
in a DSSE envelope), signed with an elliptic-curve key (https://github.com/sigstore/model-transparency). The package
model-signing makes and checks signatures, and its own command reads them. Keys are files: nothing is sent anywhere.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from blip2edge.bundle.hub.names import is_downloaded
from blip2edge.bundle.schema import DERIVED
from blip2edge.bundle.trust.integrity import STAMPS
from blip2edge.errors import Blip2EdgeError, BundleSignatureError, MissingPackageError, UsageError, one_line
from blip2edge.packages import require
from blip2edge.reading import read_json

SIGNATURE = "model.sig"
"""Name of the signature in a bundle: the default of the command ``model_signing``."""

_AGAIN = "get the bundle and its signature again from their author, or sign the bundle again"
_FAULTS = (KeyError, TypeError, AttributeError, IndexError)  # of a parser that does not check the form

CURVES = "elliptic curve P-256, P-384 or P-521"
MAKE_KEYS = (
    "make a pair of keys: openssl ecparam -name prime256v1 -genkey -noout -out KEY && "
    "openssl ec -in KEY -pubout -out PUBLIC_KEY"
)


def how_to_sign(bundle: Path) -> str:
    """Returns the advice for a bundle without a signature: the user signs it, or for a bundle of the hub its author."""
    if is_downloaded(bundle):
        return "its author signs it with `blip2edge sign`, and pushes it again"
    return f"sign it: blip2edge sign {bundle} --key KEY"


@dataclass(frozen=True)
class Signature:
    """The files that a signature lists. The signature was already checked with the public key.

    Attributes:
        path: The file of the signature.
        files: SHA-256 of each signed file in hexadecimal, by its path in the bundle.
        ignored: Paths that the signature leaves out: itself, and the stamps of checked files.
    """

    path: Path
    files: Mapping[str, str]
    ignored: frozenset[str] = field(default_factory=frozenset)

    def require(self, files: Mapping[str, str]) -> None:
        """Checks that files are signed with these hashes.

        Args:
            files: SHA-256 in hexadecimal by the path in the bundle.

        Raises:
            BundleSignatureError: A file is not signed, or is signed with another hash.
        """
        for name, sha256 in files.items():
            signed = self.files.get(name)
            if signed != sha256:
                difference = "does not list it" if signed is None else f"lists the SHA-256 {signed}, got {sha256}"
                raise BundleSignatureError(
                    f"{name} is not the file that was signed: {self.path} {difference}",
                    "copy the bundle again, or sign it again if the change is yours",
                )


class _Listed:
    """Replaces the hashing of model_signing in a verification: records the signed hashes, and hashes no file.

    The package checks the signature first, then asks for the hashes of the files, and compares both lists.
    """

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self.ignored: frozenset[str] = frozenset()

    def add_ignored_paths(self, *, model_path: object, paths: Any) -> None:  # noqa: ARG002 - as the package calls it
        """Records the paths that the signature leaves out; model_signing calls this method."""
        self.ignored = frozenset(str(path) for path in paths)

    def hash(self, model_path: object, *, files_to_hash: object = None) -> _Listed:  # noqa: ARG002 - as above
        """Returns this object, without hashing files; model_signing calls this method for the hashes of the files."""
        return self

    def __eq__(self, signed: object) -> bool:
        """Records the signed hashes and returns True; model_signing calls this method to compare the hashes."""
        manifest: Any = signed
        for one in manifest.resource_descriptors():
            if one.digest.algorithm != "sha256" or manifest.serialization_type["method"] != "files":
                raise ValueError(f"expected the SHA-256 of whole files, got {one.digest.algorithm} of {one.identifier}")
            self.files[str(one.identifier)] = one.digest.digest_hex
        return True

    __hash__ = None  # type: ignore[assignment]


def find_signature(bundle: Path) -> Path:
    """Returns the signature of a bundle: ``model.sig`` in it, or else the file ``BUNDLE.sig`` beside it.

    Raises:
        BundleSignatureError: Neither of the two files exists.
    """
    places = (bundle / SIGNATURE, Path(f"{os.path.abspath(bundle)}.sig"))
    for place in places:
        if place.is_file():
            return place
    raise BundleSignatureError(
        f"{bundle} has no signature: neither {places[0]} nor {places[1]} is a file", how_to_sign(bundle)
    )


def read_signature(path: Path, public_key: Path) -> Signature:
    """Reads a signature and checks it with a public key; the signed files are not read.

    Args:
        path: The signature.
        public_key: A public key in PEM format, or a PEM file with the certificates of the authority that issued the
            signer's certificate.

    Raises:
        BundleSignatureError: The signature is of another key, or is damaged.
        MissingPackageError: The package ``model-signing`` is not installed.
        UsageError: ``public_key`` cannot be read, or is neither a public key nor a certificate.
    """
    package = model_signing()
    _check_form(path)
    listed = _Listed()
    verifier = package.verifying.Config().set_hashing_config(listed)
    with reading_key(public_key, "public key"):
        if b"BEGIN CERTIFICATE" in public_key.read_bytes():
            verifier.use_certificate_verifier(certificate_chain=[public_key])
        else:
            verifier.use_elliptic_key_verifier(public_key=public_key)
    try:
        with redirect_stdout(sys.stderr):  # the package prints warnings to standard output
            verifier.verify(path.parent, path)
    except Exception as error:  # the exceptions of the package share no base class but Exception
        if isinstance(error, _FAULTS) or type(error).__name__ == "ValidationError":  # the latter is pydantic's
            raise _damaged(path, f"a part of it is missing or has another form: {_reason(error)}") from error
        raise BundleSignatureError(
            f"{path} is not a signature of the key {public_key} ({_reason(error)})",
            "check the key, or get the bundle and its signature again from their author",
        ) from error
    return Signature(path, listed.files, listed.ignored)


def _check_form(path: Path) -> None:
    """Raises BundleSignatureError if a file is not a complete signature; the key is not checked here."""

    def explain(error: Exception) -> BundleSignatureError | None:
        return None if isinstance(error, OSError) else _damaged(path, f"it is not JSON ({one_line(error)})")

    values = read_json(path, BundleSignatureError, _AGAIN, explain=explain)
    missing = [name for name in ("verificationMaterial", "dsseEnvelope") if not isinstance(values.get(name), dict)]
    if missing:
        raise _damaged(path, f"it has no {' and no '.join(missing)}")


def _damaged(path: Path, how: str) -> BundleSignatureError:
    return BundleSignatureError(f"{path} is damaged, or is not a signature: {how}", _AGAIN)


def _reason(error: Exception) -> str:
    """Returns the reason for an exception in one line, in words rather than Python's terms."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, AttributeError) and error.name == "curve":
        kind = re.sub(r"(Public|Private)Key$", "", type(error.obj).__name__)
        return f"it is a key of another kind, {kind}"
    if isinstance(error, KeyError):
        return f"no {error.args[0]}"
    if type(error).__name__ == "InvalidSignature":
        return "another key made it, or it was changed"
    return one_line(error)


def unsigned_paths(bundle: Path, signature: Signature) -> list[str]:
    """Returns the files of a bundle that its signature neither lists nor leaves out, as paths in the bundle.

    A folder of an optimized copy or of engines without any signed file is listed as one path.
    """
    left_out = {SIGNATURE, *signature.ignored}
    found: list[str] = []
    for folder, folders, names in os.walk(bundle):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in sorted([*names, *links]):
            path = Path(folder, name).relative_to(bundle)
            known = path.as_posix() in signature.files or name == STAMPS
            if not known and not left_out & {one.as_posix() for one in (path, *path.parents)}:
                found.append(path.as_posix())
    signed = {folder.as_posix() for name in signature.files for folder in PurePosixPath(name).parents}
    shown = (str(next((one for one in _derived_parts(name) if one not in signed), name)) for name in found)
    return list(dict.fromkeys(shown))


def _derived_parts(name: str) -> Iterator[str]:
    """Yields the folder of an optimized copy or of engines: ``optimized/cpu`` for ``optimized/cpu/decoder.onnx``."""
    parts = PurePosixPath(name).parts
    if len(parts) > 2 and parts[0] in DERIVED:
        yield "/".join(parts[:2])


def model_signing() -> Any:
    """Imports the package ``model_signing``; raises MissingPackageError without it."""
    return require("model_signing", "a signature", MissingPackageError)


def _key_fix(path: Path, kind: str) -> str:
    """Returns the advice for a key that cannot be read."""
    try:
        content = path.read_bytes()
    except OSError:
        return MAKE_KEYS
    other = "public key" if kind == "private key" else "private key"
    if f"{other.upper()}-----".encode() in content:
        return f"{path} contains a {other}; give the {kind} of the pair"
    if b"ENCRYPTED" in content:
        return "give the key's password: at the prompt, or in BLIP2EDGE_KEY_PASSWORD"
    return MAKE_KEYS


@contextmanager
def reading_key(path: Path, kind: str) -> Iterator[None]:
    """Turns every exception of reading a key into UsageError (exit status 1); errors of this project pass unchanged.

    Args:
        path: The file of the key.
        kind: What the file should contain, such as ``public key``.
    """
    try:
        yield
    except Blip2EdgeError:
        raise
    except Exception as error:  # the exceptions of the package share no base class but Exception
        unusable = UsageError(
            f"expected a {kind} in PEM format ({CURVES}), but {path} cannot be read as one ({_reason(error)})",
            _key_fix(path, kind),
        )
        unusable.exit_status = 1  # as for every input that is missing or broken
        raise unusable from error
