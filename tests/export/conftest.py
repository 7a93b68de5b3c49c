"""Exports that the tests of export share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def quick() -> Callable[..., Path]:
    """``export_checkpoint`` that returns the bundle; traces are shared (``tests/traces.py``)."""
    from blip2edge.export import pipeline

    def export(checkpoint: Path, output: Path, **options: Any) -> Path:
        return pipeline.export_checkpoint(checkpoint, output, **options).bundle

    return export
