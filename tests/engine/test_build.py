"""Profiles, fingerprints and, where TensorRT for RTX is installed, engines of the tiny bundle without a GPU."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from blip2edge.contract import DECODER, Axis, GraphSpec, TensorSpec
from blip2edge.engine import builder
from blip2edge.engine.build import ENGINE_MANIFEST, build_bundle
from blip2edge.engine.fingerprint import Fingerprint, check_fingerprint, fingerprint
from blip2edge.engine.profiles import profiles_of
from blip2edge.errors import EngineError, UsageError

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (extra rtx)"
)
no_tensorrt = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed here"
)


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


def test_without_a_gpu_and_without_sm_the_error_says_what_to_type(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("blip2edge.engine.fingerprint.find_gpu", lambda: None)
    with pytest.raises(EngineError, match="--target rtx --sm 86"):
        fingerprint("tensorrt", "10.3.0", tmp_path, ())


def mark(**changes: object) -> Fingerprint:
    values: dict[str, object] = {
        "target": "tensorrt",
        "tensorrt": "10.3.0",
        "gpus": ("sm87",),
        "gpu": "Orin",
        "driver": "12.6",
        "machine": "aarch64",
        "bundle_sha256": "a" * 64,
    }
    return Fingerprint(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [{"tensorrt": "10.13.3"}, {"gpus": ("sm86",)}, {"gpu": "Orin Nano"}, {"bundle_sha256": "b" * 64}],
)
def test_another_machine_is_refused_with_the_command_that_builds_again(changes: dict[str, object]) -> None:
    engines = Path("bundle/engines/x")
    check_fingerprint(mark().to_json(), mark(), engines)
    with pytest.raises(EngineError, match="blip2edge build bundle --target tensorrt"):
        check_fingerprint(mark().to_json(), mark(**changes), engines)


def test_rtx_engines_serve_every_gpu_that_they_name() -> None:
    built = mark(target="rtx", gpus=("sm86", "sm89"), gpu="").to_json()
    check_fingerprint(built, mark(target="rtx", gpus=("sm89",), gpu="RTX 4090"), Path("b/engines/x"))
    with pytest.raises(EngineError, match="gpus"):
        check_fingerprint(built, mark(target="rtx", gpus=("sm120",), gpu="RTX 5090"), Path("b/engines/x"))


@no_tensorrt
def test_an_absent_tensorrt_is_an_answer(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"blip2edge\[tensorrt\].*--system-site-packages"):
        build_bundle(tiny_bundle)


def test_jetpack_6_0_is_told_to_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    old = type("trt", (), {"__version__": "8.6.2"})
    monkeypatch.setattr("importlib.import_module", lambda name: old)
    with pytest.raises(EngineError, match=r"8\.6\.2 is older than 10\.3; upgrade to JetPack 6\.1"):
        builder.load_tensorrt("tensorrt")


def test_sm_without_rtx_is_wrong_usage(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="--target rtx"):
        build_bundle(tiny_bundle, sm=[86])


@needs_rtx
def test_engines_build_without_a_gpu(tiny_bundle: Path) -> None:
    report = build_bundle(tiny_bundle, target="rtx", sm=[86, 89], workspace=256)
    written = json.loads((report.directory / ENGINE_MANIFEST).read_text())
    assert written["fingerprint"]["gpus"] == ["sm86", "sm89"]
    assert set(written["engines"]) == set(report.engines)
    assert written["engines"][DECODER]["profiles"] == ["prefill", "decode", "verify"]
    for engine in written["engines"].values():
        assert (report.directory / engine["file"]).stat().st_size == engine["size"] > 0


@needs_rtx
def test_an_unknown_compute_capability_names_the_known(tiny_bundle: Path) -> None:
    with pytest.raises(EngineError, match=r"capability 87;.*--sm takes 75, 80, 86"):
        build_bundle(tiny_bundle, target="rtx", sm=[87])
    assert not list((tiny_bundle / "engines").glob(".engines*"))


@needs_rtx
def test_a_node_that_the_parser_refuses_is_named(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node("Bernoulli", ["x"], ["y"], name="dice")
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=[helper.make_opsetid("", 18)]
    )
    onnx.save(model, tmp_path / "g.onnx")
    spec = GraphSpec("g", (TensorSpec("x", "float32", (2,)),), ())
    trt = builder.load_tensorrt("rtx")
    with pytest.raises(EngineError, match=r"'dice' \(Bernoulli\).*g\.onnx"):
        builder.build_engine(trt, tmp_path / "g.onnx", spec, tmp_path / "g.engine", compute_capabilities=[86])
