"""The passes on small graphs: matched patterns, and equal results with integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir", reason="graphs are rewritten with onnx_ir")
onnx = pytest.importorskip("onnx", reason="graphs are built with onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="what comes out is run")

from blip2edge.optimization.graph import clean, prepare  # noqa: E402
from blip2edge.optimization.passes.blocks import use_block_kernels  # noqa: E402
from blip2edge.optimization.passes.integers import (  # noqa: E402
    use_dynamic_ranges,
    use_recorded_ranges,
    without_rounding,
)
from blip2edge.optimization.passes.pointwise import use_pointwise_convolutions  # noqa: E402

FLOAT, INT8, INT4 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT8, onnx.TensorProto.INT4
K, N = 64, 24


def model(nodes: list[Any], tensors: list[Any], outputs: dict[str, int]) -> Any:
    """A graph of ``x [B, S, K]``."""
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", FLOAT, ["b", "s", K])],
        [onnx.helper.make_tensor_value_info(name, FLOAT, ["b", "s", width]) for name, width in outputs.items()],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid("", 21)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(rewritten: Any, x: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the graph as it stands
    session = onnxruntime.InferenceSession(ir.to_proto(rewritten).SerializeToString(), options)
    return [np.asarray(value) for value in session.run(None, {"x": x})]


def kinds(rewritten: Any) -> list[str]:
    return [node.op_type for node in rewritten.graph]


def tensor(name: str, array: Any) -> Any:
    return onnx.numpy_helper.from_array(array, name)


def quantised() -> tuple[Any, np.ndarray]:
    """A product between Q/DQ nodes with a bias, and its weight."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (K, N)).astype(np.int8)
    scales = rng.uniform(0.001, 0.01, N).astype(np.float32)
    node = onnx.helper.make_node
    nodes = [
        node("QuantizeLinear", ["x", "step", "zero"], ["q"]),
        node("DequantizeLinear", ["q", "step", "zero"], ["xr"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=1),
        node("MatMul", ["xr", "wf"], ["p"]),
        node("Add", ["p", "bias"], ["y"]),
    ]
    tensors = [
        tensor("step", np.float32(4 / 127)), tensor("zero", np.int8(0)), tensor("w", weight),
        tensor("ws", scales), tensor("wz", np.zeros(N, np.int8)),
        tensor("bias", rng.standard_normal(N).astype(np.float32)),
    ]  # fmt: skip
    return model(nodes, tensors, {"y": N}), weight * scales


def x_of(rows: int = 5) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, rows, K)).astype(np.float32).clip(-4, 4)


@pytest.mark.parametrize(
    ("rewrite", "kind"),
    [
        (use_dynamic_ranges, "DynamicQuantizeMatMul"),
        (use_recorded_ranges, "MatMulIntegerToFloat"),
        (lambda graph: use_block_kernels(graph, columns_too=True), "MatMulNBits"),
    ],
)
def test_integers_keep_their_meaning(rewrite: Any, kind: str) -> None:
    graph, _ = quantised()
    x = x_of()
    wanted = run(graph, x)[0]
    prepare(graph)
    assert rewrite(graph) == 1
    graph.graph.sort()
    clean(graph)
    assert kind in kinds(graph)
    assert "DequantizeLinear" not in kinds(graph)
    got = run(graph, x)[0]
    spread = float(np.abs(wanted).max())
    assert np.abs(got - wanted).max() < 0.02 * spread
    if kind == "MatMulIntegerToFloat":  # the same integers: a signed byte and an unsigned one around 128
        np.testing.assert_allclose(got, wanted, atol=1e-5 * spread)


def test_unrounded_activations_are_what_integers_are_compared_with() -> None:
    graph, weight = quantised()
    x = x_of()
    bias = graph.graph.initializers["bias"].const_value.numpy()
    prepare(graph)
    assert without_rounding(graph) == 1
    clean(graph)
    np.testing.assert_allclose(run(graph, x)[0], x @ weight + bias, atol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_of_one_value_become_one(bits: int) -> None:
    rng = np.random.default_rng(2)
    low, high = (-8, 8) if bits == 4 else (-127, 128)
    node, nodes, tensors, wanted = onnx.helper.make_node, [], [], {}
    x = x_of()
    for name, width in (("gate", N), ("up", 2 * N)):
        values = rng.integers(low, high, (K, width)).astype(np.int8)
        scales = rng.uniform(0.01, 0.02, (K // 32, width)).astype(np.float32)
        kind = INT4 if bits == 4 else INT8
        tensors += [
            onnx.helper.make_tensor(name, kind, values.shape, values.ravel().tolist()),
            tensor(f"{name}s", scales),
        ]
        nodes += [
            node("DequantizeLinear", [name, f"{name}s"], [f"{name}f"], axis=0, block_size=32),
            node("MatMul", ["x", f"{name}f"], [f"{name}y"]),
        ]
        wanted[f"{name}y"] = x @ (values * np.repeat(scales, 32, axis=0))
    graph = model(nodes, tensors, {"gatey": N, "upy": 2 * N})
    prepare(graph)
    assert use_block_kernels(graph) == 2
    graph.graph.sort()
    clean(graph)
    assert kinds(graph) == ["MatMulNBits", "Split"]
    for got, (name, exact) in zip(run(graph, x), wanted.items(), strict=True):
        assert np.abs(got - exact).max() < 0.02 * np.abs(exact).max(), name
    alone = run(graph, x[1:, 2:3])[0]
    np.testing.assert_array_equal(alone, run(graph, x)[0][1:, 2:3])  # a row hangs on no other


@pytest.mark.parametrize(("narrowing", "found"), [(False, 2), (True, 1)])
def test_float_products_become_convolutions(narrowing: bool, found: int) -> None:
    rng = np.random.default_rng(4)
    node = onnx.helper.make_node
    wide, narrow = (rng.standard_normal(shape).astype(np.float32) for shape in ((K, 96), (96, 32)))
    bias = rng.standard_normal(96).astype(np.float32)
    nodes = [
        node("MatMul", ["x", "wide"], ["p"]),
        node("Add", ["bias", "p"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "narrow"], ["y"]),
    ]
    tensors = [tensor("wide", wide), tensor("narrow", narrow), tensor("bias", bias)]
    rewritten = model(nodes, tensors, {"y": 32})
    prepare(rewritten)
    assert use_pointwise_convolutions(rewritten, narrowing=narrowing) == found
    clean(rewritten)
    assert kinds(rewritten).count("Conv") == found
    assert kinds(rewritten).count("Relu") == 1
    x = rng.standard_normal((3, 5, K)).astype(np.float32)
    (got,) = run(rewritten, x)
    wanted = np.maximum(x @ wide + bias, 0) @ narrow
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_products_of_odd_widths_stay() -> None:
    weight = np.ones((K, N + 1), np.float32)
    rewritten = model([onnx.helper.make_node("MatMul", ["x", "w"], ["y"])], [tensor("w", weight)], {"y": N + 1})
    prepare(rewritten)
    assert use_pointwise_convolutions(rewritten) == 0
