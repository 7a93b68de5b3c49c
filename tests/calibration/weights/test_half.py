"""Weights stored in FP16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="graphs are changed with onnx_ir")

import onnx_ir as ir

from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.weights.half import _replace_by_cast


def test_a_cast_comes_before_all_users_of_a_shared_weight(tmp_path: Path) -> None:
    """The order of uses is that of the nodes' creation, which need not be the graph's."""
    weight = ir.Value(name="w", const_value=ir.tensor(np.eye(2, dtype=np.float32), name="w"))
    weight.shape, weight.type = ir.Shape((2, 2)), ir.TensorType(ir.DataType.FLOAT)
    pixels = ir.Value(name="x", shape=ir.Shape((2, 2)), type=ir.TensorType(ir.DataType.FLOAT))
    middle = ir.Value(name="middle")
    last = ir.node("MatMul", [middle, weight], name="last")
    first = ir.node("MatMul", [pixels, weight], outputs=[middle], name="first")
    graph = ir.Graph([pixels], list(last.outputs), nodes=[first, last], initializers=[weight], name="g")
    assert [user.name for user, _ in weight.uses()] == ["last", "first"]
    with DataFile(tmp_path / "g.data") as file:
        _replace_by_cast(graph, "w", file, np.eye(2, dtype=np.float32))
    assert [node.name for node in graph] == ["w.cast", "first", "last"]
    cast = graph[0].outputs[0]
    assert cast.name == "w.float"
    assert all(node.inputs[1] is cast for node in (first, last))
