"""The rules by which the soak benchmark judges a server."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("onnxruntime", reason="the captioner needs onnxruntime")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("soak")


def test_memory_is_compared_by_halves_after_the_warm_up(soak: Any) -> None:
    def growth(*sizes: int) -> float:
        return float(soak.growth([{"s": 60.0 * at, "resident_bytes": size} for at, size in enumerate(sizes)]))

    assert growth(10, 100, 100, 100, 100) == 0  # the first minute does not count
    assert growth(10, 100, 100, 110, 110) == pytest.approx(0.1)
    assert growth(10, 100, 140, 100, 140) == 0  # one large sample is no growth
    record = soak.memory([{"s": 30.0 * at, "resident_bytes": 100} for at in range(20)])
    assert record["memory_growth"] == 0
    assert "0.05" in json.loads(json.dumps(record))["memory_rule"]


def test_the_bound_of_a_captions_time_follows_the_flags(soak: Any) -> None:
    assert soak.bound_ms([], 36.0) == 4000  # 64 + 8 requests
    assert soak.bound_ms(["--threads", "1", "--queue", "10", "--max-batch=2"], 12.0) == 2000
