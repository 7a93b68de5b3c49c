"""What ``pyproject.toml`` says, for tests (Python 3.10 has no TOML reader of its own); and files of results."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@cache
def pyproject() -> dict[str, Any]:
    """The whole file."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))


def project() -> dict[str, Any]:
    """The table ``[project]``."""
    return dict(pyproject()["project"])


def extras() -> dict[str, list[str]]:
    """The requirements of each extra."""
    return dict(project()["optional-dependencies"])


def write_result(path: Path, **document: Any) -> None:
    """Writes a result as the scripts of ``benchmarks/`` do: JSON with the command and the machine."""
    sys.path.append(str(ROOT / "benchmarks"))
    import reporting

    reporting.write_result(path, **document)
