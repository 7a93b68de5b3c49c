"""The TensorRT runtime on a simulated GPU: order of calls, shapes, synchronisation, and the CPU backend's tokens."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnx_ir", reason="engines are made of graphs with onnx_ir")
pytest.importorskip("onnxruntime", reason="the stand-in computes in ONNX Runtime")

from blip2edge import Captioner
from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import BackendError, BundleIntegrityError, EngineError
from blip2edge.runtime.backends import probe
from blip2edge.runtime.backends.engine_files import CONSTANT, IN_PLACE, KIND, RECORD
from blip2edge.runtime.backends.probe import Driver, Gpu
from blip2edge.runtime.tensorrt.session import MOST_MESSAGES, make_logger
from tests.drawing import draw_pictures
from tests.engine.conftest import BundleOf
from tests.engine.fake_engines import DRIVER, plug_in, write_engines
from tests.engine.fake_gpu import VERSION, FakeCuda, fake_tensorrt

PROMPTS = ["a photo of", None, "what is it ?"]
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 2},
    {"repetition_penalty": 1.4, "min_new_tokens": 4},
    {"temperature": 0.8, "seed": 3},
)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[FakeCuda, Any]:
    """A machine with a GPU; parameters are those of the two stand-ins."""
    return plug_in(monkeypatch, **getattr(request, "param", {}))


def copied(path: Path, target: Path) -> Path:
    """A bundle of its own, for engines of its own."""
    target.mkdir()
    for file in path.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)
    return target


@pytest.mark.parametrize(
    "gpu", [{}, {"integrated": True}, {"streamed": False}], indirect=True, ids=["card", "board", "10.3"]
)
@pytest.mark.parametrize("form", [CONSTANT, IN_PLACE])
def test_the_tokens_are_those_of_the_cpu(
    form: str, gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    cuda, trt = gpu
    path = copied(tiny_bundle, tmp_path / "bundle")
    write_engines(path, path / KIND, decoder=form)
    expected, got = (Captioner.load(path, backend=name, threads=1) for name in ("cpu", "tensorrt"))
    pictures = draw_pictures(3)
    for options in OPTIONS:
        both: dict[str, Any] = {"prompts": PROMPTS, "batch_size": 3, "max_new_tokens": 12, **options}
        wanted = [result.tokens for result in expected.caption_many(pictures, **both)]
        assert [result.tokens for result in got.caption_many(pictures, **both)] == wanted, options
        single = got.caption(pictures[0], prompt=PROMPTS[0], max_new_tokens=12, **options)
        if "temperature" not in options:
            assert single.tokens == wanted[0]
    streamed = "".join(got.stream(pictures[1], max_new_tokens=12)).strip()
    assert streamed == expected.caption(pictures[1], max_new_tokens=12).text
    assert cuda.asked.count("replay") > 10  # steps came from CUDA graphs
    assert bool(trt.pieces) == hasattr(trt, "IStreamReaderV2")


def test_the_next_step_is_launched_before_a_token_is_read(
    gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    cuda, _ = gpu
    path = copied(tiny_bundle, tmp_path / "bundle")
    write_engines(path, path / KIND)
    captioner = Captioner.load(path, backend="tensorrt", threads=1)
    waited: list[tuple[int, int]] = []
    original = FakeCuda.cudaEventSynchronize

    def watched(self: FakeCuda, event: int) -> tuple[int]:
        runs = sum("run" in one or one == "replay" for one in self.asked)
        waited.append((event, runs))
        return original(self, event)

    cuda.cudaEventSynchronize = watched.__get__(cuda)  # type: ignore[method-assign]
    before = sum("run" in one for one in cuda.asked)
    captioner.caption(draw_pictures(1)[0], max_new_tokens=8, eos_token_ids=())
    assert len(waited) == 7  # the first token comes from the prompt's logits
    first = waited[0][1] - before
    assert (
        first >= 4 + 3
    )  # vision, bridge, prefill, and two steps of two engines each: one token is read, two are asked
    assert all(later[1] > earlier[1] for earlier, later in pairwise(waited))


def test_a_cache_that_is_updated_in_place_needs_one_graph_and_one_buffer(
    gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    cuda, _ = gpu
    for form, count in ((CONSTANT, 2), (IN_PLACE, 1)):
        path = copied(tiny_bundle, tmp_path / form)
        write_engines(path, path / KIND, decoder=form)
        captioner = Captioner.load(path, backend="tensorrt", threads=1)
        before = len(cuda.graphs)
        captioner.caption(draw_pictures(1)[0], max_new_tokens=8, eos_token_ids=())
        assert len(cuda.graphs) - before == count
        decoder: Any = captioner.generator.language.decoder
        (space,) = decoder.engines.idle
        assert len(space.halves) == count
        captioner.close()


def test_an_engine_that_does_not_update_its_cache_in_place_is_refused(
    gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path
) -> None:
    path = copied(tiny_bundle, tmp_path / "bundle")
    directory = write_engines(path, path / KIND)
    record = json.loads((directory / RECORD).read_text())
    record["engines"][DECODER]["cache"] = IN_PLACE
    (directory / RECORD).write_text(json.dumps(record))
    with pytest.raises(EngineError, match=r"got a separate present\.0\.key; build .* decoder constant"):
        Captioner.load(path, backend="tensorrt", threads=1)


@pytest.mark.parametrize("form", [CONSTANT, "auto"])
@pytest.mark.parametrize("name", ["blip2-t5", "llava", pytest.param("blip", marks=pytest.mark.slow), "idefics"])
def test_other_families(name: str, form: str, gpu: tuple[FakeCuda, Any], bundle_of: BundleOf, tmp_path: Path) -> None:
    """An encoder, a window, keys of the picture, pictures between texts."""
    path = copied(bundle_of(name), tmp_path / "bundle")
    write_engines(path, path / KIND, max_rows=9, decoder=form)
    pictures = draw_pictures(3)
    texts = ["a photo of", "what is it ?", "two red cats and a dog"]
    loaded = [Captioner.load(path, backend=backend, threads=1) for backend in ("cpu", "tensorrt")]
    searches: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    for options in searches:
        wanted, got = (
            [
                result.tokens
                for result in captioner.caption_many(pictures, prompts=texts, batch_size=3, max_new_tokens=8, **options)
            ]
            for captioner in loaded
        )
        assert got == wanted


def test_a_bundle_of_engines_alone(gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    """No graph is there, nor looked for; ``auto`` is what the engines were built for."""
    board, parent = copied(tiny_bundle, tmp_path / "board"), Bundle.open(tiny_bundle)
    write_engines(tiny_bundle, board / KIND)
    for path in board.glob("*.onnx*"):
        path.unlink()
    kept = {name: record for name, record in parent.manifest.files.items() if (board / name).is_file()}
    replace(parent.manifest, files=kept, engines_of=parent.sha256).write(board)
    picture = draw_pictures(1)[0]
    wanted = Captioner.load(tiny_bundle, backend="cpu", threads=1).caption(picture, max_new_tokens=6).tokens
    captioner = Captioner.load(board, threads=1)
    assert captioner.caption(picture, max_new_tokens=6).tokens == wanted
    assert captioner.generator.drafts.costs["lookup"].clock is time.perf_counter  # the GPU's time counts as well
    with pytest.raises(BackendError, match=r"contains engines only, .* backend cpu .*; use backend tensorrt"):
        Captioner.load(board, backend="cpu")
    shutil.rmtree(board / KIND)
    with pytest.raises(EngineError, match="neither graphs nor engines"):
        Captioner.load(board)


def test_engines_are_refused_with_the_command_that_builds_them_again(
    gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(tiny_bundle, tmp_path / "bundle")
    with pytest.raises(EngineError, match=f"has no engines for tensorrt; build the engines: blip2edge build {path}"):
        Captioner.load(path, backend="tensorrt")
    directory = write_engines(path, path / KIND, capacity=40)
    monkeypatch.setattr(probe, "nvidia_driver", lambda: Driver("12.6", (Gpu("Orin Nano", 87),)))
    with pytest.raises(EngineError, match=r"built for the GPU Orin, but the GPU here is Orin Nano.*--capacity 40"):
        Captioner.load(path, backend="tensorrt")
    monkeypatch.setattr(probe, "nvidia_driver", lambda: Driver("12.6", problem="no GPU"))
    with pytest.raises(EngineError, match="needs an NVIDIA GPU"):
        Captioner.load(path, backend="tensorrt")
    monkeypatch.setattr(probe, "nvidia_driver", lambda: Driver(problem="none: libcuda.so.1 is not there"))
    with pytest.raises(BackendError, match=r"no working NVIDIA driver here \(none: libcuda"):
        Captioner.load(path, backend="tensorrt")
    monkeypatch.setattr(probe, "nvidia_driver", lambda: DRIVER)
    file = directory / "bridge.engine"
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(BundleIntegrityError, match=r"bridge\.engine does not match engine\.json"):
        Captioner.load(path, backend="tensorrt")


def test_what_does_not_fit_is_told(gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    path = copied(tiny_bundle, tmp_path / "bundle")
    write_engines(path, path / KIND, capacity=16, max_rows=2)
    captioner = Captioner.load(path, backend="tensorrt", threads=1)
    pictures = draw_pictures(3)
    with pytest.raises(BackendError, match=r"3 rows .*max_batch"):
        list(captioner.caption_many(pictures, batch_size=3, max_new_tokens=3))
    with pytest.raises(BackendError, match=r"6 rows|3 rows"):
        captioner.caption(pictures[0], num_beams=3, max_new_tokens=3)


def test_a_failing_call_is_told(gpu: tuple[FakeCuda, Any], tiny_bundle: Path, tmp_path: Path) -> None:
    from blip2edge.runtime.tensorrt.cuda import Cuda, DeviceBuffer

    cuda, _ = gpu
    loaded = Cuda(cuda)
    cuda.cudaMalloc = lambda size: (2,)  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="out of memory; build the engines again with a smaller capacity"):
        DeviceBuffer(loaded, 8)
    with pytest.raises(BackendError, match="invalid argument"):
        loaded.copy(1, 2, 3, loaded.stream())


def test_values_cross_to_the_gpu_and_back() -> None:
    from blip2edge.runtime.tensorrt.cuda import Cuda, Mirror

    for integrated in (False, True):
        cuda = Cuda(FakeCuda(integrated))
        stream, mirror = cuda.stream(), Mirror(cuda, (2, 3), np.dtype(np.float32))
        values = np.arange(6, dtype=np.float32).reshape(2, 3)
        mirror.put(values, stream)
        cuda.synchronize(stream)
        mirror.view((6,))[...] = 0 if not integrated else mirror.view((6,))
        back = mirror.fetch((2, 3), stream)
        cuda.synchronize(stream)
        assert (back == values).all()
        with pytest.raises(ValueError, match="does not fit"):
            mirror.view((7,))
        mirror.free()
        mirror.free()
        assert not cuda.api.memory


def test_a_log_keeps_the_last_messages_alone() -> None:
    trt = fake_tensorrt(FakeCuda(), VERSION)
    logger, messages = make_logger(trt)
    for number in range(MOST_MESSAGES + 5):
        logger.log(trt.ILogger.WARNING, f"warning  {number}")
    logger.log(trt.ILogger.WARNING + 1, "a trifle")
    assert len(messages) == MOST_MESSAGES
    assert messages[-1] == f"warning {MOST_MESSAGES + 4}"
