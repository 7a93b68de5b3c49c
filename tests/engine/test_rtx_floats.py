"""Engines of every family in fp32 and fp16; see ``rtx.py``."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")
pytest.importorskip("onnxruntime", reason="bundles are checked and calibrated in ONNX Runtime")

from tests.engine.conftest import BundleOf
from tests.engine.families import ONE_QUICK
from tests.engine.rtx import assert_taken_and_built


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("family", ONE_QUICK)
def test_every_graph_is_taken_and_builds(family: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    assert_taken_and_built(family, precision, bundle_of, tmp_path)
