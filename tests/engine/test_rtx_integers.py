"""Engines of every family in INT8 and INT4; see ``rtx.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")
pytest.importorskip("onnxruntime", reason="bundles are checked and calibrated in ONNX Runtime")

from blip2edge.engine.build import build_bundle
from blip2edge.runtime.backends.engine_files import STEP
from tests.engine.conftest import BundleOf
from tests.engine.families import ONE_QUICK
from tests.engine.rtx import CAPACITY, HAS_RTX, SM, assert_taken_and_built


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ONE_QUICK)
def test_every_graph_is_taken_and_builds(family: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    assert_taken_and_built(family, precision, bundle_of, tmp_path)


def test_the_step_builds_on_floats_and_on_a_quantised_table(bundle_of: BundleOf, tmp_path: Path) -> None:
    if not HAS_RTX:
        pytest.skip("TensorRT for RTX is not installed (extra rtx)")
    for precision in ("fp32", "int4"):
        report = build_bundle(
            bundle_of("blip2-opt", precision),
            target="rtx",
            sm=SM,
            output=tmp_path / precision,
            capacity=CAPACITY,
        )
        assert report.engines[STEP].size > 0
        assert not list(report.directory.glob("*.safetensors"))
