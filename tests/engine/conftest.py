"""Bundles of every family, exported once a session."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

BundleOf = Callable[[str], Path]


@pytest.fixture(scope="session")
def bundle_of(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> BundleOf:
    """A family's name to its bundle in fp32; not to be changed."""
    pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
    from blip2edge.export.pipeline import export_checkpoint
    from tests.engine.families import FAMILIES

    @cache
    def export(name: str) -> Path:
        if name == "blip2-opt":
            path: Path = request.getfixturevalue("tiny_bundle")
            return path
        directory = tmp_path_factory.mktemp(name)
        FAMILIES[name](directory / "checkpoint")
        return export_checkpoint(directory / "checkpoint", directory / "bundle", verify="sample").bundle

    return export
