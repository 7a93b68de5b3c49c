"""The benchmark of training memory: its models and recipes, and the bounds that its results keep."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from blip2edge.shapes.families import shape_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(name="script")
def _script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("training_memory")


def test_the_smaller_models_have_about_a_tenth_of_the_parameters(script: Any) -> None:
    for name in script.TENTHS:
        small, full = (shape_of(script.values_of(name, small=small)).parameters()["total"] for small in (True, False))
        assert 0.07 < small / full < 0.13, name


def test_each_choice_saves_memory(script: Any) -> None:
    found = [script.predicted("blip2-opt-2.7b", choice, small=True) for choice in script.CHOICES]
    peaks = [each["step"] for each in found]
    assert peaks[0] > peaks[1] > peaks[2]
    assert peaks[3] > peaks[2], "LoRA trains more weights"
    assert peaks[4] < peaks[3]


def test_the_results_keep_their_bounds() -> None:
    """Predictions within 15 % of what was measured; the loss of the first step within 0.1 % of float32."""
    document = json.loads((ROOT / "benchmarks/results/training-memory.json").read_text(encoding="utf-8"))
    complete = [model for model in document["models"] if all(row["measured"] for row in model["rows"])]
    assert complete
    for model in complete:
        first = model["rows"][0]["measured"]["losses"]
        measured = [row["measured"]["peak"] for row in model["rows"]]
        assert measured[0] > measured[1] > measured[2]
        assert measured[4] < 0.8 * measured[3]
        for row in model["rows"]:
            assert abs(row["error"]) < 0.15, (model["model"], row["choice"])
            assert row["measured"]["losses"][0] == pytest.approx(first[0], rel=1e-3)
        half, again = (model["rows"][number]["measured"]["losses"] for number in (1, 2))
        assert half == again, "checkpointing changes no loss"
