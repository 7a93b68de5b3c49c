"""Weight-only quantization of a graph: it computes the same as with the dequantized weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("onnx_ir", reason="graphs are changed with onnx_ir")

import onnx
import onnx_ir as ir
import onnxruntime

from blip2edge.calibration.formats import GraphFormat, NumberFormat
from blip2edge.calibration.storage import DataFile, InMemoryStore
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.blocks import BlockFormat, plain_scales, restored
from blip2edge.calibration.weights.gptq import nearest
from blip2edge.calibration.weights.segments import SegmentRunner, cut_graph
from blip2edge.calibration.weights.weight_only import (
    BlockMatrix,
    all_logits,
    choose_formats,
    quantize_matrices,
    replace_weights,
)
from tests.calibration.graphs import TOKENS, WIDTH, draw_weights, node, write_graph

Array = NDArray[Any]
NODES = (
    node("MatMul", ["x", "query"], "q"),
    node("MatMul", ["x", "key"], "k"),
    node("Tanh", ["q"], "t"),
    node("Mul", ["t", "k"], "s"),
    node("MatMul", ["s", "up"], "u"),
    node("Sigmoid", ["u"], "r"),
    node("MatMul", ["r", "down"], "d"),
    node("Add", ["d", "x"], "y"),
)
SHAPES = ((WIDTH, WIDTH), (WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two matrices that read x, one behind them, and one behind that."""
    weights = dict(zip(("query", "key", "up", "down"), draw_weights(5, *SHAPES), strict=True))
    folder = tmp_path / "parent"
    folder.mkdir()
    write_graph(folder, NODES, weights)
    return folder / "vision_encoder.onnx"


def drawn_feeds(count: int = 4) -> list[dict[str, Array]]:
    random = np.random.default_rng(2)
    size = np.exp(random.standard_normal(WIDTH)).astype(np.float32)
    return [{"x": random.standard_normal((2, TOKENS, WIDTH)).astype(np.float32) * size} for _ in range(count)]


def quantised(
    source: Path, folder: Path, bits: int = 4, feeds: list[dict[str, Array]] | None = None, **options: Any
) -> tuple[Path, dict[str, BlockMatrix]]:
    """The graph with its weights as integers."""
    folder.mkdir()
    model = ir.load(source)
    products = find_targets(model).products
    formats, left = choose_formats(products, GraphFormat(NumberFormat(f"int{bits}")))
    assert not left
    with DataFile(folder / "graph.data") as data:
        matrices = quantize_matrices(model, products, data, formats, feeds or [], **options)
    ir.save(model, folder / "graph.onnx")
    onnx.checker.check_model(str(folder / "graph.onnx"), full_check=True)
    return folder / "graph.onnx", matrices


def run(path: Path, feed: Mapping[str, Array], optimise: bool = False) -> Array:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, dict(feed))[0]
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_a_graph_computes_with_its_restored_weights(source: Path, tmp_path: Path, bits: int) -> None:
    path, matrices = quantised(source, tmp_path / "out", bits, drawn_feeds())
    weights = {
        name: restored(matrix.integers.numpy().astype(np.int8), matrix.scales.numpy(), matrix.form)
        for name, matrix in matrices.items()
    }
    floats = ir.load(source)
    for name, weight in weights.items():
        floats.graph.initializers[name].const_value = ir.tensor(weight, name=name)
    ir.save(floats, tmp_path / "floats.onnx")
    feed = drawn_feeds()[0]
    assert np.allclose(run(path, feed), run(tmp_path / "floats.onnx", feed), rtol=1e-4, atol=1e-4)
    model = onnx.load(path, load_external_data=False)
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21}
    assert not {"query", "key", "up", "down"} & {tensor.name for tensor in model.graph.initializer}


def test_onnx_runtime_fuses_the_blocks(source: Path, tmp_path: Path) -> None:
    path, _ = quantised(source, tmp_path / "out", 4, drawn_feeds())
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kinds = [entry.op_type for entry in onnx.load(tmp_path / "fused.onnx", load_external_data=False).graph.node]
    assert kinds.count("MatMulNBits") == 4
    assert "DequantizeLinear" not in kinds
    feed = drawn_feeds()[0]
    wanted = run(path, feed)
    assert np.abs(run(path, feed, optimise=True) - wanted).max() < 0.05 * np.abs(wanted).max()


def test_rounding_on_activations_beats_plain_rounding(source: Path, tmp_path: Path) -> None:
    ours, told = quantised(source, tmp_path / "ours", 4, drawn_feeds(16))
    plain, _ = quantised(source, tmp_path / "plain", 4, plain=True)
    fresh = drawn_feeds(17)[-1]
    right = run(source, fresh)
    errors = [float(np.linalg.norm(run(path, fresh) - right)) for path in (ours, plain)]
    assert errors[0] < 0.7 * errors[1]
    assert ours.stat().st_size == plain.stat().st_size
    assert ours.with_name("graph.data").stat().st_size == plain.with_name("graph.data").stat().st_size
    for matrix in told.values():
        assert matrix.error is not None
        assert matrix.plain_error is not None
        assert 0 < matrix.error < matrix.plain_error


def test_plain_rounding_is_what_it_says(source: Path, tmp_path: Path) -> None:
    _, matrices = quantised(source, tmp_path / "plain", 4, plain=True)
    weight = ir.load(source).graph.initializers["up"].const_value
    assert weight is not None
    integers, scales = nearest(weight.numpy(), BlockFormat(4, 16), plain_scales)
    assert np.array_equal(matrices["up"].integers.numpy().astype(np.int8), integers)
    assert np.array_equal(matrices["up"].scales.numpy(), scales)


def test_pieces_give_what_the_whole_graph_gives(source: Path, tmp_path: Path) -> None:
    model = ir.load(source)
    products = find_targets(model).products
    feeds = drawn_feeds(3)
    seen = {name: list(values) for name, values in SegmentRunner(model, products, feeds, threads=1)}
    assert list(seen) == ["x", "s", "r"]
    proto = onnx.load(source)
    for name in ("s", "r"):
        proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for index, feed in enumerate(feeds):
        wanted = dict(zip(("s", "r"), session.run(["s", "r"], feed), strict=True))
        assert np.allclose(seen["s"][index], wanted["s"], atol=1e-5)
        assert np.allclose(seen["r"][index], wanted["r"], atol=1e-5)


def test_a_changed_weight_is_felt_behind_it(source: Path) -> None:
    model = ir.load(source)
    products = find_targets(model).products
    runner = SegmentRunner(model, products, drawn_feeds(1), threads=1)
    for name, values in runner:
        (value,) = values
        if name == "s":
            runner.replace("up", np.zeros((WIDTH, 4 * WIDTH), np.float32))
        if name == "r":
            assert np.all(value == 0.5)  # the sigmoid of nothing


def test_between_pieces_only_what_is_read_later_is_kept(source: Path) -> None:
    model = ir.load(source)
    pieces = cut_graph(ir.to_proto(model).graph, find_targets(model).products)
    assert [piece.activation for piece in pieces] == ["x", "s", "r"]
    assert [piece.outputs for piece in pieces] == [(), ("s",), ("r",)]
    assert [piece.constants for piece in pieces] == [(), ("key", "query"), ("up",)]


def test_a_second_graph_over_the_same_weights_is_changed_alike(source: Path, tmp_path: Path) -> None:
    path, matrices = quantised(source, tmp_path / "out", 4, drawn_feeds())
    second = ir.load(source)
    second.graph.name = "another"
    replace_weights(second, matrices)
    ir.save(second, path.with_name("second.onnx"))
    feed = drawn_feeds()[0]
    assert np.array_equal(run(path, feed), run(path.with_name("second.onnx"), feed))
    write_graph(tmp_path, NODES[:5], dict(zip(("query", "key", "up"), draw_weights(5, *SHAPES), strict=False)), ("u",))
    few = ir.load(tmp_path / "vision_encoder.onnx")
    replace_weights(few, matrices)  # a graph that lacks a matrix is changed as far as it goes
    assert [entry.op_type for entry in few.graph].count("DequantizeLinear") == 3


def test_a_width_that_no_block_divides_is_left(tmp_path: Path) -> None:
    (weight,) = draw_weights(0, (WIDTH, 24))
    (second,) = draw_weights(1, (24, WIDTH))
    nodes = (node("MatMul", ["x", "up"], "u"), node("MatMul", ["u", "down"], "y"))
    write_graph(tmp_path, nodes, {"up": weight, "down": second})
    model = ir.load(tmp_path / "vision_encoder.onnx")
    formats, left = choose_formats(find_targets(model).products, GraphFormat(NumberFormat("int4")))
    assert list(formats) == ["up"]
    assert "24 inputs" in left["down"]


def test_a_half_graph_keeps_its_type(tmp_path: Path) -> None:
    (weight,) = draw_weights(0, (WIDTH, WIDTH))
    write_graph(tmp_path, (node("MatMul", ["x", "w"], "y"),), {"w": weight.astype(np.float16)}, dtype="float16")
    feeds = [{"x": feed["x"].astype(np.float16)} for feed in drawn_feeds()]
    _, matrices = quantised(tmp_path / "vision_encoder.onnx", tmp_path / "out", 4, feeds)
    assert matrices["w"].scales.numpy().dtype == np.float16


def test_the_head_is_asked_for_every_slot() -> None:
    feed: dict[str, Array] = {
        "inputs_embeds": np.zeros((2, 5, 8), np.float32),
        "logits_indices": np.full((2, 1), 4, np.int64),
    }
    assert all_logits(feed)["logits_indices"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert all_logits({"x": np.zeros(3)}).keys() == {"x"}


def test_a_graph_in_memory_leaves_the_parents_weights_where_they_are(source: Path) -> None:
    tensor = ir.load(source).graph.initializers["up"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    assert InMemoryStore().copy("up", tensor) is tensor
    assert np.array_equal(InMemoryStore().add("a", np.ones(2, np.int8)).numpy(), [1, 1])
