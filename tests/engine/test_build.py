"""Profiles, fingerprints and, if TensorRT for RTX is installed, engines of the tiny bundle without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir", reason="graphs are read with onnx_ir")

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, Axis, GraphSpec, TensorSpec
from blip2edge.bundle.trust.integrity import CheckedFiles
from blip2edge.cli import main
from blip2edge.engine import build, builder
from blip2edge.engine.build import build_bundle
from blip2edge.engine.builder import BuildOptions, BuiltEngine, build_engine
from blip2edge.engine.layers import count_precisions
from blip2edge.engine.operators import VERSIONS
from blip2edge.engine.prepare import EnginePlan
from blip2edge.engine.profiles import profiles_of, with_rows
from blip2edge.errors import EngineError, OutputError, UsageError
from blip2edge.runtime.backends.engine_files import (
    CONSTANT,
    IN_PLACE,
    RECORD,
    EngineSet,
    Fingerprint,
    check_fingerprint,
    fingerprint,
)
from blip2edge.runtime.backends.probe import Driver, Gpu
from blip2edge.runtime.bench.memory import MachineMemory
from blip2edge.runtime.tensorrt.session import load_tensorrt

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (extra rtx)"
)
no_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here")


def decoder_spec(longest: int = 64) -> GraphSpec:
    batch, past, steps = (
        Axis("batch", 1, 1, 8),
        Axis("past", 0, min(32, longest - 1), longest - 1),
        Axis("steps", 1, 1, longest),
    )
    return GraphSpec(
        DECODER,
        (
            TensorSpec("inputs_embeds", "float16", (batch, steps, 32)),
            TensorSpec("attention_mask", "int64", (batch, past + steps)),
            TensorSpec("past_key_values.0.key", "float16", (batch, 4, past, 8)),
        ),
        (),
    )


def test_a_decoder_has_a_profile_for_each_use() -> None:
    shapes = {profile.name: profile.shapes(decoder_spec()) for profile in profiles_of(decoder_spec())}
    assert list(shapes) == ["prefill", "decode", "verify"]
    assert shapes["prefill"]["past_key_values.0.key"] == ((1, 4, 0, 8), (1, 4, 0, 8), (8, 4, 0, 8))
    assert shapes["decode"]["inputs_embeds"] == ((1, 1, 32), (1, 1, 32), (8, 1, 32))
    low, best, high = shapes["verify"]["attention_mask"]
    assert (low, best, high) == ((1, 3), (1, 63 + 4), (8, 63 + 16))


def test_profiles_stay_within_the_graphs_axes() -> None:
    spec = decoder_spec(longest=8)
    for profile in profiles_of(spec):
        for name, axis in spec.axes().items():
            low, best, high = profile.ranges[name]
            assert axis.min <= low <= best <= high <= axis.max


def test_a_prefill_is_tuned_for_the_prompt_that_the_model_reads() -> None:
    """LLaVA's 576 patches: kernels for 40 tokens would be the wrong ones."""
    shapes = {profile.name: profile for profile in profiles_of(decoder_spec(longest=2048), prompt=592)}
    assert shapes["prefill"].ranges["steps"] == (1, 592, 2048)
    assert shapes["decode"].ranges["steps"] == (1, 1, 1)


def test_more_rows_for_more_beams() -> None:
    spec = with_rows(decoder_spec(), 20)
    assert spec.axes()["batch"] == Axis("batch", 1, 1, 20)
    assert with_rows(spec, None) is spec


def test_without_a_gpu_and_without_sm_the_error_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blip2edge.runtime.backends.probe.nvidia_driver", Driver)
    with pytest.raises(EngineError, match="target rtx sm 86"):
        fingerprint("tensorrt", "10.3.0", "a" * 64, ())


def test_boards_of_one_name_have_engines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """AGX Orin and Orin Nano: the same name and compute capability; the numbers come from the driver."""
    found = []
    for gpu in (Gpu("Orin", 87, 16, 61), Gpu("Orin", 87, 8, 7)):
        monkeypatch.setattr("blip2edge.runtime.backends.probe.nvidia_driver", lambda gpu=gpu: Driver("12.6", (gpu,)))
        found.append(fingerprint("tensorrt", "10.3.0", "a" * 64, ()))
    assert [(one.multiprocessors, one.memory_gib) for one in found] == [(16, 61), (8, 7)]
    assert len({one.name for one in found}) == 2
    with pytest.raises(EngineError, match="the number of multiprocessors 16"):
        check(*found)


def mark(**changes: object) -> Fingerprint:
    values: dict[str, object] = {
        "target": "tensorrt",
        "tensorrt": "10.3.0",
        "gpus": ("sm87",),
        "gpu": "Orin",
        "multiprocessors": 16,
        "memory_gib": 62,
        "driver": "12.6",
        "machine": "aarch64",
        "bundle_sha256": "a" * 64,
    }
    return Fingerprint(**{**values, **changes})  # type: ignore[arg-type]


def check(found: Fingerprint, here: Fingerprint) -> None:
    rebuild = "blip2edge build bundle --target tensorrt"
    check_fingerprint(found.to_json(), here, Path("bundle/engines/x"), rebuild)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tensorrt": "10.13.3"}, "TensorRT 10.3.0, but TensorRT here is 10.13.3"),
        ({"gpus": ("sm86",)}, "compute capability sm87, but the compute capability here is sm86"),
        ({"gpu": "Orin Nano"}, "GPU Orin, but the GPU here is Orin Nano"),
        ({"multiprocessors": 8}, "the number of multiprocessors 16, but the number of multiprocessors here is 8"),
        ({"memory_gib": 7}, "the GPU's memory in GiB 62, but the GPU's memory in GiB here is 7"),
        ({"bundle_sha256": "b" * 64}, "the bundle a"),
        ({"machine": "x86_64"}, "the processor architecture aarch64"),
    ],
)
def test_another_machine_is_refused_with_the_command_that_builds_again(changes: dict[str, object], told: str) -> None:
    check(mark(), mark())
    with pytest.raises(EngineError, match=f"{told}.*build the engines again: blip2edge build bundle --target tensorrt"):
        check(mark(), mark(**changes))


def test_compatible_engines_run_on_what_they_were_made_for() -> None:
    built = mark(version_compatible=True)
    check(built, mark(tensorrt="10.13.3"))
    for other in ("11.0.0", "10.1.0"):
        with pytest.raises(EngineError, match="TensorRT"):
            check(built, mark(tensorrt=other))
    anywhere = mark(hardware_compatible=True, gpus=("sm86",), gpu="RTX 3090")
    check(anywhere, mark(gpus=("sm89",), gpu="RTX 4090"))
    with pytest.raises(EngineError, match="sm75"):
        check(anywhere, mark(gpus=("sm75",), gpu="T4"))


def test_rtx_engines_serve_every_gpu_that_they_name() -> None:
    built = mark(target="rtx", gpus=("sm86", "sm89"), gpu="")
    check(built, mark(target="rtx", gpus=("sm89",), gpu="RTX 4090"))
    with pytest.raises(EngineError, match="compute capability"):
        check(built, mark(target="rtx", gpus=("sm120",), gpu="RTX 5090"))


@no_tensorrt
def test_an_absent_tensorrt_is_an_answer(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"blip2edge\[tensorrt\].*--system-site-packages"):
        build_bundle(tiny_bundle)


def test_what_reads_graphs_is_asked_for_by_its_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a board `[export]` would bring torch."""
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    assert main(["build", "bundle"]) == 1
    assert "onnx_ir, which is not installed; install it: pip install 'blip2edge[build]'" in capsys.readouterr().err


def test_jetpack_6_0_is_told_to_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    old = type("trt", (), {"__version__": "8.6.2"})
    monkeypatch.setattr("importlib.import_module", lambda name: old)
    with pytest.raises(EngineError, match=r"expected TensorRT 10\.3 or newer, got 8\.6\.2; upgrade to JetPack 6\.1"):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sm": (86,)}, "target rtx"),
        ({"target": "lite"}, "expected target to be one of"),
        ({"target": "rtx", "version_compatible": True}, "version_compatible=True requires target tensorrt"),
        ({"target": "rtx", "timing_cache": Path("x")}, "timing_cache requires"),
        ({"capacity": 1}, "capacity must be at least 2"),
        ({"decoder": "other"}, "expected decoder to be one of auto, in-place, constant, concatenated"),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        BuildOptions(**options)


def test_a_jetson_offers_no_hardware_compatibility(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(builder, "JETSON", tmp_path)
    with pytest.raises(UsageError, match="not available on a Jetson"):
        BuildOptions(hardware_compatible=True)


def test_the_flags_that_build_the_same_again() -> None:
    options = BuildOptions("rtx", (86, 89), workspace=512, capacity=300, max_batch=20, decoder="concatenated")
    words = "--sm 86 --sm 89 --workspace 512 --capacity 300 --max-batch 20 --decoder concatenated"
    assert " ".join(options.flags()) == words
    assert BuildOptions(version_compatible=True).flags() == ("--version-compatible",)
    assert BuildOptions(decoder="constant").flags() == ("--decoder", "constant")


def test_layers_are_counted_by_what_they_read() -> None:
    def layer(kind: str) -> dict[str, Any]:
        return {"Name": "a", "Inputs": [{"Name": "x", "Format/Datatype": kind}], "Outputs": []}

    kinds = [
        "Int8 NC/32HW32",
        "Row major Int8 format",
        "Row major linear FP16 format",
        "Row major linear BFloat16",
        "Row major linear FP32",
        "Row major Int64 format",
    ]
    document = {"Layers": [*map(layer, kinds), "only a name"]}
    assert count_precisions(json.dumps(document)) == {
        "int8": 2,
        "fp16": 1,
        "bf16": 1,
        "fp32": 1,
        "integers": 1,
        "unknown": 1,
    }


@needs_rtx
def test_engines_build_without_a_gpu(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A bundle of engines alone, the warning that memory is short, and what stands in engine.json."""
    monkeypatch.setattr(build, "machine_memory", lambda: MachineMemory(100 << 20, 64 << 30))
    output = tmp_path / "board"
    words = ["build", str(tiny_bundle), "--target", "rtx", "--sm", "86", "--sm", "89", "--workspace", "256"]
    assert main([*words, "-o", str(output)]) == 0
    said = capsys.readouterr()
    assert "may need about" in said.err
    assert "GB of memory, and 0.1 GB are free; lower the workspace" in said.err
    assert "built without a GPU, not run yet" in said.out
    board = Bundle.open(output)
    assert board.sha256 == Bundle.open(tiny_bundle).sha256
    assert not list(output.glob("*.onnx*"))
    assert (output / "tokenizer.json").is_file()
    (record,) = output.glob(f"engines/*/{RECORD}")
    written = EngineSet.read(record.parent)
    assert written.fingerprint["gpus"] == ["sm86", "sm89"]
    assert set(written.engines) == {*board.manifest.graphs, "step"}
    assert written.engines[DECODER].profiles == ("prefill", "decode", "verify")
    assert written.capacity == board.manifest.max_positions
    assert written.engines[DECODER].landed is None
    assert {name: engine.cache for name, engine in written.engines.items() if engine.cache} == {DECODER: IN_PLACE}
    assert written.engines[DECODER].asked["fp32"] > 0
    for name in written.engines:
        assert written.file(name, CheckedFiles()).stat().st_size == written.engines[name].file.size
    with pytest.raises(OutputError, match="exists"):
        build_bundle(tiny_bundle, target="rtx", sm=[86], output=output)
    with pytest.raises(EngineError, match="contains engines only"):
        build_bundle(output, target="rtx", sm=[86])


@needs_rtx
def test_why_the_cache_is_copied_is_said(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def build_nothing(task: Any, plan: EnginePlan, staging: Path) -> BuiltEngine:
        file = staging / f"{plan.name}.engine"
        file.write_bytes(b"engine")
        return BuiltEngine(file, 6, 0.0, (), ())

    monkeypatch.setattr(build, "_in_process", build_nothing)
    monkeypatch.setattr(build, "version_for", lambda target, version: VERSIONS["10.13"])
    said: list[str] = []
    report = build_bundle(tiny_bundle, target="rtx", sm=[86], output=tmp_path / "board", notify=said.append)
    reason = "TensorRT 10.13 cannot update a KV cache in place, TensorRT 10.15 and newer can"
    assert said[0] == f"the decoder copies its KV cache in each step, because {reason}"
    assert (report.cache, report.cache_reason) == (CONSTANT, reason)
    assert EngineSet.read(report.directory).engines[DECODER].cache == CONSTANT


@needs_rtx
def test_an_unknown_compute_capability_names_the_known(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"capability 87;.*sm takes 75, 80, 86"):
        build_bundle(tiny_bundle, target="rtx", sm=[87])
    assert not [path for path in (tiny_bundle / "engines").iterdir() if path.name.startswith(".")]


def graph_of(operator: str, path: Path) -> EnginePlan:
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node(operator, ["x"], ["y"], name="dice")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 18)]
    )
    onnx.save(model, path)
    return EnginePlan("g", path, GraphSpec("g", (TensorSpec("x", "float32", (2,)),), ()))


def test_a_node_outside_the_documentation_is_named_before_anything_is_parsed(tmp_path: Path) -> None:
    plan = graph_of("Bernoulli", tmp_path / "g.onnx")
    with pytest.raises(EngineError, match=r"TensorRT 10\.3 does not support the node 'dice' \(Bernoulli\) of g\.onnx"):
        plan.serialised(VERSIONS["10.3"])


@needs_rtx
def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = graph_of("Bernoulli", tmp_path / "g.onnx")
    monkeypatch.setattr("blip2edge.engine.prepare.check_graph", lambda model, version: [])
    with pytest.raises(EngineError, match=r"'dice' \(Bernoulli\).*g\.onnx"):
        build_engine(load_tensorrt("rtx"), plan, VERSIONS["rtx"], tmp_path / "g.engine")
