"""Checks the output of a recipe's script before any work is done."""

from __future__ import annotations

from pathlib import Path

from blip2edge.errors import OutputError


def check_new(out: Path) -> None:
    """Raises OutputError if the output exists already."""
    if out.exists():
        raise OutputError(f"{out} exists", "remove it, or give another directory with --out")
