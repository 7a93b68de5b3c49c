"""Stops an editable install when the symlinks of `blip2edge/` are missing. Wheels and sdists do not need them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MESSAGE = """
An editable install needs the symlinks of blip2edge/ ({missing}). This copy has none.
In a clone, let git make them:
    git config core.symlinks true
    git checkout -- blip2edge
A zip archive has no symlinks: clone the repository, or install without -e.
"""


class CheckLinks(BuildHookInterface[Any]):
    """Hatchling's build hook, which `pyproject.toml` names: checks the symlinks of the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Checks the links before an editable wheel is made.

        Raises:
            SystemExit: A link is missing, or git made a text file instead of a link.
        """
        package = Path(self.root) / "blip2edge"
        folders = self.metadata.config["tool"]["hatch"]["build"]["targets"]["wheel"]["sources"]
        linked = [name for name, target in folders.items() if target == f"{package.name}/{name}"]
        missing = [name for name in linked if not (package / name).is_dir()]
        if version == "editable" and missing:
            raise SystemExit(MESSAGE.format(missing=", ".join(missing)))
