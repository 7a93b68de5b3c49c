"""The roofline: rates from known times, minimal times of known costs, and the graphs of products."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime", reason="products are run in it")

from blip2edge.runtime.backends.base import open_session
from blip2edge.runtime.bench import roofline
from blip2edge.runtime.bench.roofline import product_graph
from blip2edge.shapes.cost import Roofline, StageCost

MACHINE = Roofline(bytes_per_s=1e9, float_ops_per_s=2e9, integer_ops_per_s=8e9)


@pytest.mark.parametrize(
    ("cost", "seconds", "limit"),
    [
        (StageCost(4e9, 0.0, 1e9), 2.0, "products"),
        (StageCost(4e9, 8e9, 1e9), 3.0, "products"),
        (StageCost(1e9, 0.0, 3e9), 3.0, "bytes"),
        (StageCost(2e9, 0.0, 1e9), 1.0, "bytes"),  # a tie: more products would not be free
    ],
)
def test_the_least_time(cost: StageCost, seconds: float, limit: str) -> None:
    assert cost.seconds(MACHINE) == pytest.approx(seconds)
    assert cost.limited_by(MACHINE) == limit


def test_costs_add_up() -> None:
    assert StageCost(1.0, 2.0, 3.0) + StageCost(10.0, 20.0, 30.0) == StageCost(11.0, 22.0, 33.0)


@pytest.mark.parametrize("backend", ["cpu", "openvino"])
@pytest.mark.parametrize("dtype", [np.float32, np.int8])
def test_a_product_is_one(dtype: Any, backend: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime" if backend == "cpu" else backend, reason="the backend is not installed")
    rng = np.random.default_rng(2)
    first = rng.integers(-128, 128, (3, 300)).astype(np.float32)  # exact in both: the scale is 1
    second = rng.integers(-127, 128, (300, 5)).astype(dtype)
    path = tmp_path / "product.onnx"
    path.write_bytes(product_graph(3, second))
    found = open_session(path, backend, 1).run({"a": first})["c"]
    np.testing.assert_allclose(found, first.astype(np.float64) @ second, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("integer", [True, False])
def test_the_best_rate_of_some_sizes_counts(integer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Iterator[float] = iter((0.5, 0.25, 0.25))
    asked: list[tuple[Any, ...]] = []

    def seconds(*arguments: Any, integer: bool) -> float:
        asked.append((*arguments, integer))
        return next(times)

    monkeypatch.setattr(roofline, "SIZES", ((2, 3, 5), (10, 10, 10), (4, 4, 4)))
    monkeypatch.setattr(roofline, "product_seconds", seconds)
    assert roofline._rate("cpu", integer=integer) == 2 * 10 * 10 * 10 / 0.25
    assert asked[0] == ("cpu", 2, 3, 5, 1, integer)


def test_the_least_of_some_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([at for took in (5, 3, 9, 4, 8, 7, 6) for at in (100, 100 + took)])
    monkeypatch.setattr("time.process_time", lambda: float(next(ticks)))
    runs: list[int] = []

    def compute() -> None:
        runs.append(1)

    assert roofline._least(compute) == 3.0
    assert len(runs) == roofline.REPEATS + 1  # one warms up


def test_bytes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "STREAMED", 1 << 20)
    monkeypatch.setattr(roofline, "_least", lambda compute: (compute(), 0.5)[1])
    assert roofline._bandwidth() == (1 << 20) / 0.5


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "STREAMED", 1 << 22)
    monkeypatch.setattr(roofline, "SIZES", ((64, 64, 64),))
    found = roofline.measure("cpu").to_json()
    assert all(value > 0 for value in found.values())
    assert MACHINE.to_json() == {"gigabytes_per_s": 1.0, "gigaflops_fp32": 2.0, "gigaops_int8": 8.0}
