"""What is read from the decoder of a bundle: its layout or the reason why it has none, and the bytes of a step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.calibration.weights.blocks import BLOCKS
from blip2edge.cli import main
from blip2edge.errors import BundleError
from blip2edge.graph_files import load_graph
from blip2edge.optimization.cuda_kernels.layout import layout_of_graph
from blip2edge.optimization.cuda_kernels.of_bundle import layout_of_bundle
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.bench import kernel_steps
from blip2edge.runtime.cuda import copy_files
from blip2edge.runtime.cuda.plan import step_bytes, step_launches
from blip2edge.shapes.model_shape import ModelPart, WeightMatrix
from tests.runtime.cuda.pairs import SLOW
from tests.runtime.cuda.test_backend import compiling


def test_a_four_bit_head_of_odd_width_is_refused_with_the_remedy(bundle_of: Callable[[str, str], Path]) -> None:
    bundle = Bundle.open(bundle_of("opt", "int4"))
    graph, cache = load_graph(bundle.file(f"{DECODER}.onnx")), bundle.manifest.cache
    assert cache is not None
    width = 120
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and width in tensor.shape.numpy():
            shape = ir.Shape([width - 1 if size == width else size for size in tensor.shape.numpy()])
            value.const_value = ir.ExternalTensor(
                tensor.location,
                tensor.offset,
                None,
                tensor.dtype,
                shape=shape,
                name=tensor.name,
                base_dir=tensor.base_dir,
            )
            value.shape = shape
    with pytest.raises(BundleError, match=f"the weight of the head has rows of {width - 1} 4-bit values") as caught:
        layout_of_graph(graph, cache, bundle.manifest.max_positions)
    assert "OPT or Llama kind" not in str(caught.value)
    assert "--format 'decoder:*head*=int8'" in str(caught.value)


EVERY = [("opt", "fp16"), ("llama", "int8"), ("opt", "int4")]
SLOWER = [("llama", "fp16"), ("opt", "int8"), ("llama", "int4")]


@pytest.mark.parametrize(("kind", "precision"), [*EVERY, *(pytest.param(*one, marks=SLOW) for one in SLOWER)])
def test_the_bytes_of_plan_are_those_of_the_layout(
    kind: str, precision: str, bundle_of: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the bundle itself, and of the checkpoint that it was made from."""
    path = bundle_of(kind, precision)
    layout = layout_of_bundle(Bundle.open(path))
    for model in (path, path.parent / kind):
        assert main(["plan", str(model), "--device", "thor", "--json", "--max-new-tokens", "31"]) == 0
        found = json.loads(capsys.readouterr().out)
        context = found["tokens"]["per_item"] + found["tokens"]["prompt"] + 1 + 15
        steps = {step["precision"]: step for step in found["devices"][0]["cuda_decoder"]}
        assert list(steps) == ["fp16", "int8", "int4"]
        wanted = step_bytes(layout, context)
        assert steps[precision]["bytes"] == pytest.approx(wanted, rel=0.01)
        assert steps[precision]["launches"] == step_launches(len(layout.layers))


def test_the_blocks_of_plan_are_those_of_calibrate() -> None:
    assert {"int8": BLOCKS[8], "int4": BLOCKS[4]} == kernel_steps.BLOCKS


def test_odd_columns_and_indivisible_rows_in_the_format_that_has_kernels() -> None:
    head, odd = WeightMatrix("head", 128, 31, "asked"), WeightMatrix("down", 24, 32, "steps")
    assert kernel_steps.held_on_gpu(ModelPart(DECODER, (head,)), "int4") == 128 * 31 * (1 + 2 / 64)
    assert kernel_steps.held_on_gpu(ModelPart(DECODER, (odd,)), "int8") == 24 * 32 * 2


def test_plan_says_why_a_bundle_has_no_prediction(
    bundle_of: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(bundle_of("opt", "fp16")), "--device", "thor"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "cuda-decoder in int4: " in text
    assert "no prediction" not in text
    monkeypatch.setattr("blip2edge.packages.importlib.import_module", absent)
    assert main(words) == 0
    text = capsys.readouterr().out
    assert (
        "cuda-decoder: no prediction for this decoder: reading its graph needs onnx_ir, which is not installed" in text
    )


def test_plan_reads_the_copy_without_onnx(
    bundle_of: Callable[[str, str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As on a board, which has the compiled copy and no onnx-ir."""
    bundle = shutil.copytree(bundle_of("opt", "fp32"), tmp_path / "bundle")
    words = ["plan", str(bundle), "--device", "thor", "--json"]
    assert main(words) == 0
    from_graph = json.loads(capsys.readouterr().out)["devices"][0]["cuda_decoder"]
    compiling(monkeypatch)
    optimize(bundle, "cuda-decoder")
    with monkeypatch.context() as other:
        other.setattr(copy_files, "kernel_sources", lambda: "0" * 64)  # of another version: the graph is read
        assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["cuda_decoder"] == from_graph
    monkeypatch.setattr("blip2edge.packages.importlib.import_module", absent)
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["devices"][0]["cuda_decoder"] == from_graph != []


def absent(name: str) -> None:
    raise ModuleNotFoundError(name, name=name)
