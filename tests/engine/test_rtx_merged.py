"""A vision encoder that merges patches: operators of each TensorRT, and builds with TensorRT for RTX."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")
pytest.importorskip("onnxruntime", reason="bundles are checked and calibrated in ONNX Runtime")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import VISION
from blip2edge.calibration.pipeline import calibrate
from blip2edge.engine.builder import BuildOptions, build_engine
from blip2edge.engine.operators import VERSIONS
from blip2edge.engine.prepare import plans_of
from blip2edge.engine.support import check_graph
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.tensorrt.session import load_tensorrt
from tests.drawing import Drawn, draw_pictures
from tests.engine.rtx import HAS_RTX, SM


def assert_taken_and_built(bundle: Path, directory: Path) -> None:
    plan = next(plan for plan in plans_of(Bundle.open(bundle), VERSIONS["rtx"]) if plan.name == VISION)
    kinds = {node.op_type for node in plan.model().graph}
    assert {"TopK", "ArgMax", "GatherElements"} <= kinds
    for name, version in VERSIONS.items():
        assert check_graph(plan.model(), version) == [], name
    if HAS_RTX:
        file = directory / f"{bundle.name}.engine"
        assert build_engine(load_tensorrt("rtx"), plan, VERSIONS["rtx"], file, BuildOptions("rtx", SM)).size > 0


@pytest.mark.slow
def test_a_graph_that_merges_patches_is_taken_and_builds(tiny_checkpoint: Drawn, tmp_path: Path) -> None:
    parent = export_checkpoint(tiny_checkpoint.directory, tmp_path / "fp16", precision="fp16", merge_tokens=3).bundle
    assert_taken_and_built(parent, tmp_path)
    images = tmp_path / "images"
    images.mkdir()
    for index, picture in enumerate(draw_pictures(4)):
        picture.save(images / f"{index}.png")
    int8 = calibrate(parent, tmp_path / "int8", images=images, threads=1).bundle
    assert Bundle.open(int8).graph(VISION).precision == "int8"
    assert_taken_and_built(int8, tmp_path)
    if not HAS_RTX:
        pytest.skip("checked, not built: TensorRT for RTX is not installed (extra rtx)")
