"""Checks the graphs of every family and precision: operators of each TensorRT, and builds with TensorRT for RTX.

Engines are built but not run, because the tests run without a GPU. Both forms of the decoder are built, with past
length 0 (prefill).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.engine.builder import BuildOptions, build_engine
from blip2edge.engine.operators import VERSIONS
from blip2edge.engine.prepare import EnginePlan, plans_of
from blip2edge.engine.support import check_graph
from blip2edge.runtime.tensorrt.session import load_tensorrt
from tests.engine.conftest import BundleOf

HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None
SM = (86, 89)
CAPACITY = 32


def plans(bundle: Bundle) -> list[EnginePlan]:
    """Every engine, the decoder in both forms that every version takes."""
    rtx = VERSIONS["rtx"]
    grows = [plan for plan in plans_of(bundle, rtx, decoder="concatenated") if plan.name == DECODER]
    return [*plans_of(bundle, rtx, capacity=CAPACITY), *grows]


def assert_taken_and_built(family: str, precision: str, bundle_of: BundleOf, directory: Path) -> None:
    """Checks every engine of a bundle against every version's documentation, and builds it where RTX is there."""
    bundle = Bundle.open(bundle_of(family, precision))
    for plan in plans(bundle):
        if plan.step is not None:
            continue
        for name, version in VERSIONS.items():
            if name != "rtx" and has_int8_blocks(bundle, plan):
                continue
            assert check_graph(plan.model(), version) == [], (plan.name, name)
        if not HAS_RTX or (precision == "int4" and bundle.graph(plan.name).precision == "int8"):
            continue  # the latter are the graphs of the INT8 bundle
        file = directory / f"{plan.name}.engine"
        built = build_engine(load_tensorrt("rtx"), plan, VERSIONS["rtx"], file, BuildOptions("rtx", SM))
        assert built.size == file.stat().st_size > 0
        if plan.name == DECODER:
            assert built.profiles == ("prefill", "decode", "verify")
            assert built.asked.get(asked_of(family, precision), 0) > 0
    if not HAS_RTX:
        pytest.skip("checked, not built: TensorRT for RTX is not installed (extra rtx)")


def has_int8_blocks(bundle: Bundle, plan: EnginePlan) -> bool:
    """Block INT8 weights are for ONNX Runtime and RTX: calibrate says so, and the check refuses them elsewhere."""
    return bundle.graph(plan.name).precision == "int8-weights"


def asked_of(family: str, precision: str) -> str:
    """The precision that most products of a family's decoder are in; blocks of 32 do not fit BLIP's tiny width."""
    if family == "blip" and precision == "int4":
        return "fp32"
    return {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4 weights"}[precision]
