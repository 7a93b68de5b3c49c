"""The commands that usually follow a command, printed at its end."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.bundle.hub.names import bundle_name, is_hub_name
from blip2edge.bundle.schema import DECODER

if TYPE_CHECKING:
    from blip2edge.bundle.manifest import Manifest


def print_next(*commands: str) -> None:
    """Prints each command as a line ``next: …`` on standard output, like the tables."""
    for command in commands:
        print(f"next: {command}")


def quoted(path: Path) -> str:
    """Quotes a path for the shell, so that spaces do not split it."""
    return shlex.quote(str(path))


def try_command(path: Path, manifest: Manifest, backend: str = "") -> str:
    """Returns the command that uses a bundle on a picture: ``caption``, ``ask`` or ``match``, by the kind of its model.

    Args:
        path: The bundle's directory.
        manifest: Manifest of the bundle.
        backend: Value of ``--backend`` in the command. Empty: the default backend if it can run the bundle's
            precision, else the first backend that can.
    """
    from blip2edge.runtime.backends.base import BACKENDS

    if DECODER not in manifest.graphs:
        words = 'match IMAGE --text "TEXT"'
    elif manifest.prompt is not None and manifest.prompt.required:
        words = 'ask IMAGE "QUESTION"'
    else:
        words = "caption IMAGE"
    if not backend and not manifest.engines_of:
        able = next(name for name, row in BACKENDS.items() if manifest.precision not in row.refuses)
        backend = "" if able == next(iter(BACKENDS)) else able
    return f"blip2edge {words} -b {quoted(path)}" + (f" --backend {backend}" if backend else "")


def calibrate_command(path: Path, manifest: Manifest) -> str | None:
    """Returns the command that makes an INT8 bundle from a bundle; None if the bundle cannot be calibrated."""
    if manifest.calibration or manifest.engines_of or manifest.precision == "bf16":
        return None
    whole = Path(bundle_name(path)) if is_hub_name(path) else path
    if whole.name in ("", ".."):
        whole = whole.resolve()
    return f"blip2edge calibrate {quoted(path)} -o {quoted(whole.with_name(f'{whole.name}-int8'))} --images DIR"
