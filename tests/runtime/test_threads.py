"""Rules of ``Session`` on every backend: eight threads get the tokens of one thread; closed sessions refuse."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="most backends compute in ONNX Runtime")

from blip2edge.errors import BackendError
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.backends import onnxruntime_cuda
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.decoding.kv.in_place import InPlaceDecoder
from tests.drawing import draw_pictures
from tests.runtime.backends.test_device_arrays import on_the_cpu

THREADS, ROUNDS = 8, 3
PROMPTS = ("a photo of", None, "what is it ?", "Question: what is two? Short answer:", "red dog")
OPTIONS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2}, {"temperature": 0.9, "seed": 4})

Load = Callable[[Path, pytest.MonkeyPatch], Captioner]


def portable(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    return Captioner.load(bundle, backend="cpu", threads=1)


def optimized_copy(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    optimize(bundle, "cpu")
    captioner = Captioner.load(bundle, backend="cpu", threads=1)
    assert isinstance(captioner.generator.language.decoder, InPlaceDecoder)
    return captioner


def openvino(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    pytest.importorskip("openvino", reason="pip install 'blip2edge[openvino]'")
    return Captioner.load(bundle, backend="openvino", threads=1)


def cuda(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    """The code of ``cuda`` where the device is the CPU."""
    monkeypatch.setattr(onnxruntime_cuda, "open_graph", on_the_cpu)
    return Captioner.load(bundle, backend="cuda", threads=1)


def tensorrt(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Captioner:
    pytest.importorskip("onnx_ir", reason="engines are made of graphs with onnx_ir")
    from blip2edge.runtime.backends.engine_files import KIND
    from tests.engine.fake_engines import plug_in, write_engines

    plug_in(monkeypatch)
    write_engines(bundle, bundle / KIND)
    return Captioner.load(bundle, backend="tensorrt", threads=1)


BACKENDS = pytest.mark.parametrize("load", [portable, optimized_copy, openvino, cuda, tensorrt])


@BACKENDS
def test_eight_threads_give_the_tokens_of_one(
    load: Load, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = load(shutil.copytree(tiny_bundle, tmp_path / "bundle"), monkeypatch)
    pictures = draw_pictures(len(PROMPTS), seed=2)
    calls = [
        (picture, prompt, options) for picture, prompt in zip(pictures, PROMPTS, strict=True) for options in OPTIONS
    ]

    def caption(number: int) -> tuple[int, ...]:
        picture, prompt, options = calls[number]
        return captioner.caption(picture, prompt=prompt, max_new_tokens=10, **options).tokens

    wanted = [caption(number) for number in range(len(calls))]
    assert len(set(wanted)) > len(PROMPTS)
    start = threading.Barrier(THREADS)

    def work(thread: int) -> list[int]:
        """The numbers of the calls that gave other tokens; each thread begins with another call."""
        start.wait(timeout=60)
        order = [(thread * 2 + number) % len(calls) for number in range(ROUNDS * len(calls))]
        return [number for number in order if caption(number) != wanted[number]]

    with ThreadPoolExecutor(THREADS) as pool:
        wrong = list(pool.map(work, range(THREADS)))
    assert wrong == [[]] * THREADS


@BACKENDS
def test_a_closed_session_runs_nothing(
    load: Load, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner = load(shutil.copytree(tiny_bundle, tmp_path / "bundle"), monkeypatch)
    session, vision = captioner.graphs("bridge"), captioner.encoder.images.vision
    pixels = captioner.encoder.images.preprocessing.batch(draw_pictures(1))
    inputs = {"image_embeds": vision.run({"pixel_values": pixels})["image_embeds"]}
    assert session.run(inputs)
    captioner.close()
    for closed, given in ((vision, {"pixel_values": pixels}), (session, inputs)):
        with pytest.raises(BackendError, match="this graph is closed; load the bundle again"):
            closed.run(given)
