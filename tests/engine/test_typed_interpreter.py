"""Engine graphs with every value in its declared type, compared with ONNX Runtime; see ``typed_interpreter.py``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")
pytest.importorskip("onnxruntime", reason="graphs are compared with ONNX Runtime")

import onnx_ir as ir
import onnxruntime
import torch

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.manifest import GraphRecord
from blip2edge.bundle.schema import DECODER, VISION
from blip2edge.calibration.pipeline import calibrate
from blip2edge.engine.prepare import EnginePlan
from blip2edge.export import precision as precisions
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.export.verify import TOLERANCES
from tests.drafted import add_draft
from tests.drawing import Drawn, draw_pictures
from tests.engine.conftest import BundleOf
from tests.engine.families import ONE_QUICK
from tests.engine.rtx import plans
from tests.engine.typed_interpreter import (
    Comparison,
    TypedGraphError,
    cases_of_plan,
    compare,
    difference,
    in_fp32,
    in_onnxruntime,
    main,
    run,
    with_dense_table,
)

FP32 = 1e-5
"""Of an output's largest value; the largest seen is 8.4e-6, in MiniGPT-4's bridge."""

ONE_STEP = 1 / 64
"""Of an output's largest value, where activations are rounded to INT8.

Sums in another order differ by 1e-6. A value so close to the middle between two integers is rounded to the other one,
which is 1/127 of its tensor's largest value. The largest seen is 7.1e-3.
"""


def compared(
    path: Path, directory: Path, reference: Path | None = None, half_sums: bool = False
) -> Iterator[tuple[EnginePlan, Comparison]]:
    """Every engine of a bundle, with its differences to the same graph of another bundle in ONNX Runtime.

    Without ``reference``, the graph itself with all floats in FP32 is the reference.
    """
    bundle = Bundle.open(path)
    others = plans(Bundle.open(reference or path))
    for planned, other in zip(plans(bundle), others, strict=True):
        plan = with_dense_table(planned, directory)
        expected = with_dense_table(other, directory) if reference else plan
        cases = cases_of_plan(bundle, plan)
        yield plan, compare(plan.model(), cases, in_onnxruntime(in_fp32(expected.model()), cases), half_sums)


def tolerance(record: GraphRecord, output: str) -> float:
    """The tolerance that the manifest holds for an output; keys of all layers share one, and so do values."""
    parts = output.split(".")
    known = {parity.output: parity.tolerance for parity in record.parity}
    return known[output] if output in known else known[f"{parts[0]}.{parts[-1]}"]


@pytest.mark.parametrize("family", ONE_QUICK)
def test_fp32_equals_onnxruntime(family: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    for plan, found in compared(bundle_of(family), tmp_path):
        assert found.finite, plan.name
        assert found.largest <= FP32, (plan.name, found.differences)


@pytest.mark.parametrize("half_sums", [False, True])
@pytest.mark.parametrize("family", ONE_QUICK)
def test_fp16_is_within_the_tolerance_of_the_manifest(
    family: str, half_sums: bool, bundle_of: BundleOf, tmp_path: Path
) -> None:
    path = bundle_of(family, "fp16")
    records = Bundle.open(path).manifest.graphs
    for plan, found in compared(path, tmp_path, bundle_of(family), half_sums):
        assert found.finite, (plan.name, found.peak)
        assert found.peak[0] > 0
        if plan.step is not None:  # the same ids, and the rows of a table in fp16
            assert found.largest <= 2**-11, found.differences
            continue
        for output, off in found.differences.items():
            assert off <= tolerance(records[plan.name], output), (plan.name, output, off)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ONE_QUICK)
def test_integers_equal_onnxruntime(family: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """Q/DQ nodes and block scales; where only weights are rounded, as exactly as in FP32."""
    for plan, found in compared(bundle_of(family, precision), tmp_path):
        rounded = "QuantizeLinear" in {node.op_type for node in plan.model().graph}
        assert found.finite, plan.name
        assert found.largest <= (ONE_STEP if rounded else FP32), (plan.name, found.differences)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["blip2-opt", "blip2-t5", "instructblip"])
def test_integers_in_fp16(family: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """INT8 vision encoder and bridge, INT4 language model, all else in fp16: the usual bundle of a board.

    Where activations are rounded to INT8, a difference in the last fp16 digit may round to the next integer: there the
    limit is half of what the rounding to INT8 itself changes.
    """
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    draw_pictures(1)[0].save(pictures / "0.png")
    path = calibrate(bundle_of(family, "fp16"), tmp_path / "int4", images=pictures, threads=1, weights="int4").bundle
    exact = {plan.name: plan for plan in plans(Bundle.open(bundle_of(family)))}
    for plan, found in compared(path, tmp_path):
        most, model = TOLERANCES["fp16"], plan.model()
        if "QuantizeLinear" in {node.op_type for node in model.graph}:
            cases = cases_of_plan(Bundle.open(path), plan)
            most = compare(in_fp32(model), cases, in_onnxruntime(exact[plan.name].model(), cases)).largest / 2
        assert found.finite, (plan.name, found.peak)
        assert found.largest <= most, (plan.name, found.differences)


@pytest.mark.slow
def test_a_draft_model_and_merged_patches(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    merged = export_checkpoint(tiny_checkpoint.directory, tmp_path / "merged", merge_tokens=3).bundle
    kinds = {node.op_type for plan in plans(Bundle.open(merged)) for node in plan.model().graph}
    assert {"TopK", "GatherElements", "ReduceL2"} <= kinds
    for plan, found in compared(merged, tmp_path):
        assert found.finite
        assert found.largest <= FP32, (plan.name, found.differences)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in tiny_checkpoint.directory.iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    add_draft(checkpoint)
    for precision, most in (("fp32", FP32), ("fp16", TOLERANCES["fp16"])):
        names = []
        drafted = export_checkpoint(checkpoint, tmp_path / precision, precision=precision).bundle
        for plan, found in compared(drafted, tmp_path):
            names.append(plan.name)
            assert found.finite
            assert found.largest <= most, (plan.name, found.differences)
        assert "draft" in names


def graph_of(nodes: list[ir.Node], inputs: list[ir.Value], opset: int = 18) -> ir.Model:
    """A graph of some nodes; its outputs are those of the last one."""
    outputs = list(nodes[-1].outputs)
    for index, output in enumerate(outputs):
        output.name = f"out_{index}"
    return ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": opset}, name="g"), ir_version=10)


def value(name: str, kind: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape(shape))


def overflowing() -> tuple[ir.Model, dict[str, Array]]:
    """A product of 262144 in fp16, which a later node scales back to 4096."""
    left, right, scale = (value(name, ir.DataType.FLOAT16, (64, 64)) for name in ("left", "right", "scale"))
    product = ir.node("MatMul", [left, right], name="product")
    scaled = ir.node("Mul", [product.outputs[0], scale])
    for node in (product, scaled):
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT16, ir.Shape((64, 64))
    product.outputs[0].name = "product"
    whole = np.full((64, 64), 64, np.float32)
    return graph_of([product, scaled], [left, right, scale]), {"left": whole, "right": whole, "scale": whole / 4096}


def test_an_overflow_is_found_that_onnxruntime_hides(tmp_path: Path) -> None:
    model, inputs = overflowing()
    ir.save(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    halves = {name: array.astype(np.float16) for name, array in inputs.items()}
    assert (session.run(None, halves)[0] == 4096).all()
    assert (in_onnxruntime(overflowing()[0], [inputs])[0]["out_0"] == 4096).all()
    assert run(model, inputs)["out_0"].isinf().all()
    found = compare(model, [inputs], in_onnxruntime(in_fp32(overflowing()[0]), [inputs]))
    assert not found.finite
    assert found.largest == float("inf")
    assert found.peak == (float("inf"), "product")
    opposed = {**inputs, "right": np.repeat(np.array([64, -64], np.float32), 32)[:, None].repeat(64, 1)}
    assert (run(model, opposed)["out_0"] == 0).all()
    assert not run(model, opposed, half_sums=True)["out_0"].isfinite().any()
    in_bf16 = overflowing()[0]
    for item in [*in_bf16.graph.inputs, *(node.outputs[0] for node in in_bf16.graph)]:
        item.dtype = ir.DataType.BFLOAT16
    assert (run(in_bf16, inputs)["out_0"] == 4096).all()


@pytest.mark.slow
def test_t5_overflows_without_its_exceptions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feed-forward outputs beyond 65504, as in Flan-T5: the export's check passes, since ONNX Runtime hides them."""
    from tests.families import test_t5

    model = test_t5.draw(0, tmp_path / "checkpoint", **test_t5.KINDS[0])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter.mul_(3000)
    model.save_pretrained(tmp_path / "checkpoint")
    mended = export_checkpoint(tmp_path / "checkpoint", tmp_path / "mended", precision="fp16").bundle
    for plan, found in compared(mended, tmp_path):
        assert found.finite, (plan.name, found.peak)
        assert found.largest <= TOLERANCES["fp16"]
    rules = precisions.BY_LANGUAGE["t5"]
    monkeypatch.setitem(precisions.BY_LANGUAGE, "t5", tuple(rule for rule in rules if rule.op_type == "GatherElements"))
    broken = export_checkpoint(tmp_path / "checkpoint", tmp_path / "broken", precision="fp16").bundle
    hidden = {name: max(parity.relative for parity in record.parity) for name, record in graphs_of(broken)}
    shown = {plan.name: found for plan, found in compared(broken, tmp_path)}
    for name in ("text_encoder", DECODER):
        assert hidden[name] <= TOLERANCES["fp16"]
        assert not shown[name].finite
        assert shown[name].largest == float("inf")
    assert shown[VISION].finite


def graphs_of(path: Path) -> list[tuple[str, GraphRecord]]:
    return list(Bundle.open(path).manifest.graphs.items())


def decoder_of(path: Path) -> tuple[Bundle, EnginePlan, ir.Model]:
    bundle = Bundle.open(path)
    plan = next(plan for plan in plans(bundle) if plan.name == DECODER)
    return bundle, plan, plan.model()


def first(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def test_a_wrong_cast_is_found(bundle_of: BundleOf) -> None:
    bundle, plan, model = decoder_of(bundle_of("blip2-opt", "fp16"))
    inputs = cases_of_plan(bundle, plan)[0]
    cast = first(model, "Softmax").inputs[0]
    assert cast is not None
    producer = cast.producer()
    assert producer is not None
    producer.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))
    with pytest.raises(TypedGraphError, match="declared as FLOAT, but is FLOAT16"):
        run(model, inputs)
    _, _, model = decoder_of(bundle_of("blip2-opt", "fp16"))
    weight = first(model, "MatMul").inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy().astype(np.float32), name=weight.name)
    with pytest.raises(TypedGraphError, match=r"\(MatMul\): its inputs are FLOAT and FLOAT16; one type is needed"):
        run(model, inputs)


@pytest.mark.parametrize("at", [0, -1])
def test_a_missing_scale_is_found(at: int, bundle_of: BundleOf) -> None:
    """The scale of one weight is replaced by one."""
    bundle, plan, model = decoder_of(bundle_of("blip2-opt", "int4"))
    cases = cases_of_plan(bundle, plan)
    references = in_onnxruntime(plan.model(), cases)
    assert compare(model, cases, references).largest <= FP32
    scale = [node for node in model.graph if node.op_type == "DequantizeLinear"][at].inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    scale.const_value = ir.tensor(np.ones_like(scale.const_value.numpy()), name=scale.name)
    assert compare(model, cases, references).largest > 0.1


def test_unknown_operators_are_named() -> None:
    def graph(operator: str, domain: str = "", kind: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
        given = value("x", kind, (2,))
        return graph_of([ir.node(operator, [given], domain=domain, name="this")], [given])

    inputs = {"x": np.ones(2, np.float32)}
    with pytest.raises(TypedGraphError, match=r"this \(Mish\): the operator ai\.onnx::Mish is unknown"):
        run(graph("Mish"), inputs)
    with pytest.raises(TypedGraphError, match=r"com\.microsoft::Abs is unknown"):
        run(graph("Abs", "com.microsoft"), inputs)
    with pytest.raises(TypedGraphError, match=r"the input x is INT64, got torch\.float32"):
        run(graph("Abs", kind=ir.DataType.INT64), inputs)


def floats(*shape: int) -> Array:
    drawn: Array = np.random.default_rng(7).normal(0, 2, shape).astype(np.float32)
    return drawn


def integers(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


MASK = np.arange(30).reshape(2, 1, 3, 5) % 4 != 1

NODES: dict[str, tuple[str, list[Array], dict[str, Any], int]] = {
    "sum of an axis": ("ReduceSum", [floats(2, 3, 4), integers(-1)], {"keepdims": 0}, 1),
    "mean of all": ("ReduceMean", [floats(2, 3, 4)], {}, 1),
    "no axes, no reduction": ("ReduceSum", [floats(2, 3)], {"noop_with_empty_axes": 1}, 1),
    "slice": ("Slice", [floats(5, 6), integers(-1, 1), integers(-99, 99), integers(0, 1), integers(-2, 3)], {}, 1),
    "slice without axes": ("Slice", [floats(5, 6), integers(1, -3), integers(9, -1)], {}, 1),
    "uneven split": ("Split", [floats(2, 7)], {"axis": 1, "num_outputs": 3}, 3),
    "given split": ("Split", [floats(2, 7), integers(5, 2)], {"axis": -1}, 2),
    "largest, with ties": ("TopK", [np.array([[1, 3, 3, 0, 3]], np.float32), integers(3)], {}, 2),
    "smallest": ("TopK", [floats(3, 5), integers(2)], {"axis": 0, "largest": 0}, 2),
    "first maximum": ("ArgMax", [np.array([[1, 3, 3], [2, 2, 0]], np.float32)], {"axis": 1}, 1),
    "reversed sum": ("CumSum", [floats(3, 4), np.array(1, np.int64)], {"reverse": 1, "exclusive": 1}, 1),
    "negative indices": ("Gather", [floats(4, 3), integers(-1, 0, 2)], {"axis": 0}, 1),
    "scattered": ("ScatterElements", [floats(2, 5), integers(1, -1).reshape(2, 1), floats(2, 1)], {"axis": 1}, 1),
    "copied size": ("Reshape", [floats(2, 3, 4), integers(0, -1)], {}, 1),
    "truncated division": ("Div", [integers(-7, 7, 5), integers(2, -2, 2)], {}, 1),
    "truncated cast": ("Cast", [np.array([-1.7, 1.7, 0.2], np.float32)], {"to": 7}, 1),
    "padded convolution": ("Conv", [floats(1, 4, 7, 7), floats(6, 2, 3, 3)], {"pads": [1, 0, 2, 1], "group": 2}, 1),
    "wide convolution": ("Conv", [floats(1, 2, 9), floats(3, 2, 3)], {"strides": [2], "dilations": [2]}, 1),
    "turned product": ("Gemm", [floats(3, 2), floats(4, 3), floats(4)], {"transA": 1, "transB": 1, "alpha": 0.5}, 1),
    "norm of two axes": ("LayerNormalization", [floats(2, 3, 4), floats(3, 4), floats(3, 4)], {"axis": 1}, 1),
    "lower bound": ("Clip", [floats(9), np.array(-0.5, np.float32)], {}, 1),
    "attention": ("Attention", [floats(2, 4, 3, 8), floats(2, 2, 5, 8), floats(2, 2, 5, 8), MASK], {"scale": 0.3}, 1),
    "causal attention": ("Attention", [floats(1, 2, 4, 8)] * 3, {"is_causal": 1}, 1),
    "cache": ("TensorScatter", [floats(2, 3, 9, 4), floats(2, 3, 2, 4), integers(7, 0)], {"axis": -2}, 1),
    "several inputs": ("Max", [floats(3, 4), floats(4), floats(3, 1)], {}, 1),
}


@pytest.mark.parametrize("name", NODES)
def test_an_operator_is_that_of_onnxruntime(name: str) -> None:
    operator, arrays, attributes, count = NODES[name]
    inputs = {f"in_{index}": array for index, array in enumerate(arrays)}
    given = [value(key, ir.DataType.from_numpy(array.dtype), array.shape) for key, array in inputs.items()]
    node = ir.node(operator, given, attributes=attributes, num_outputs=count)
    model = graph_of([node], given, 24 if operator in ("Attention", "TensorScatter") else 18)
    got = run(model, inputs)
    for index, output in enumerate(node.outputs):
        computed = {torch.float32: ir.DataType.FLOAT, torch.int64: ir.DataType.INT64}[got[f"out_{index}"].dtype]
        output.dtype = computed
    for key, expected in in_onnxruntime(model, [inputs])[0].items():
        assert got[key].shape == expected.shape
        assert difference(got[key], expected) <= 1e-6, key


def test_integers_are_rounded_half_to_even_and_saturate() -> None:
    numbers = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 99, 900, -900], np.float32)
    expected = {
        ir.DataType.INT8: [0, 2, 2, 0, -2, 99, 127, -128],
        ir.DataType.INT4: [0, 2, 2, 0, -2, 7, 7, -8],
        ir.DataType.UINT8: [0, 2, 2, 0, 0, 99, 255, 0],
    }
    for kind, wanted in expected.items():
        x, scale, zero = value("x", ir.DataType.FLOAT, (8,)), value("s", ir.DataType.FLOAT, ()), value("z", kind, ())
        zero.const_value = ir.tensor([0], dtype=kind, name="z")
        quantized = ir.node("QuantizeLinear", [x, scale, zero])
        got = run(graph_of([quantized], [x, scale], 21), {"x": numbers, "s": np.array(1, np.float32)})
        assert got["out_0"].tolist() == wanted


def dequantized(kind: ir.DataType, axis: int, block: int, scale: list[Any], zero: list[int] | None) -> torch.Tensor:
    """``[[1, 2], [3, 4], [5, 6]]`` in INT8 as floats of type ``kind``."""
    scales = np.array(scale, np.float32)
    given = [value("x", ir.DataType.INT8, (3, 2)), value("s", kind, scales.shape)]
    inputs: dict[str, Array] = {"x": np.array([[1, 2], [3, 4], [5, 6]], np.int8), "s": scales}
    if zero is not None:
        given.append(value("z", ir.DataType.INT8, (len(zero),)))
        inputs["z"] = np.array(zero, np.int8)
    attributes = {"axis": axis, "block_size": block} if block else {"axis": axis}
    return run(graph_of([ir.node("DequantizeLinear", given, attributes=attributes)], given, 21), inputs)["out_0"]


def test_blocks_have_their_own_scales() -> None:
    """Blocks of 2 along axis 0, of which the last one is half full; then columns with zero points."""
    got = dequantized(ir.DataType.FLOAT16, 0, 2, [[1, 10], [100, 20000]], None)
    assert got.dtype == torch.float16
    assert got.tolist() == [[1, 20], [3, 40], [500, float("inf")]]
    got = dequantized(ir.DataType.FLOAT, 1, 0, [0.5, 2], [1, -1])
    assert got.tolist() == [[0, 6], [1, 10], [2, 14]]


def test_the_table_of_a_bundle(
    bundle_of: BundleOf, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["typed_interpreter", str(bundle_of("blip2-opt", "fp16"))])
    main()
    lines = [line.rsplit(maxsplit=6) for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[0] for line in lines] == ["vision_encoder", "bridge", "decoder", "step", "decoder (grows)"]
    for _, precision, nodes, off, finite, peak, _ in lines:
        assert (precision, finite) == ("fp16", "yes")
        assert int(nodes) >= 5
        assert float(off) <= TOLERANCES["fp16"]
        assert 0 < float(peak) < 65504
