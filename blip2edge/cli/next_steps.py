"""The commands that usually follow a command, printed at its end."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from blip2edge.bundle.schema import DECODER

if TYPE_CHECKING:
    from pathlib import Path

    from blip2edge.bundle.manifest import Manifest


def print_next(*commands: str) -> None:
    """Prints each command as a line ``next: …`` on standard output, where the tables are printed, too."""
    for command in commands:
        print(f"next: {command}")


def quoted(path: Path) -> str:
    """A path as one word of a shell's command line."""
    return shlex.quote(str(path))


def try_bundle(path: Path, manifest: Manifest, backend: str = "") -> str:
    """The command that uses a bundle on a picture: ``caption``, ``ask`` or ``match``, by the kind of its model.

    Args:
        path: The bundle's directory.
        manifest: Its manifest.
        backend: Value of ``--backend``; empty to leave the flag out.
    """
    if DECODER not in manifest.graphs:
        words = 'match IMAGE --text "TEXT"'
    elif manifest.prompt is not None and manifest.prompt.required:
        words = 'ask IMAGE "QUESTION"'
    else:
        words = "caption IMAGE"
    if not backend and manifest.precision == "bf16":
        backend = "openvino"  # the default backend has no bf16
    return f"blip2edge {words} -b {quoted(path)}" + (f" --backend {backend}" if backend else "")
