"""Q/DQ graphs: their nodes, and that they compute with the rounded integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from blip2edge.bundle.trust.integrity import FileRecord
from blip2edge.calibration.activations.qdq import (
    ActivationPlan,
    QuantizedActivation,
    insert_qdq,
    quantize_columns,
)
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import NO_WEIGHT, find_targets
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from tests.calibration.graphs import TOKENS, WIDTH, draw_weights, node, write_graph


def two_readers(folder: Path, dtype: str = "float32") -> None:
    """Two products of one activation, an addition, and a product of two activations."""
    first, second, bias = draw_weights(0, (WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH,))
    weights = {"first": first, "second": second, "bias": bias}
    write_graph(
        folder,
        [
            node("MatMul", ["x", "first"], "a"),
            node("MatMul", ["x", "second"], "b"),
            node("Add", ["b", "bias"], "c"),
            node("Transpose", ["a"], "t", perm=[0, 2, 1]),
            node("MatMul", ["c", "t"], "scores"),
            node("MatMul", ["scores", "c"], "y"),
        ],
        {name: array.astype(dtype) for name, array in weights.items()},
        dtype=dtype,
    )


def quantised(folder: Path, threshold: float = 3.0, target: str = "int8") -> Path:
    """The graph of ``folder`` with its products in INT8."""
    model = ir.load(folder / "vision_encoder.onnx")
    targets = find_targets(model)
    plan = ActivationPlan(
        [QuantizedActivation(name, tuple(products), threshold) for name, products in targets.by_activation().items()]
    )
    out = folder / target
    out.mkdir()
    with DataFile(out / "vision_encoder.onnx.data") as data:
        insert_qdq(model, plan, data)
    assert data.record == FileRecord.of(data.path)
    ir.save(model, out / "vision_encoder.onnx")
    onnx.checker.check_model(str(out / "vision_encoder.onnx"), full_check=True)
    return out / "vision_encoder.onnx"


def test_products_with_a_weight_are_found_and_attention_is_left(tmp_path: Path) -> None:
    two_readers(tmp_path)
    targets = find_targets(ir.load(tmp_path / "vision_encoder.onnx"))
    assert [(product.activation, product.weight) for product in targets.products] == [
        ("x", "first"),
        ("x", "second"),
    ]
    assert targets.kept_float == {"node_scores": NO_WEIGHT, "node_y": NO_WEIGHT}


def test_integers_are_symmetric_and_nothing_is_int32(tmp_path: Path) -> None:
    two_readers(tmp_path)
    graph = onnx.load(str(quantised(tmp_path))).graph
    kinds = [entry.op_type for entry in graph.node]
    assert kinds.count("QuantizeLinear") == 1  # one activation
    assert kinds.count("DequantizeLinear") == 3  # and two weights
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    assert {tensor.data_type for tensor in tensors.values()} <= {TensorProto.FLOAT, TensorProto.INT8}
    for entry in graph.node:
        if entry.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(entry.input) == 3
            assert not numpy_helper.to_array(tensors[entry.input[2]]).any()
            assert numpy_helper.to_array(tensors[entry.input[2]]).dtype == np.int8
    assert "first" not in tensors
    assert numpy_helper.to_array(tensors["first.int8"]).min() >= -127
    (attention,) = (entry for entry in graph.node if entry.output[0] == "scores")
    assert list(attention.input) == ["c", "t"]


def test_the_graph_computes_what_its_integers_say(tmp_path: Path) -> None:
    (weight,) = draw_weights(1, (WIDTH, WIDTH))
    write_graph(tmp_path, [node("MatMul", ["x", "first"], "y")], {"first": weight})
    path = quantised(tmp_path, threshold=2.0)
    x = np.random.default_rng(2).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    step = np.float32(2.0 / 127)
    integers = np.clip(np.rint(x / step), -128, 127)  # QuantizeLinear saturates at the type's end
    rounded, scale = quantize_columns(weight)
    wanted = (integers @ rounded.astype(np.float32)) * step * scale
    got = OnnxRuntimeSession(path, 1).run({"x": x})["y"]
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


def test_fp16_keeps_its_type_and_takes_the_opset_that_has_it(tmp_path: Path) -> None:
    two_readers(tmp_path, "float16")
    path = quantised(tmp_path)
    model = onnx.load(str(path))
    assert model.opset_import[0].version == 19
    scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".scale")]
    assert {tensor.data_type for tensor in scales} == {TensorProto.FLOAT16}
    x = np.random.default_rng(3).normal(size=(1, TOKENS, WIDTH)).astype(np.float16)
    exact = OnnxRuntimeSession(tmp_path / "vision_encoder.onnx", 1).run({"x": x})["y"].astype(np.float32)
    got = OnnxRuntimeSession(path, 1).run({"x": x})["y"].astype(np.float32)
    assert np.abs(got - exact).max() < 0.1 * np.abs(exact).max()


def test_columns_of_zeros_stay_zeros() -> None:
    weight = np.array([[0.0, 1.0], [0.0, -2.0]], np.float32)
    integers, scale = quantize_columns(weight)
    assert scale.tolist() == pytest.approx([1.0, 2 / 127])
    assert integers.tolist() == [[0, 64], [0, -127]]


def test_a_division_in_a_node_changes_nothing_but_the_rounding(tmp_path: Path) -> None:
    (weight,) = draw_weights(4, (WIDTH, WIDTH))
    weight[5] /= 300.0
    write_graph(tmp_path, [node("MatMul", ["x", "first"], "y")], {"first": weight})
    model = ir.load(tmp_path / "vision_encoder.onnx")
    targets = find_targets(model)
    reach = np.ones(WIDTH, np.float32)
    reach[5] = 300.0
    plan = ActivationPlan([QuantizedActivation("x", targets.products, 4.0, divisor=reach)])
    with DataFile(tmp_path / "divided.onnx.data") as data:
        insert_qdq(model, plan, data)
    ir.save(model, tmp_path / "divided.onnx")
    x = np.random.default_rng(5).normal(size=(1, TOKENS, WIDTH)).astype(np.float32)
    x[..., 5] *= 300.0
    exact = x @ weight
    got = OnnxRuntimeSession(tmp_path / "divided.onnx", 1).run({"x": x})["y"]
    assert np.abs(got - exact).max() < 0.05 * np.abs(exact).max()
