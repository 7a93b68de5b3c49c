"""Operations of graphs whose products were counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="graphs are made here")

import onnx
from onnx import TensorProto, helper, numpy_helper

from blip2edge.bundle.schema import Axis, GraphSpec, TensorSpec
from blip2edge.optimization.stage_cost import graph_cost
from blip2edge.shapes.cost import StageCost

BATCH, STEPS = Axis("batch", 1, 1, 8), Axis("steps", 1, 4, 16)


def saved(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], **shapes: list[int | str]) -> Path:
    """A graph ``x`` to ``y``; ``shapes`` of all values between."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    inner = [value for name, value in values.items() if name not in "xy"]
    graph = helper.make_graph(
        nodes,
        "g",
        [values["x"]],
        [values["y"]],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
        value_info=inner,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def spec(*dims: int | Axis) -> GraphSpec:
    return GraphSpec("g", (TensorSpec("x", "float32", dims),), (TensorSpec("y", "float32", dims),))


def ones(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.ones(shape, dtype)


def test_products_of_weights_and_of_activations(tmp_path: Path) -> None:
    """x [b, s, 8] · w [8, 16], then by its own transpose; the weight is used twice, and read once."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["x", "w"], ["b"]),
        helper.make_node("Transpose", ["b"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["a", "t"], ["y"]),
    ]
    path = saved(
        tmp_path / "g.onnx",
        nodes,
        {"w": ones(8, 16)},
        x=["batch", "steps", 8],
        a=["batch", "steps", 16],
        b=["batch", "steps", 16],
        t=["batch", 16, "steps"],
        y=["batch", "steps", "steps"],
    )
    found = graph_cost(path, spec(BATCH, STEPS, 8), {"batch": 2, "steps": 5})
    projected = 2 * (2 * 5) * 8 * 16
    attended = 2 * 2 * 5 * 5 * 16
    assert found == StageCost(2 * projected + attended, 0.0, 8 * 16 * 4)
    shortest = graph_cost(path, spec(BATCH, STEPS, 8), {})
    assert shortest.float_ops == 2 * (2 * 8 * 16) + 2 * 16


def test_patches(tmp_path: Path) -> None:
    """A picture [b, 3, 32, 32] in patches of 8: 16 places of 24 channels, 3 · 8 · 8 products each."""
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], strides=[8, 8], kernel_shape=[8, 8])]
    path = saved(tmp_path / "g.onnx", nodes, {"w": ones(24, 3, 8, 8)}, x=["batch", 3, 32, 32], y=["batch", 24, 4, 4])
    found = graph_cost(path, spec(BATCH, 3, 32, 32), {"batch": 2})
    assert found == StageCost(2.0 * 2 * 16 * 24 * (3 * 8 * 8), 0.0, 24 * 3 * 8 * 8 * 4)


def test_integer_weights_and_their_scales(tmp_path: Path) -> None:
    """INT8 weights count as integer work, one byte each and four for the scale of each of 16 columns."""
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["f"], axis=1),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    weights = {"w": ones(8, 16, dtype="int8"), "scale": ones(16)}
    path = saved(tmp_path / "g.onnx", nodes, weights, x=["batch", 8], f=[8, 16], y=["batch", 16])
    assert graph_cost(path, spec(BATCH, 8), {"batch": 3}) == StageCost(0.0, 2.0 * 3 * 8 * 16, 8 * 16 + 16 * 4)
