"""Checks the path of an output: refuses names that no output can have, and resolves ``.`` and ``..``."""

from __future__ import annotations

import os
from pathlib import Path

from blip2edge.bundle.hub.names import is_hub_name
from blip2edge.errors import OutputError


def with_own_name(target: Path) -> Path:
    """Returns a path whose last part is the output's name: ``.`` and a path that ends with ``..`` are resolved."""
    return target.resolve() if target.name in ("", "..") else target


def check_name(target: Path) -> None:
    """Raises OutputError if no file can have this path.

    Such a path contains a NUL, is the name of a bundle on the hub, or leads through a file as if it were a folder.
    """
    if "\0" in str(target):
        raise OutputError(f"{str(target)!r} is not a usable file name: it contains a NUL", "give another name")
    if is_hub_name(target):
        raise OutputError(
            f"expected an output on this machine, got {target}, the name of a bundle on the hub",
            "give a directory or a file, and upload a bundle afterwards: blip2edge push BUNDLE ORG/NAME",
        )
    above = next((folder for folder in target.parents if os.path.lexists(folder)), None)
    if above is not None and not above.is_dir():
        raise OutputError(f"{target} cannot be written, because {above} is not a directory", "give another output")
