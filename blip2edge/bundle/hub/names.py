"""Names of bundles on the Hugging Face hub: ``hub:ORG/NAME`` or ``hub:ORG/NAME@REVISION``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from blip2edge.errors import UsageError

PREFIX = "hub:"
MAIN = "main"
FORM = f"{PREFIX}ORG/NAME or {PREFIX}ORG/NAME@REVISION"
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_REVISION = re.compile(r"[\w.][\w./+-]*", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+_-]*")


@dataclass(frozen=True)
class HubName:
    """A repository on the hub, and a revision of it.

    Attributes:
        repository: ``ORG/NAME``.
        revision: A branch, a tag or a commit.

    Raises:
        UsageError: The name is not ``ORG/NAME``, or the revision has characters that the hub does not allow.
    """

    repository: str
    revision: str = MAIN

    def __post_init__(self) -> None:
        """Check the name of the repository and the revision."""
        if not is_repository(self.repository):
            raise UsageError(
                f"expected the name of a repository on the hub as ORG/NAME, got {self.repository}", "check the name"
            )
        if not _REVISION.fullmatch(self.revision):
            raise UsageError(
                f"{self.revision!r} is not the name of a branch, a tag or a commit on the hub",
                "a revision has letters, digits and . - _ / + only",
            )

    def __str__(self) -> str:
        return f"{PREFIX}{self.repository}" + (f"@{self.revision}" if self.revision != MAIN else "")

    @classmethod
    def parse(cls, text: str) -> HubName:
        """Reads a name in the form ``[hub:]ORG/NAME[@REVISION]``.

        Raises:
            UsageError: The text does not have this form.
        """
        repository, mark, revision = text.removeprefix(PREFIX).partition("@")
        if not is_repository(repository) or (mark and not revision):
            raise UsageError(f"expected the name of a repository on the hub as {FORM}, got {text}", "check the name")
        return cls(repository, revision or MAIN)


def check_license(license_id: str | None) -> None:
    """Raises UsageError unless a text has the form of a license id on the hub; None and an empty text pass."""
    if license_id and not _LICENSE.fullmatch(license_id):
        raise UsageError(
            f"{license_id!r} is not the id of a license on the hub",
            "give an id in lower-case letters, such as mit, apache-2.0 or cc-by-nc-4.0",
        )


def is_repository(name: str) -> bool:
    """Whether a name has the form ``ORG/NAME`` of a repository on the hub."""
    return _REPOSITORY.fullmatch(name) is not None


def is_hub_name(name: str | Path) -> bool:
    """Returns whether the name of a bundle is the name of a repository on the hub; False for a directory."""
    return os.fspath(name).startswith(PREFIX)


def bundle_name(bundle: Path) -> str:
    """Returns the name of a bundle: the name of its directory, or of its repository on the hub."""
    if is_hub_name(bundle):
        return HubName.parse(os.fspath(bundle)).repository.partition("/")[2]
    return bundle.name if bundle.name not in ("", "..") else bundle.resolve().name


def bundle_directory(storage: Path, commit: str, name: HubName) -> Path:
    """Returns the directory of a downloaded bundle in the hub's cache.

    Args:
        storage: The directory of the repository in the hub's cache, ``models--ORG--NAME``.
        commit: The commit of the revision.
        name: The name of the bundle.
    """
    return storage / "bundles" / commit / bundle_name(Path(str(name)))


def is_downloaded(directory: Path) -> bool:
    """Whether a directory is a downloaded bundle, in the hub's cache."""
    parents = directory.absolute().parents
    return len(parents) > 2 and parents[1].name == "bundles" and parents[2].name.startswith("models--")


def repository_of(snapshot: Path) -> str:
    """Returns ``ORG/NAME`` for a directory ``models--ORG--NAME/snapshots/COMMIT``; empty for any other directory."""
    parents = snapshot.absolute().parents
    inside = len(parents) > 1 and parents[0].name == "snapshots" and parents[1].name.startswith("models--")
    return "/".join(parents[1].name.split("--")[1:]) if inside else ""
