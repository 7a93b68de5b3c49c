"""Models written as bytes are equal to those that the onnx package writes."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the models are checked with it")

import onnx
from onnx import helper, numpy_helper

from blip2edge.runtime.backends.probe import (
    ELEMENT_TYPES,
    IR_VERSION,
    MATMUL,
    OPSET,
    gather_model,
    onnx_model,
    slice_model,
)
from blip2edge.runtime.bench.roofline import product_graph

MODELS = {
    "matmul": MATMUL,
    "gather": gather_model("float32"),
    "gather fp16": gather_model("float16"),
    "slice": slice_model("float32"),
    "slice fp16": slice_model("float16"),
    "product": product_graph(300, np.ones((200, 5), np.float32)),
    "integer product": product_graph(3, np.ones((200, 5), np.int8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_onnx_accepts_the_models(name: str) -> None:
    model = onnx.load_from_string(MODELS[name])
    onnx.checker.check_model(model, full_check=True)


def test_the_model_is_the_one_that_onnx_writes() -> None:
    weight = np.arange(600, dtype=np.int8).reshape(200, 3)
    kinds = {"a": ("float16", ("rows", 200)), "b": ("int64", (1,))}
    found = onnx_model(
        [("Cast", ("a",), "x"), ("Add", ("x", "b"), "y")], kinds, ("y", ("int32", (2, "n"))), {"w": weight}
    )
    values = [helper.make_tensor_value_info(name, ELEMENT_TYPES[kind], shape) for name, (kind, shape) in kinds.items()]
    graph = helper.make_graph(
        [helper.make_node("Cast", ["a"], ["x"]), helper.make_node("Add", ["x", "b"], ["y"])],
        "graph",
        values,
        [helper.make_tensor_value_info("y", ELEMENT_TYPES["int32"], (2, "n"))],
        [numpy_helper.from_array(weight, "w")],
    )
    wanted = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    assert onnx.load_from_string(found) == wanted


def test_element_types_are_those_of_onnx() -> None:
    for name, number in ELEMENT_TYPES.items():
        assert helper.np_dtype_to_tensor_dtype(np.dtype(name)) == number
