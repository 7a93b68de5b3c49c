"""Checks that docs/training.md lists every key of a recipe with its default."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from blip2edge.training import config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("recipe_keys")


def test_the_page_is_what_the_dataclasses_say(keys: Any) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert keys.placed(page) == page, "run: make docs"


def test_every_key_has_a_row(keys: Any) -> None:
    text = keys.document()

    def check(kind: type) -> None:
        default = kind()
        for field in dataclasses.fields(kind):
            value = getattr(default, field.name)
            if field.name == "sets":  # written as [[data]]
                continue
            if dataclasses.is_dataclass(value):
                check(type(value))
            else:
                assert f"| `{field.name}` | {keys.written(value)} |" in text or kind in (
                    config.Stage1Phase,
                    config.BlockSizes,
                ), field.name

    check(config.TrainingConfig)
    assert "| `steps` | `0` |" in text


def test_the_recipes_of_the_page_are_valid() -> None:
    for name in ("training.md", "data.md"):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
            if "[model]" in block:
                config.parse_config(block)


def test_the_figures_are_those_that_were_measured() -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    runs = json.loads((results / "stages.json").read_text(encoding="utf-8"))["runs"]
    found: dict[int, dict[str, list[str]]] = {}
    for run in runs:
        row = found.setdefault(run["steps"], {})
        row.setdefault(run["name"], []).append(f"{100 * run['exact_match']:.1f} %")
    for steps, row in found.items():
        both, alone = (", ".join(row[name]) for name in ("stage 1, then stage 2", "stage 2 alone"))
        assert f"| {steps} | {both} | {alone} |" in page
    record = json.loads((results / "scenes-training.json").read_text(encoding="utf-8"))
    for scores in (record["heldout"], *record["other_series"]):
        assert f"{100 * scores['exact_match']:.1f} %" in page
    for shape in json.loads((results / "training-speed.json").read_text(encoding="utf-8"))["shapes"]:
        for row in shape["results"][1:]:
            assert f"({row['ratio']:.2f})" in page
