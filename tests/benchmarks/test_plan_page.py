"""Checks that docs/plan.md has the boards of the code and the figures of benchmarks/results/plan.json."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from blip2edge.runtime.bench.devices import DEVICES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def plan_page(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("plan_page")


def test_the_page_is_what_the_code_says(plan_page: Any) -> None:
    page = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    assert plan_page.placed(page) == page, "run: make docs"
    assert all(f"| `{name}` |" in page for name in DEVICES)


def test_a_rate_that_a_board_does_not_have(plan_page: Any) -> None:
    assert (plan_page.tera(16.75e12), plan_page.tera(None)) == ("16.8", "–")
    assert "0.154 / – / 0.614" in plan_page.boards()


def test_the_recorded_predictions_are_within_a_quarter() -> None:
    """The goal of `plan` on a machine that it measures, on the models that its constants were chosen on."""
    found = json.loads((ROOT / "benchmarks" / "results" / "plan.json").read_text(encoding="utf-8"))
    ratios = [row["ratio"] for result in found["results"] for row in result["stages"].values()]
    assert len(found["results"]) == 3
    assert sum(abs(ratio - 1) <= found["within"] for ratio in ratios) == found["stages_within"] == len(ratios)
