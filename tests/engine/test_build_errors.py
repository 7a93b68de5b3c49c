"""A build that TensorRT gives up ends with advice that fits its reason."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import GraphSpec
from blip2edge.engine.build import build_bundle
from blip2edge.engine.build_errors import build_error
from blip2edge.engine.prepare import EnginePlan
from blip2edge.errors import BackendError, EngineError
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE
from tests.engine.conftest import BundleOf

# Reasons that TensorRT for RTX 1.7 gave.
WORKSPACE = (
    "Myelin ([tactic.cpp:1676: enumerate_tactics] Tactic Selection: no tactics to implement the operation within "
    "workspace limit. Consider increase the allowed workspace size if applicable.)"
)
NO_FP32 = "Cannot compile operation 'node_MatMul_12' for Turing (SM75): FP32 GEMM is not supported."

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (extra rtx)"
)


@pytest.mark.parametrize(
    ("reason", "precision", "workspace", "advice"),
    [
        (WORKSPACE, "fp32", 1, "raise workspace above 1, or leave it out"),
        (WORKSPACE, "fp32", None, "lower capacity or max_batch"),
        (NO_FP32, "fp32", None, "export the checkpoint with precision fp16"),
        (NO_FP32, "fp16", None, "no precision changes this"),
        ("Requested amount of GPU memory could not be allocated", "fp32", 64, "lower workspace, capacity or max_batch"),
        ("CUDA error 2: out of memory", "fp32", 64, "lower workspace, capacity or max_batch"),
        ("an illegal memory access was encountered", "fp32", None, "export the checkpoint with another precision"),
        ("an internal assertion failed", "fp32", None, "export the checkpoint with another precision"),
    ],
)
@pytest.mark.parametrize("target", ["tensorrt", "rtx"])
def test_advice_fits_the_reason(reason: str, precision: str, workspace: int | None, advice: str, target: str) -> None:
    plan = EnginePlan("bridge", Path("bridge.onnx"), GraphSpec("bridge", (), ()), precision=precision)
    error = build_error(plan, target, workspace, ["an earlier warning", reason])
    assert error.problem == f"TensorRT could not build bridge.onnx ({reason})"
    assert error.fix is not None
    assert error.fix.startswith(advice)
    assert target == "rtx" or "target tensorrt" not in error.fix  # it is the target already


def test_a_decoder_that_cannot_update_its_cache_in_place_gets_the_other_form() -> None:
    reason = "MyelinCheckException: Attention operation was not supported by a dedicated kernel."
    for form, advice in ((IN_PLACE, "build with decoder constant"), (CONSTANT, "export the checkpoint with another")):
        plan = EnginePlan("decoder", Path("decoder.onnx"), GraphSpec("decoder", (), ()), form=form)
        assert str(build_error(plan, "rtx", None, [reason]).fix).startswith(advice)


@needs_rtx
@pytest.mark.parametrize(
    ("family", "precision", "sm", "workspace", "advice"),
    [
        ("blip2-opt", "fp32", 86, 1, "raise workspace above 1"),
        ("blip2-opt", "fp32", 75, None, "export the checkpoint with precision fp16"),
        pytest.param(
            *("blip2-t5", "fp32", 75, None, "a model with a T5 keeps parts in FP32 at every precision"),
            marks=pytest.mark.slow,
        ),
        ("blip2-t5", "fp16", 75, None, "no precision changes this"),
    ],
)
def test_advice_of_real_builds(
    bundle_of: BundleOf, tmp_path: Path, family: str, precision: str, sm: int, workspace: int | None, advice: str
) -> None:
    with pytest.raises(EngineError, match=advice):
        build_bundle(
            bundle_of(family, precision), target="rtx", sm=[sm], workspace=workspace, output=tmp_path / "engines"
        )
    assert not (tmp_path / "engines").exists()


@needs_rtx
def test_advice_can_be_followed(bundle_of: BundleOf, tmp_path: Path) -> None:
    """The fp16 bundle of a model without parts in fp32 builds for Turing."""
    build_bundle(bundle_of("blip2-opt", "fp16"), target="rtx", sm=[75], output=tmp_path / "engines")
    assert (tmp_path / "engines").is_dir()


def test_bf16_is_refused_before_the_build(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bf16"))
    replace(Bundle.open(bundle).manifest, precision="bf16").write(bundle)
    with pytest.raises(BackendError, match="the bundle is in bf16, which the backend rtx does not run"):
        build_bundle(bundle, target="rtx", sm=[86])
