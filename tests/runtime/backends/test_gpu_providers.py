"""How ONNX Runtime's GPU providers are opened: options, libraries, shapes of engines, nodes that fall to the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="this is about ONNX Runtime")

import onnx
import onnxruntime

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, VISION, Axis, GraphSpec, TensorSpec
from blip2edge.errors import BackendError
from blip2edge.runtime.backends import onnxruntime_cuda, probe
from blip2edge.runtime.backends.base import OptimizedFile
from blip2edge.runtime.backends.onnxruntime_cuda import CAPTURE, GRAPHS_VARIABLE, open_on_host, profile_options
from blip2edge.runtime.backends.open_graph import GraphOpener
from blip2edge.runtime.backends.probe import check_provider
from tests.project import extras

Call = tuple[Path, list[Any]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What would be opened: the file, and the providers with their options."""
    seen: list[Call] = []

    def open_with(path: Path, threads: int | None, provider: str, providers: list[Any], *_: Any) -> SimpleNamespace:
        seen.append((path, providers))
        graph = onnx.load(path, load_external_data=False).graph
        names = ([value.name for value in values] for values in (graph.input, graph.output))
        return SimpleNamespace(close=lambda: None, **dict(zip(("input_names", "output_names"), names, strict=True)))

    monkeypatch.setattr(onnxruntime_cuda, "open_with", open_with)
    return seen


def test_the_cuda_provider_multiplies_in_fp32(tiny_bundle: Path, calls: list[Call]) -> None:
    GraphOpener(Bundle.open(tiny_bundle), "cuda")(VISION)
    ((_, [(name, options)]),) = calls
    assert name == "CUDAExecutionProvider"
    assert options["use_tf32"] == "0"
    assert CAPTURE not in options


def test_cuda_graphs_are_for_the_decoder_of_a_copy(
    tiny_bundle: Path, calls: list[Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(GRAPHS_VARIABLE, "1")
    for name in (DECODER, VISION):
        for optimized in (None, OptimizedFile(tiny_bundle)):
            onnxruntime_cuda.open_graph(tiny_bundle / f"{name}.onnx", 1, optimized)
    captured = [(path.stem, providers[0][1].get(CAPTURE)) for path, providers in calls]
    assert captured == [(DECODER, None), (DECODER, "1"), (VISION, None), (VISION, None)]


def test_shapes_of_a_profile() -> None:
    batch, past, steps = Axis("batch", 1, 2, 8), Axis("past", 0, 40, 90), Axis("steps", 1, 1, 16)
    spec = GraphSpec(
        DECODER,
        (
            TensorSpec("inputs_embeds", "float32", (batch, steps, 32)),
            TensorSpec("attention_mask", "int64", (batch, past + steps)),
            TensorSpec("scale", "float32", (4,)),
            TensorSpec("past_key_values.0.key", "float32", (batch, 2, past, 16)),
        ),
        (),
    )
    assert profile_options(spec) == {
        "trt_profile_min_shapes": "inputs_embeds:1x1x32,attention_mask:1x1,past_key_values.0.key:1x2x0x16",
        "trt_profile_opt_shapes": "inputs_embeds:2x1x32,attention_mask:2x41,past_key_values.0.key:2x2x40x16",
        "trt_profile_max_shapes": "inputs_embeds:8x16x32,attention_mask:8x106,past_key_values.0.key:8x2x90x16",
    }
    assert profile_options(GraphSpec("still", (spec.inputs[2],), ())) == {}


def test_tensorrt_gets_shapes_flags_and_caches(tiny_bundle: Path, calls: list[Call]) -> None:
    bundle = Bundle.open(tiny_bundle)
    opener = GraphOpener(bundle, "ort-tensorrt")
    for name in bundle.manifest.graphs:
        opener(name)
    assert [path.stem for path, _ in calls] == list(bundle.manifest.graphs)
    for path, providers in calls:
        (name, options), (second, cuda) = providers
        assert (name, second) == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
        assert options["trt_engine_cache_enable"] == options["trt_timing_cache_enable"] == "1"
        assert Path(options["trt_engine_cache_path"]).is_dir()
        assert (
            options["trt_profile_max_shapes"] == profile_options(bundle.graph(path.stem).spec)["trt_profile_max_shapes"]
        )
        assert cuda["use_tf32"] == "0"
        assert "trt_fp16_enable" not in options
    spec = bundle.graph(VISION).spec
    onnxruntime_cuda.open_graph_with_tensorrt(tiny_bundle / spec.file, 1, spec=spec, precisions=("fp16", "int8"))
    options = calls[-1][1][0][1]
    assert options["trt_fp16_enable"] == options["trt_int8_enable"] == "1"


@pytest.mark.parametrize(("name", "wanted"), [("CUDAExecutionProvider", 1), ("CPUExecutionProvider", 0)])
def test_cuda_libraries_are_loaded_before_a_session(name: str, wanted: int, capsys: pytest.CaptureFixture[str]) -> None:
    order: list[str] = []

    def preload_dlls() -> None:
        order.append("libraries")
        print("Failed to load libcufft.so")

    def session(*_: Any, **__: Any) -> Any:
        order.append("session")
        raise RuntimeError("no driver")

    package: Any = SimpleNamespace(
        preload_dlls=preload_dlls, SessionOptions=onnxruntime.SessionOptions, InferenceSession=session
    )
    assert not check_provider(package, name).ok
    assert order == ["libraries"] * wanted + ["session"]
    captured = capsys.readouterr()
    assert captured.out == ""  # results are printed there
    assert captured.err.count("libcufft") == wanted


def test_extra_brings_the_cuda_libraries() -> None:
    """onnxruntime-gpu alone lists the CUDA provider, and cannot run it without CUDA and cuDNN."""
    (requirement,) = extras()["gpu"]
    assert requirement.startswith("onnxruntime-gpu[cuda,cudnn]")


REPORTS_NODES = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this ONNX Runtime does not report the provider of a node (1.24 and newer do)",
)


@REPORTS_NODES
def test_products_on_the_cpu_are_refused(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first provider says nothing about the nodes: here it is the expected one, and all nodes run on the CPU."""
    monkeypatch.setattr(onnxruntime_cuda, "checked_package", lambda provider: onnxruntime)
    cpu = ["CPUExecutionProvider"]
    with pytest.raises(BackendError, match=r"runs some nodes on the CPU \(.*\d+ MatMul.*blip2edge optimize"):
        onnxruntime_cuda.open_with(tiny_bundle / "decoder.onnx", 1, cpu[0], cpu)
    monkeypatch.setattr(onnxruntime_cuda, "COMPUTE", ())  # nodes that compute shapes may run there
    onnxruntime_cuda.open_with(tiny_bundle / "decoder.onnx", 1, cpu[0], cpu).close()


@REPORTS_NODES
def test_nodes_are_counted_where_onnxruntime_reports_them(tiny_bundle: Path) -> None:
    session = open_on_host(tiny_bundle / "decoder.onnx")
    (provider,) = session.nodes
    assert provider == "CPUExecutionProvider"
    assert session.nodes[provider]["MatMul"] > 5
    assert probe.count_nodes(SimpleNamespace()) == {}
