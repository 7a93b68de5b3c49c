"""Rules of the GPU path that were broken once: each test fails with the code before (tests on a simulated GPU)."""

from __future__ import annotations

import gc
import importlib.util
import io
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="engines are made of graphs with onnx_ir")
pytest.importorskip("onnxruntime", reason="the stand-in computes in ONNX Runtime")

import onnx_ir as ir
import onnxruntime

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.engine import build
from blip2edge.engine.builder import BuildOptions, BuiltEngine, _configure
from blip2edge.engine.decoder.step_graph import StepSource, step_graph
from blip2edge.errors import BackendError, EngineError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.backends import open_graph, probe
from blip2edge.runtime.backends.engine_files import KIND
from blip2edge.runtime.backends.open_graph import choose_backend
from blip2edge.runtime.backends.probe import Check, Driver, Gpu
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.decoding.sampling import log_softmax, penalize_repetition
from blip2edge.runtime.tensorrt.cuda import Cuda, Mirror
from blip2edge.runtime.tensorrt.session import PIECE, _reader
from blip2edge.runtime.tensorrt.workspace import MOST_IDLE, Engines
from tests.drafted import add_draft
from tests.drawing import Drawn, draw_pictures
from tests.engine.fake_engines import plug_in, write_engines
from tests.engine.fake_gpu import FakeCuda, FakeEngine

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed (extra rtx)"
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[FakeCuda, Any]:
    return plug_in(monkeypatch, **getattr(request, "param", {}))


@pytest.fixture
def bundle(gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle with engines of its own."""
    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    write_engines(path, path / KIND)
    return path


# (a) and (e2): the stream reader


STREAMS: Any = SimpleNamespace(
    IStreamReaderV2=type("IStreamReaderV2", (), {}), SeekPosition=SimpleNamespace(SET=0, CUR=1, END=2)
)
"""What the reader uses of TensorRT's module. The real base class cannot be made without a driver."""


@needs_rtx
def test_reader_has_the_form_of_the_bindings() -> None:
    import tensorrt_rtx

    documented = tensorrt_rtx.IStreamReaderV2.__doc__
    assert "def read(self, num_bytes: int, stream: int) -> bytes" in documented
    assert "def seek(self, offset: int, where: SeekPosition) -> bool" in documented
    assert {"SET", "CUR", "END"} <= set(dir(tensorrt_rtx.SeekPosition))


def test_reader_returns_bytes(tmp_path: Path) -> None:
    path = tmp_path / "engine"
    path.write_bytes(bytes(range(256)) * 100)
    with path.open("rb") as file:
        reader = _reader(STREAMS, file)
        assert reader.read(3, 0) == b"\x00\x01\x02"
        assert reader.seek(255, 0)
        assert reader.read(10**9, 0) == (bytes(range(256)) * 100)[255:]
        assert reader.read(1, 0) == b""


def test_reader_holds_one_piece_at_a_time() -> None:
    asked: list[int] = []

    class File(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(size or 0)
            return b"x"

    _reader(STREAMS, File()).read(10 * PIECE, 0)
    assert asked == [PIECE]


def test_loading_leaves_no_staging_memory(gpu: tuple[FakeCuda, Any], bundle: Path) -> None:
    Captioner.load(bundle, backend="tensorrt", threads=1)
    assert all(len(buffer) < PIECE for buffer in gpu[0].memory.values())


# (b): the device chooses tokens with default options, too


@pytest.mark.parametrize(
    "options",
    [{}, {"min_new_tokens": 5}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.7, "min_new_tokens": 6}],
)
def test_steps_are_cuda_graphs_with(gpu: tuple[FakeCuda, Any], bundle: Path, options: dict[str, Any]) -> None:
    expected, got = (Captioner.load(bundle, backend=name, threads=1) for name in ("cpu", "tensorrt"))
    pictures = draw_pictures(3)
    both: dict[str, Any] = {"batch_size": 3, "max_new_tokens": 14, **options}
    wanted = [result.tokens for result in expected.caption_many(pictures, **both)]
    before = gpu[0].asked.count("replay")
    assert [result.tokens for result in got.caption_many(pictures, **both)] == wanted
    assert gpu[0].asked.count("replay") - before >= 2 * 4  # two engines a step


def test_end_tokens_are_held_back_until_the_shortest_length(gpu: tuple[FakeCuda, Any], bundle: Path) -> None:
    """An end token that would come in every step is chosen after exactly `min_new_tokens` others."""
    captioner = Captioner.load(bundle, backend="tensorrt", threads=1)
    free = captioner.caption(draw_pictures(1)[0], max_new_tokens=9, eos_token_ids=()).tokens
    ends = tuple(sorted(set(free)))
    for least in (1, 3, 7):
        options: dict[str, Any] = {"min_new_tokens": least, "max_new_tokens": 9, "eos_token_ids": ends}
        on_cpu = Captioner.load(bundle, backend="cpu", threads=1).caption(draw_pictures(1)[0], **options)
        on_gpu = captioner.caption(draw_pictures(1)[0], **options)
        assert on_gpu.tokens == on_cpu.tokens
        assert not set(on_gpu.tokens[:least]) & set(ends)


def test_draft_model_is_not_used_with_engines_unless_it_is_named(
    gpu: tuple[FakeCuda, Any], tiny_checkpoint: Drawn, tmp_path: Path
) -> None:
    shutil.copytree(tiny_checkpoint.directory, tmp_path / "checkpoint")
    add_draft(tmp_path / "checkpoint")
    path = export_checkpoint(tmp_path / "checkpoint", tmp_path / "drafted").bundle
    write_engines(path, path / KIND)
    with Captioner.load(path, backend="tensorrt", threads=1) as captioner:
        assert captioner.generator.drafts.kind(captioner.options()) == "none"
    with Captioner.load(path, backend="tensorrt", threads=1, draft="itg") as captioner:
        assert captioner.generator.drafts.kind(captioner.options()) == "itg"
    with Captioner.load(path, backend="cpu", threads=1) as captioner:
        assert captioner.generator.drafts.kind(captioner.options()) == "itg"


# (c): NaN


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"temperature": 1.0, "seed": 1}])
def test_nan_logits_are_an_error(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    compute, steps = FakeEngine.compute, 0

    def broken(self: FakeEngine, shapes: Any, addresses: Any) -> None:
        nonlocal steps
        compute(self, shapes, addresses)
        if "logits" in self.outputs:
            steps += 1
            if steps > 4:
                rows = shapes["inputs_embeds"][0]
                self._at(addresses["logits"], (rows, 1, 1), np.dtype(np.float32))[...] = np.nan

    monkeypatch.setattr(FakeEngine, "compute", broken)
    captioner = Captioner.load(bundle, backend="tensorrt", threads=1)
    with pytest.raises(BackendError, match="NaN"):
        captioner.caption(draw_pictures(1)[0], max_new_tokens=12, eos_token_ids=(), **options)


def test_log_probabilities_of_the_device_are_those_of_the_host(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of engines without that output (version 0.1), the host chooses the tokens, with the same result."""
    expected, got = (Captioner.load(bundle, backend=name, threads=1) for name in ("cpu", "tensorrt"))
    picture = draw_pictures(1)[0]
    options: dict[str, Any] = {"max_new_tokens": 9, "repetition_penalty": 1.2}
    host, device = (captioner.caption(picture, **options) for captioner in (expected, got))
    assert device.tokens == host.tokens
    assert device.token_logprobs == pytest.approx(host.token_logprobs, abs=1e-4)
    monkeypatch.setattr(Engines, "gives_logprobs", property(lambda _: False))
    before = gpu[0].asked.count("replay")
    older = got.caption(picture, **options)
    assert older.tokens == host.tokens
    assert older.token_logprobs == pytest.approx(host.token_logprobs, abs=1e-4)
    assert gpu[0].asked.count("replay") == before


def test_step_graph_follows_the_rules_of_the_host(tiny_bundle: Path, tmp_path: Path) -> None:
    source = StepSource.of(Bundle.open(tiny_bundle), None)
    model = step_graph(source)
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    ir.save(model, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx", providers=["CPUExecutionProvider"])
    rows, vocabulary = 5, source.spec.inputs[0].width
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(rows, 1, vocabulary)).astype(np.float32)
    logits[3, 0, 7] = np.nan
    logits[4, 0, 9] = np.inf
    seen = (rng.random((rows, vocabulary)) < 0.5).astype(np.float32)
    held = np.zeros((rows, vocabulary), np.float32)
    penalty = np.array([[1.0], [1.5], [0.5], [1.0], [1.0]], np.float32)
    held[1, np.argsort(-logits[1, 0])[:20]] = 1
    steps = np.array([[0], [2], [-3], [1], [0]], np.int64)
    feeds = {"logits": logits, "position_ids": np.full((rows, 1), 4), "cache_position": np.array([6])}
    feeds |= {"seen": seen, "penalty": penalty, "held": held, "held_steps": steps}
    names = [output.name for output in session.get_outputs()]
    got = dict(zip(names, session.run(names, feeds), strict=True))
    expected = []
    for row in range(rows):
        scores = logits[row, 0].copy()
        penalize_repetition(scores, np.flatnonzero(seen[row]), float(penalty[row, 0]))
        if steps[row, 0] > 0:
            scores[held[row] > 0] = -np.inf
        expected.append(-1 if np.isnan(scores).any() else int(scores.argmax()))
    assert got["token_ids"][:, 0].tolist() == expected
    assert expected[3:] == [-1, 9]
    assert (got["next_position_ids"] == 5).all()
    assert got["next_cache_position"].tolist() == [7]
    assert (got["next_held_steps"] == steps - 1).all()
    likely = np.take_along_axis(log_softmax(logits[:3, 0]), got["token_ids"][:3], axis=1)
    np.testing.assert_allclose(got["token_logprobs"][:3], likely, atol=1e-5)
    after = seen.copy()
    for row in range(3):
        after[row, expected[row]] = 1
    np.testing.assert_array_equal(got["next_seen"][:3], after[:3])


# (d) and (j): flags of the builder


@pytest.mark.parametrize("target", ["tensorrt", "rtx"])
def test_flags_of_the_builder(target: str) -> None:
    config, flags = SimpleNamespace(), {"TF32"}
    config.set_flag, config.clear_flag = flags.add, flags.discard
    trt = SimpleNamespace(
        BuilderFlag=SimpleNamespace(TF32="TF32", REQUIRE_USER_ALLOCATION="REQUIRE_USER_ALLOCATION"),
        ProfilingVerbosity=SimpleNamespace(DETAILED=1),
    )
    _configure(trt, config, BuildOptions(target=target))
    assert flags == ({"REQUIRE_USER_ALLOCATION"} if target == "rtx" else set())


@needs_rtx
def test_flags_exist_in_the_bindings() -> None:
    import tensorrt_rtx as trt

    config = trt.Builder(trt.Logger()).create_builder_config()
    assert config.get_flag(trt.BuilderFlag.TF32)  # the default that is switched off
    _configure(trt, config, BuildOptions(target="rtx", sm=(86,)))
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)


class RuntimeConfig:
    """``IRuntimeConfig`` of TensorRT for RTX."""

    dynamic_shapes_kernel_specialization_strategy = "LAZY"

    def __init__(self) -> None:
        self.strategy = ""
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> Any:
        content: list[bytes] = []
        return SimpleNamespace(
            deserialize=content.append, serialize=lambda: b"compiled" + b"".join(content), content=content
        )

    def set_runtime_cache(self, cache: Any) -> None:
        self.cache = cache


def test_kernels_of_rtx_are_compiled_at_once_and_kept(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = gpu[1]
    trt.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="EAGER")
    configs: list[RuntimeConfig] = []

    def make(self: FakeEngine) -> RuntimeConfig:
        configs.append(RuntimeConfig())
        return configs[-1]

    create = FakeEngine.create_execution_context
    monkeypatch.setattr(FakeEngine, "create_runtime_config", make, raising=False)
    monkeypatch.setattr(FakeEngine, "create_execution_context", lambda self, config: create(self, config.strategy))
    with Captioner.load(bundle, backend="tensorrt", threads=1) as captioner:
        captioner.caption(draw_pictures(1)[0], max_new_tokens=3)
    assert {config.dynamic_shapes_kernel_specialization_strategy for config in configs} == {"EAGER"}
    assert len({id(config.cache) for config in configs}) == 1
    assert not (bundle / KIND / "x" / "kernels.cache").exists()  # machine code is not read from a bundle
    (kernels,) = (cache_directory() / "kernels").glob("*-x.cache")
    assert kernels.read_bytes() == b"compiled"
    with Captioner.load(bundle, backend="tensorrt", threads=1) as captioner:
        captioner.caption(draw_pictures(1)[0], max_new_tokens=3)
    assert configs[-1].cache is not None
    assert configs[-1].cache.content == [b"compiled"]


def test_engine_that_cannot_be_captured_runs_without_a_graph(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.engine.fake_gpu import FakeContext

    monkeypatch.setattr(FakeContext, "is_stream_capturable", lambda self, stream: False, raising=False)
    captioner = Captioner.load(bundle, backend="tensorrt", threads=1)
    wanted = Captioner.load(bundle, backend="cpu", threads=1).caption(draw_pictures(1)[0], max_new_tokens=9).tokens
    assert captioner.caption(draw_pictures(1)[0], max_new_tokens=9).tokens == wanted
    assert "replay" not in gpu[0].asked


# (e): memory


def test_closing_frees_everything(gpu: tuple[FakeCuda, Any], bundle: Path) -> None:
    cuda = gpu[0]
    with Captioner.load(bundle, backend="tensorrt", threads=1) as captioner:
        list(captioner.caption_many(draw_pictures(3), batch_size=3, max_new_tokens=8))
        captioner.caption(draw_pictures(1)[0], num_beams=3, max_new_tokens=5)
        gc.collect()
        assert cuda.memory
        assert cuda.graphs
    assert (cuda.memory, cuda.graphs, cuda.marks, cuda.queues) == ({}, {}, {}, {})


def test_idle_workspaces_are_limited(gpu: tuple[FakeCuda, Any], bundle: Path) -> None:
    captioner = Captioner.load(bundle, backend="tensorrt", threads=1)
    pictures, held = draw_pictures(8), []
    for size in range(1, 9):
        list(captioner.caption_many(pictures[:size], batch_size=size, max_new_tokens=3))
        gc.collect()
        held.append(len(captioner.generator.language.decoder.engines.idle))  # type: ignore[attr-defined]
    assert max(held) == MOST_IDLE


# (f): an error during capture


def test_error_during_a_capture_ends_the_capture(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = gpu[0]
    captioner = Captioner.load(bundle, backend="tensorrt", threads=1)
    wanted = captioner.caption(draw_pictures(1)[0], max_new_tokens=2).tokens
    real = cuda.ask

    def failing(stream: int, name: str, work: Any) -> None:
        if cuda.captured is not None:
            raise EngineError("the engine did not run")
        real(stream, name, work)

    cuda.ask = failing  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="did not run"):
        captioner.caption(draw_pictures(1)[0], max_new_tokens=12, eos_token_ids=())
    assert cuda.captured is None
    cuda.ask = real  # type: ignore[method-assign]
    assert captioner.caption(draw_pictures(1)[0], max_new_tokens=2).tokens == wanted


# (m): boards whose host and GPU share one memory


def test_large_tensors_are_in_the_gpus_own_memory_on_a_board() -> None:
    cuda: Any = Cuda(FakeCuda(integrated=True))
    shared, own = (Mirror(cuda, (4,), np.dtype(np.float32), on_device=on_device) for on_device in (False, True))
    assert shared.address == shared.view((4,)).ctypes.data
    assert own.address != own.view((4,)).ctypes.data
    stream = cuda.stream()
    own.put(np.arange(4, dtype=np.float32), stream)
    view = own.fetch((4,), stream)
    cuda.synchronize(stream)
    assert view.tolist() == [0, 1, 2, 3]


# (n): vision beside decoding


def test_vision_and_decoding_have_streams_of_their_own(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = gpu[0]
    streams: dict[str, set[int]] = {}
    real = cuda.ask

    def watching(stream: int, name: str, work: Any) -> None:
        if name.startswith("run "):
            streams.setdefault(name[4:], set()).add(stream)
        real(stream, name, work)

    cuda.ask = watching  # type: ignore[method-assign]
    captioner = Captioner.load(bundle, backend="tensorrt", threads=1)
    captioner.caption(draw_pictures(1)[0], max_new_tokens=4)
    assert streams["vision_encoder"] == streams["bridge"]
    assert streams["decoder"] == streams["step"]
    assert not streams["vision_encoder"] & streams["decoder"]
    lanes = captioner.graphs._engines._device
    with lanes.decoding.lock:  # a decode step is being launched
        pixels = captioner.encoder.images.preprocessing(draw_pictures(1)[0])[None]
        vision = captioner.encoder.images.vision
        done: list[Any] = []
        thread = threading.Thread(target=lambda: done.append(vision.run({"pixel_values": pixels})))
        thread.start()
        thread.join(60)
        assert done


# (o): the report of a build


def test_report_that_fails_keeps_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    built = BuiltEngine(tmp_path / "x.engine", 1, 0.1, ("only",), ())
    monkeypatch.setattr(build, "load_tensorrt", lambda target: object())
    monkeypatch.setattr(build, "build_engine", lambda *_: built)

    def out_of_memory(*_: object) -> dict[str, int]:
        raise EngineError("x.engine cannot be opened on this machine (out of memory)")

    monkeypatch.setattr(build, "layers_of", out_of_memory)
    plan: Any = SimpleNamespace(step=None)
    found = build._build_one(BuildOptions(), plan, (10, 13), tmp_path / "x.engine", True)
    assert found.landed is None
    assert found.warnings == ("the layers were not counted: x.engine cannot be opened on this machine (out of memory)",)


# (p): auto


def test_auto_takes_engines_that_fit(gpu: tuple[FakeCuda, Any], bundle: Path) -> None:
    with Captioner.load(bundle) as captioner:
        assert captioner.graphs.backend == "tensorrt"
        assert captioner.caption(draw_pictures(1)[0], max_new_tokens=3).tokens


@pytest.mark.parametrize(
    ("works", "integers", "expected"), [(True, False, "cuda"), (False, False, "cpu"), (True, True, "cpu")]
)
def test_auto_without_engines(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, works: bool, integers: bool, expected: str
) -> None:
    monkeypatch.setattr(probe, "nvidia_driver", lambda: Driver("13.0", (Gpu("H200", 90),)))
    monkeypatch.setattr(probe, "check_provider", lambda ort, name: Check(name, works, ""))
    opened = Bundle.open(tiny_bundle)
    if integers:
        for graph in opened.manifest.graphs.values():
            object.__setattr__(graph, "precision", "int8")
    assert choose_backend(opened, "auto") == (expected, None)
    assert choose_backend(opened, "cpu") == ("cpu", None)


def test_auto_without_a_gpu(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "nvidia_driver", Driver)
    monkeypatch.setattr(open_graph, "_cuda_works", lambda precision: pytest.fail("nothing is tried without a GPU"))
    assert choose_backend(Bundle.open(tiny_bundle), "auto") == ("cpu", None)


def test_auto_passes_over_engines_of_another_gpu(
    gpu: tuple[FakeCuda, Any], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "nvidia_driver", lambda: Driver("12.6", (Gpu("Orin Nano", 87, 8, 7),)))
    monkeypatch.setattr(probe, "check_provider", lambda ort, name: Check(name, False, ""))
    assert choose_backend(Bundle.open(bundle), "auto") == ("cpu", None)


def test_engines_of_another_version_do_not_hide_others(gpu: tuple[FakeCuda, Any], bundle: Path) -> None:
    (bundle / KIND / "a").mkdir()
    (bundle / KIND / "a" / "engine.json").write_text('{"schema_version": 0}')
    assert choose_backend(Bundle.open(bundle), "auto")[0] == "tensorrt"
    shutil.rmtree(bundle / KIND / "x")
    assert choose_backend(Bundle.open(bundle), "auto") == ("cpu", None)
    with pytest.raises(EngineError, match="expected schema version 3, got 0"):
        choose_backend(Bundle.open(bundle), "tensorrt")


def test_step_scores_describe_what_the_device_can_do() -> None:
    from blip2edge.runtime.decoding.logits_processors import LogitsProcessors

    def rules(generated: list[int], **options: Any) -> Any:
        return LogitsProcessors([3, 4, 99], GenerationOptions(eos_token_ids=(2,), **options), 50).step_scores(generated)

    plain = rules([7])
    assert (plain.penalty, plain.held_steps, plain.seen.tolist()) == (1.0, 0, [])
    found = rules([7, 7, 8], repetition_penalty=1.5, min_new_tokens=5)
    assert (found.penalty, found.held.tolist(), found.held_steps) == (1.5, [2], 2)
    assert found.seen.tolist() == [3, 4, 7, 8]

    def fits(count: int, **options: Any) -> bool:
        return LogitsProcessors([3], GenerationOptions(**options), 50).fit_device(count)

    assert fits(1, repetition_penalty=1.5, min_new_tokens=5, eos_token_ids=(2,))
    assert not fits(1, no_repeat_ngram_size=2)
    assert not fits(1, suppress_tokens=(5,))
    assert fits(2, forced_eos_token_id=(2,), max_new_tokens=4)
    assert not fits(3, forced_eos_token_id=(2,), max_new_tokens=4)
