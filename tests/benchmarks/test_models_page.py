"""Checks that docs/models.md is up to date, and its figures against published checkpoints."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxscript", reason="graphs are described by the export extra")

from blip2edge.model.families.registry import FAMILIES, read_config

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = {"blip2-opt-2.7b": 3_744_761_856, "clip-vit-base-patch32": 151_277_312}
"""As the published files hold them; CLIP without its temperature, which nothing is computed with."""


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("models_table")


def test_the_page_is_what_the_registries_say(page: Any) -> None:
    written = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert written == page.document(), "run: make docs"
    for family in FAMILIES.values():
        assert f"| {family.title} |" in written


def test_every_family_has_a_published_configuration(page: Any) -> None:
    found = {read_config(page.published(name)).family for name in page.NAMES}
    assert found == set(FAMILIES)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_published_checkpoint(page: Any, name: str) -> None:
    assert sum(page.parts(page.opened(page.published(name))).values()) == PARAMETERS[name]


def test_every_configuration_holds_parity_in_every_precision(page: Any) -> None:
    results = json.loads(page.PARITY.read_text())["results"]
    assert set(results) == set(page.NAMES), "run: python benchmarks/parity.py"
    failed = [(name, found) for name, by in results.items() for found in by.values() if not found["passes"]]
    assert not failed
