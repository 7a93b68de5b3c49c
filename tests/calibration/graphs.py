"""Small handmade graphs with their weights in a data file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.schema import Axis, GraphSpec, TensorSpec
from blip2edge.calibration.batches import Feeds

Array = NDArray[Any]

WIDTH, TOKENS = 16, 10
BATCH = Axis("batch", 1, 1, 4)


def write_graph(
    folder: Path,
    nodes: Sequence[onnx.NodeProto],
    weights: Mapping[str, Array],
    outputs: Sequence[str] = ("y",),
    dtype: str = "float32",
    name: str = "vision_encoder",
) -> GraphRecord:
    """Saves ``x [batch, TOKENS, WIDTH]`` -> outputs, and gives its record; shapes stay in the graph itself."""
    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[dtype]
    tensors = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(
        list(nodes),
        name,
        [helper.make_tensor_value_info("x", kind, ["batch", TOKENS, WIDTH])],
        [helper.make_tensor_value_info(output, kind, None) for output in outputs],
        tensors,
    )
    model = onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )
    onnx.save(
        model,
        folder / f"{name}.onnx",
        save_as_external_data=True,
        location=f"{name}.onnx.data",
        size_threshold=80,
    )
    spec = GraphSpec(
        name,
        (TensorSpec("x", dtype, (BATCH, TOKENS, WIDTH)),),
        tuple(TensorSpec(output, dtype, (BATCH, TOKENS, WIDTH)) for output in outputs),
    )
    return GraphRecord(spec, "fp32", data_files=(f"{name}.onnx.data",))


def node(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> onnx.NodeProto:
    """A node named after its output."""
    return helper.make_node(kind, list(inputs), [output], name=f"node_{output}", **attributes)


def feeds_of(folder: Path, runs: Sequence[Array], name: str = "vision_encoder") -> Feeds:
    """Inputs ``x``, run by run."""
    feeds = Feeds(folder / "feeds")
    for values in runs:
        feeds.add(name, {"x": values})
    return feeds


def draw_weights(seed: int, *shapes: tuple[int, ...]) -> list[Array]:
    """Matrices that keep a signal's size."""
    random = np.random.default_rng(seed)
    return [(random.normal(size=shape) / shape[0] ** 0.5).astype(np.float32) for shape in shapes]
