"""Copies for CUDA: made by fixed rules, checked on the CPU, run by the CUDA backend's code on the CPU."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxscript", reason="the bundles are exported here")
pytest.importorskip("onnxruntime", reason="the copies run in ONNX Runtime")

import onnx_ir as ir

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, VISION
from blip2edge.cli.optimize import report_table
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization import by_rule
from blip2edge.optimization.by_rule import FP16_TOLERANCE
from blip2edge.optimization.pipeline import OptimizedReport, optimize
from blip2edge.optimization.recipes import HALF, NOT_INT8
from blip2edge.runtime.backends import onnxruntime_cuda
from blip2edge.runtime.backends.base import NO_GRAPH, OptimizedFile
from blip2edge.runtime.backends.onnxruntime_cuda import DeviceSession, open_on_host
from blip2edge.runtime.backends.optimized_copy import RECORD
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.decoding.kv.in_place import InPlaceDecoder
from tests.drawing import draw_pictures
from tests.engine.conftest import BundleOf
from tests.engine.families import ONE_QUICK
from tests.families import drawing_llama

PROMPTS = ["a photo of", "what is it ?", "two red cats and a dog"]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 3},
    {"repetition_penalty": 1.4, "min_new_tokens": 4},
    {"temperature": 1.2, "seed": 5},
)
CAPTIONERS = ("blip2-opt", "blip2-t5", "minigpt4", "llava", "instructblip", "blip", "idefics")


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> list[DeviceSession]:
    """The backend ``cuda`` with the CPU as the device; its sessions, in the order in which they are opened."""
    opened: list[DeviceSession] = []

    def open_graph(path: Path, threads: int | None = None, optimized: OptimizedFile | None = None) -> DeviceSession:
        opened.append(open_on_host(path, optimized))
        return opened[-1]

    monkeypatch.setattr(onnxruntime_cuda, "open_graph", open_graph)
    return opened


@pytest.fixture
def in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies stay in FP32: what they compute is that of the bundle, but for the order of sums."""
    monkeypatch.setattr(by_rule, "halve", lambda model: 0)


@pytest.fixture(scope="module")
def llama_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose heads are wide enough for the rotation inside GroupQueryAttention; two heads share a key."""
    root = tmp_path_factory.mktemp("llama")
    drawing_llama.draw_minigpt4(root / "checkpoint", 0, hidden_size=64)
    return export_checkpoint(root / "checkpoint", root / "bundle").bundle


def copied(bundle: Path, folder: Path) -> OptimizedReport:
    """A copy for CUDA in a bundle of its own."""
    shutil.copytree(bundle, folder / "bundle")
    return optimize(folder / "bundle", "cuda")


def kinds(report: OptimizedReport, graph: str) -> Counter[str]:
    return Counter(node.op_type for node in ir.load(report.directory / f"{graph}.onnx").graph)


def answers(captioner: Captioner, **options: Any) -> list[tuple[int, ...]]:
    results = captioner.caption_many(draw_pictures(3), prompts=PROMPTS, batch_size=3, max_new_tokens=10, **options)
    return [result.tokens for result in results]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int4", "int8"])
@pytest.mark.parametrize("name", ONE_QUICK)
def test_every_family_in_every_precision(name: str, precision: str, bundle_of: BundleOf, tmp_path: Path) -> None:
    """Every graph gets a copy in FP16 with no attention left in pieces; each was checked in FP32 and in FP16."""
    report = copied(bundle_of(name, precision), tmp_path)
    manifest = Bundle.open(tmp_path / "bundle").manifest
    assert report.record.left == {}
    assert report.record.graphs.keys() == manifest.graphs.keys()
    for graph, record in report.record.graphs.items():
        assert record.passes[-1] == HALF
        assert record.milliseconds is None
        assert (record.cosine or 0.0) >= 0.995
        assert all(one.relative <= one.tolerance == FP16_TOLERANCE for one in record.parity)
        found = kinds(report, graph)
        assert found["QuantizeLinear"] == found["DequantizeLinear"] == 0
        rounded = manifest.graphs[graph].precision == "int8"
        assert (NOT_INT8 in record.passes) == rounded
        narrow_rotary = name in ("minigpt4", "llava", "instructblip", "instructblipvideo") and graph == DECODER
        assert bool(found["Softmax"]) == (graph == "match" or narrow_rotary)  # of match, the probability
    if precision == "int4" and DECODER in manifest.graphs:
        assert kinds(report, DECODER)["MatMulNBits"] > 0


@pytest.mark.usefixtures("in_fp32")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "blip2-opt" else pytest.mark.slow) for name in CAPTIONERS]
)
def test_the_same_ids_in_fp32(name: str, bundle_of: BundleOf, tmp_path: Path, host: list[DeviceSession]) -> None:
    path = copied(bundle_of(name), tmp_path).directory.parents[1]
    portable, fast = (Captioner.load(path, backend=backend, threads=1) for backend in ("cpu", "cuda"))
    assert set(fast.graphs.copied) >= {VISION, DECODER}
    assert len(host) == len(fast.graphs.copied)
    for options in OPTIONS:
        assert answers(fast, **options) == answers(portable, **options), options


@pytest.mark.usefixtures("in_fp32")
def test_llama_with_the_rotation_inside(llama_bundle: Path, tmp_path: Path, host: list[DeviceSession]) -> None:
    report = copied(llama_bundle, tmp_path)
    found = kinds(report, DECODER)
    assert found["GroupQueryAttention"] == 2
    assert found["SkipSimplifiedLayerNormalization"] > 0
    assert found["Cos"] == found["Softmax"] == 0
    portable, fast = (Captioner.load(tmp_path / "bundle", backend=name, threads=1) for name in ("cpu", "cuda"))
    assert isinstance(fast.generator.language.decoder, InPlaceDecoder)
    for options in OPTIONS:
        assert answers(fast, **options) == answers(portable, **options), options


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_captions_in_fp16(precision: str, bundle_of: BundleOf, tmp_path: Path, host: list[DeviceSession]) -> None:
    """An FP16 copy of either bundle writes the captions of the bundle in FP16 here: no two logits are close."""
    path = copied(bundle_of("blip2-opt", precision), tmp_path).directory.parents[1]
    fast = Captioner.load(path, backend="cuda", threads=1)
    assert answers(fast) == answers(Captioner.load(bundle_of("blip2-opt", "fp16"), threads=1))
    assert {str(dtype) for session in host for dtype in session.dtypes.values()} == {"float16"}


def test_weights_are_stored_once(bundle_of: BundleOf, tmp_path: Path) -> None:
    """A copy of an FP16 bundle uses the bundle's own weights; that of an FP32 bundle has half of its bytes."""
    sizes = {}
    for precision in ("fp16", "fp32"):
        (tmp_path / precision).mkdir()
        report = copied(bundle_of("blip2-opt", precision), tmp_path / precision)
        own = sum(path.stat().st_size for path in report.directory.glob("*.data"))
        sizes[precision] = own, sum(path.stat().st_size for path in report.directory.parents[1].glob("*.data"))
    assert sizes["fp16"][0] < 0.25 * sizes["fp16"][1]
    assert sizes["fp32"][0] < 0.6 * sizes["fp32"][1]


def test_t5_residuals_stay_in_fp32(bundle_of: BundleOf, tmp_path: Path) -> None:
    """From an FP32 bundle too, which does not name the nodes that FP16 overflows."""
    report = copied(bundle_of("blip2-t5"), tmp_path)
    for graph in (DECODER, "text_encoder"):
        model = ir.load(report.directory / f"{graph}.onnx")
        norms = [node for node in model.graph if node.op_type == "SimplifiedLayerNormalization"]
        before = [node.inputs[0].producer() for node in norms if node.inputs[0] is not None]
        residuals = [node for node in before if node is not None and node.op_type in ("Add", "GatherElements")]
        assert len(residuals) == len(norms) - 1  # the first norm reads the embeddings
        found = {value.dtype for node in residuals for value in node.inputs if value is not None}
        assert found <= {ir.DataType.FLOAT, ir.DataType.INT64}


def test_a_large_graph_is_checked_in_fp16_alone(
    bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its FP32 form would need twice its bytes on the disk and in memory."""
    monkeypatch.setattr(by_rule, "LARGE", 0)
    saved: list[str] = []
    original = by_rule._saved

    def watched(task: Any, model: ir.Model, name: str) -> Path:
        saved.append(name)
        return original(task, model, name)

    monkeypatch.setattr(by_rule, "_saved", watched)
    report = copied(bundle_of("blip2-opt", "fp16"), tmp_path)
    assert report.record.left == {}
    assert {name.rpartition(".")[2] for name in saved} == {"fp16"}


@pytest.mark.parametrize(("step", "epsilon"), [("apply_recipe", 0.05), ("halve", 500.0)])
def test_a_wrong_copy_is_not_published(
    step: str, epsilon: float, bundle_of: BundleOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small mistake of a pass is found in FP32, and a large one of the conversion in FP16."""
    original = getattr(by_rule, step)

    def wrong(model: ir.Model, *arguments: Any) -> Any:
        done = original(model, *arguments)
        for node in model.graph:
            if node.op_type == "SkipLayerNormalization":
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
        return done

    monkeypatch.setattr(by_rule, step, wrong)
    report = copied(bundle_of("blip2-opt"), tmp_path)
    assert report.record.graphs == {}
    assert len(report.record.left) == 3
    assert all("off by" in reason or "cosine" in reason for reason in report.record.left.values())


def test_what_is_printed_and_read_again(bundle_of: BundleOf, tmp_path: Path) -> None:
    report = copied(bundle_of("blip2-opt", "int8"), tmp_path)
    text = report_table(report)
    assert "speed not measured" in text
    assert "FP16 in place of W8A8, for which the CUDA provider has no fused kernel: vision_encoder" in text
    values = json.loads((report.directory / RECORD).read_text())
    assert {graph["milliseconds"] for graph in values["graphs"].values()} == {None}


def test_a_copy_does_not_hang_on_the_version(bundle_of: BundleOf, tmp_path: Path, host: list[DeviceSession]) -> None:
    """The machine with the GPU has another package of ONNX Runtime than the one that made the copy."""
    report = copied(bundle_of("blip2-opt"), tmp_path)
    record = report.directory / RECORD
    values = json.loads(record.read_text())
    values["versions"]["onnxruntime"] = "1.24.0"
    record.write_text(json.dumps(values))
    assert Captioner.load(tmp_path / "bundle", backend="cuda", threads=1).graphs.copied


@pytest.mark.slow
def test_merged_patches_of_fp32_are_left(tiny_checkpoint: Any, tmp_path: Path) -> None:
    bundle = export_checkpoint(tiny_checkpoint.directory, tmp_path / "merged", merge_tokens=2).bundle
    (tmp_path / "copy").mkdir()
    report = copied(bundle, tmp_path / "copy")
    assert report.record.left.keys() == {VISION}
    assert "export with --precision fp16" in report.record.left[VISION]
    fp16 = export_checkpoint(tiny_checkpoint.directory, tmp_path / "merged16", precision="fp16", merge_tokens=2).bundle
    (tmp_path / "copy16").mkdir()
    assert copied(fp16, tmp_path / "copy16").record.left == {}


@pytest.mark.usefixtures("in_fp32")
def test_steps_are_captured_once_on_fixed_addresses(
    bundle_of: BundleOf, tmp_path: Path, host: list[DeviceSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph needs: a number for each shape and address, the same binding, the same single numbers."""
    path = copied(bundle_of("blip2-opt"), tmp_path).directory.parents[1]
    portable, fast = (Captioner.load(path, backend=backend, threads=1) for backend in ("cpu", "cuda"))
    decoder = next(session for session in host if "seqlens_k" in session.input_names)
    decoder.captures = True
    runs: list[tuple[int, int]] = []
    original: Callable[..., None] = DeviceSession.run_binding

    def watched(self: DeviceSession, binding: Any, model: bytes | None = None, graph: int = NO_GRAPH) -> None:
        if self is decoder and model is None:
            runs.append((id(binding), graph))
        original(self, binding, model, graph)

    monkeypatch.setattr(DeviceSession, "run_binding", watched)
    options: dict[str, Any] = {"max_new_tokens": 10, "eos_token_ids": (), "draft": "none"}
    pictures = draw_pictures(2)
    for picture in pictures:
        got, wanted = (one.caption(picture, prompt="a photo of", **options).tokens for one in (fast, portable))
        assert got == wanted
    numbers = [graph for _, graph in runs]
    assert numbers[:2] == [NO_GRAPH, NO_GRAPH]  # the prefill and the first step
    assert len(set(numbers[2:10])) == 1
    assert NO_GRAPH not in numbers[2:]  # the second caption uses the memory, and so the graphs, of the first
    assert all(len({binding for binding, other in runs if other == graph}) == 1 for graph in set(numbers[2:]))
    for beams in ({"num_beams": 3}, {"num_beams": 2, "repetition_penalty": 1.3}):
        assert answers(fast, **beams) == answers(portable, **beams)


def test_device_memory_goes_back_to_the_pool(bundle_of: BundleOf, tmp_path: Path, host: list[DeviceSession]) -> None:
    path = copied(bundle_of("blip2-opt"), tmp_path).directory.parents[1]
    decoder = Captioner.load(path, backend="cuda", threads=1).generator.language.decoder
    assert isinstance(decoder, InPlaceDecoder)
    prompt = decoder.table.rows(np.array([5, 6, 7]))
    _, first = decoder.prefill([prompt])
    memory = first._buffers._memory  # type: ignore[attr-defined]
    del first
    _, second = decoder.prefill([prompt])
    assert second._buffers._memory is memory  # type: ignore[attr-defined]
    _, third = decoder.prefill([prompt])
    assert third._buffers._memory is not memory  # type: ignore[attr-defined]
    fresh = third._buffers._pool.take((3, *memory.shape[1:]))  # type: ignore[attr-defined]
    assert not any(value.numpy().any() for value in fresh.values.values())  # a kernel may read unused slots: no NaN
