"""Support by TensorRT version: unsupported nodes are named, replaceable ones are replaced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")
pytest.importorskip("onnxruntime", reason="both graphs are run")

import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from blip2edge.engine.adapt import adapt
from blip2edge.engine.operators import COMMON, CONSTANT_INPUTS, VERSIONS
from blip2edge.engine.prepare import asked_precisions
from blip2edge.engine.support import check_graph, refuse, version_for
from blip2edge.errors import EngineError

F32, F16, I64, I8, U8 = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT64,
    TensorProto.INT8,
    TensorProto.UINT8,
)


def model_of(
    nodes: list[Any],
    inputs: dict[str, int],
    outputs: dict[str, int],
    constants: dict[str, Any] | None = None,
    opset: int = 18,
) -> Any:
    """An ONNX model on tensors ``[4, 4]``."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value(name, kind, [4, 4]) for name, kind in inputs.items()],
        [value(name, kind, None) for name, kind in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def problems(proto: Any, version: str) -> list[str]:
    found = check_graph(ir.from_proto(proto), VERSIONS[version])
    return [f"{one.node} {one.operator}: {one.problem}" for one in found]


def dequantised(kind: Any, block: int, zero: int | None = None) -> Any:
    scale = np.ones((2, 4), np.float32) if block else np.float32(1)
    constants = {"w": np.ones((4, 4), kind), "scale": scale}
    inputs = ["w", "scale"]
    if zero is not None:
        constants["zero"] = np.array(zero, kind)
        inputs.append("zero")
    attributes: dict[str, Any] = {"axis": 0, "block_size": block} if block else {}
    nodes = [
        helper.make_node("DequantizeLinear", inputs, ["d"], name="dq", **attributes),
        helper.make_node("MatMul", ["x", "d"], ["y"], name="product"),
    ]
    return model_of(nodes, {"x": F32}, {"y": F32}, constants, opset=21)


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_graphs_are_taken(version: str) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"]),
        helper.make_node("Cast", ["b"], ["y"], to=F16),
    ]
    assert problems(model_of(nodes, {"x": F32}, {"y": F16}), version) == []
    assert problems(dequantised(np.int8, 0, zero=0), version) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_no_version_takes(version: str) -> None:
    contrib = helper.make_node("FusedMatMul", ["x", "x"], ["y"], name="fused", domain="com.microsoft")
    assert problems(model_of([contrib], {"x": F32}, {"y": F32}), version) == [
        "fused FusedMatMul: its domain is com.microsoft, which only ONNX Runtime supports"
    ]
    unknown = helper.make_node("Bernoulli", ["x"], ["y"], name="dice")
    assert "no such operator" in problems(model_of([unknown], {"x": F32}, {"y": F32}), version)[0]
    assert problems(dequantised(np.int8, 0, zero=3), version) == ["dq DequantizeLinear: its zero point is not 0"]
    norm = helper.make_node("LayerNormalization", ["x", "s"], ["y", "mean"], name="norm")
    model = model_of([norm], {"x": F32}, {"y": F32, "mean": F32}, {"s": np.ones(4, np.float32)})
    assert problems(model, version) == ["norm LayerNormalization: only its first output is supported"]


def test_blocks_of_int8_are_for_rtx_alone() -> None:
    model = dequantised(np.int8, 2)
    assert problems(model, "rtx") == []
    for version in ("10.3", "10.13", "10.16", "11.4"):
        assert problems(model, version) == [
            "dq DequantizeLinear: one scale per block is supported for INT4 only, not for INT8"
        ]


def test_newer_operators_and_opsets_need_newer_versions() -> None:
    node = helper.make_node("RMSNormalization", ["x", "s"], ["y"], name="norm")
    model = model_of([node], {"x": F32}, {"y": F32}, {"s": np.ones(4, np.float32)}, opset=23)
    assert problems(model, "10.16") == []
    found = problems(model, "10.3")
    assert found == [
        "graph opset: the graph has opset 23, but TensorRT 10.3 documents opsets up to 20",
        "norm RMSNormalization: TensorRT 10.3 has no such operator",
    ]
    with pytest.raises(EngineError, match=r"node 'graph' \(opset\) of g\.onnx: .* and 1 more"):
        refuse("g.onnx", check_graph(ir.from_proto(model), VERSIONS["10.3"]), VERSIONS["10.3"])
    refuse("g.onnx", [], VERSIONS["10.3"])


def test_axes_that_are_computed() -> None:
    nodes = [
        helper.make_node("Add", ["a", "a"], ["axes"]),
        helper.make_node("Unsqueeze", ["x", "axes"], ["y"], name="turn"),
        helper.make_node("ReduceMean", ["x", "axes"], ["z"], name="mean"),
    ]
    model = model_of(nodes, {"x": F32}, {"y": F32, "z": F32}, {"a": np.zeros(1, np.int64)})
    assert problems(model, "10.3") == [
        "turn Unsqueeze: its input 1 must be a constant",
        "mean ReduceMean: its input 1 must be a constant",
    ]
    assert problems(model, "10.13") == ["mean ReduceMean: its input 1 must be a constant"]


def test_integers_are_clipped_and_counted_in_ways_that_are_documented() -> None:
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["c"], name="count"),
        helper.make_node("Clip", ["c", "low", "high"], ["y"], name="clip"),
        helper.make_node("Clip", ["f", "flow"], ["z"], name="floats"),
    ]
    constants = {
        "axis": np.array(1, np.int64),
        "low": np.array(2, np.int64),
        "high": np.array(5, np.int64),
        "flow": np.array(0, np.float32),
    }
    proto = model_of(nodes, {"x": I64, "f": F32}, {"y": I64, "z": F32}, constants)
    assert [problem.split(":")[0] for problem in problems(proto, "10.3")] == ["count CumSum", "clip Clip"]
    model = ir.from_proto(proto)
    assert adapt(model) == 2
    assert adapt(model) == 0
    assert check_graph(model, VERSIONS["10.3"]) == []
    feeds = {
        "x": np.arange(-4, 12).reshape(4, 4) % 3,
        "f": np.linspace(-1, 1, 16, dtype=np.float32).reshape(4, 4),
    }
    runs = [
        onnxruntime.InferenceSession(one.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)
        for one in (proto, ir.to_proto(model))
    ]
    for first, second in zip(*runs, strict=True):
        assert first.dtype == second.dtype
        assert (first == second).all()


def test_products_are_counted_by_what_they_are_asked_to_compute_in() -> None:
    assert asked_precisions(ir.from_proto(dequantised(np.int8, 0, zero=0))) == {"int8 weights": 1}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["e"]),
        helper.make_node("MatMul", ["d", "e"], ["y"]),
        helper.make_node("MatMul", ["x", "x"], ["z"]),
    ]
    constants = {"scale": np.float32(1), "zero": np.int8(0), "w": np.ones((4, 4), np.int8)}
    model = model_of(nodes, {"x": F32}, {"y": F32, "z": F32}, {k: np.asarray(v) for k, v in constants.items()})
    assert asked_precisions(ir.from_proto(model)) == {"int8": 1, "fp32": 1}


@pytest.mark.parametrize(
    ("target", "version", "name"),
    [
        ("tensorrt", (10, 3), "TensorRT 10.3"),
        ("tensorrt", (10, 12), "TensorRT 10.3"),
        ("tensorrt", (10, 14), "TensorRT 10.13"),
        ("tensorrt", (10, 15), "TensorRT 10.15"),
        ("tensorrt", (11, 0), "TensorRT 10.16"),
        ("tensorrt", (12, 0), "TensorRT 11.4"),
        ("rtx", (1, 7), "TensorRT for RTX 1.7"),
    ],
)
def test_a_version_between_two_is_held_to_the_older(target: str, version: tuple[int, int], name: str) -> None:
    assert version_for(target, version).name == name


def test_the_table_has_no_operator_twice_and_knows_what_it_restricts() -> None:
    assert set(CONSTANT_INPUTS) <= set(COMMON)
    for version in VERSIONS.values():
        assert not set(version.added) & set(COMMON)
        assert set(version.changed) <= set(COMMON)
        assert version.quantised_opset >= version.opset
