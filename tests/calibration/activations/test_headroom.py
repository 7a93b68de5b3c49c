"""The FP16 headroom of tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from blip2edge.calibration.activations.headroom import FP16_MAX, headroom_json, measure_headroom
from tests.calibration.graphs import TOKENS, WIDTH, feeds_of, node, write_graph


def measured(folder: Path, runs: list[np.ndarray]) -> dict[str, tuple[float, float, str]]:
    """Largest value, headroom and reason by tensor, of a graph with a scale, a square and a masked softmax."""
    record = write_graph(
        folder,
        [
            node("Mul", ["x", "thousand"], "scaled"),
            node("Mul", ["scaled", "scaled"], "squared"),
            node("Add", ["scaled", "mask"], "masked"),
            node("Softmax", ["masked"], "shares"),
            node("Add", ["shares", "squared"], "y"),
        ],
        {
            "thousand": np.full(WIDTH, 1000.0, np.float32),
            "mask": np.where(np.arange(WIDTH) > 3, -1e9, 0.0).astype(np.float32),
        },
    )
    model = ir.load(folder / "vision_encoder.onnx")
    reaches = measure_headroom(model, record, feeds_of(folder, runs), folder, threads=1)
    assert [reach.headroom for reach in reaches] == sorted(reach.headroom for reach in reaches)
    values = headroom_json(reaches)
    assert values["lowest"] == reaches[0].headroom
    assert {entry["tensor"] for entry in values["keep_fp32"]} == {reach.tensor for reach in reaches if reach.reason}
    return {reach.tensor: (reach.largest, reach.headroom, reach.reason) for reach in reaches}


def test_the_largest_value_of_every_tensor_over_all_runs(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    runs = [random.uniform(-1, 1, (1, TOKENS, WIDTH)).astype(np.float32) for _ in range(3)]
    runs[1][0, 2, 5] = -2.5
    found = measured(tmp_path, runs)
    assert found["scaled"][0] == 2500.0
    assert found["scaled"][1] == pytest.approx(FP16_MAX / 2500)
    assert found["squared"][0] == pytest.approx(6.25e6)
    assert found["squared"][1] < 1
    assert "reaches 6.25e+06 on these pictures" in found["squared"][2]
    assert not found["scaled"][2]


def test_a_mask_before_a_softmax_is_no_overflow(tmp_path: Path) -> None:
    runs = [np.full((1, TOKENS, WIDTH), 0.5, np.float32)]
    found = measured(tmp_path, runs)
    assert found["masked"][0] == 500.0  # not 1e9: minus infinity does there as well
    assert not found["masked"][2]
