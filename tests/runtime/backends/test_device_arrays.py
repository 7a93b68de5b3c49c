"""Tensors on the device, tested with the CPU as the device; and providers that are listed but do not work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="checkpoints are drawn with transformers")
pytest.importorskip("onnxruntime", reason="this is about ONNX Runtime")

import onnxruntime

from blip2edge.errors import BackendError
from blip2edge.runtime.backends import onnxruntime_cuda as backend_cuda
from blip2edge.runtime.backends.base import BACKENDS, DeviceArray, OptimizedFile
from blip2edge.runtime.backends.onnxruntime_cuda import DeviceSession
from blip2edge.runtime.captioning.captioner import Captioner
from tests.drawing import draw_pictures

CPU = ["CPUExecutionProvider"]


def on_the_cpu(path: Path, threads: int | None = None, optimized: OptimizedFile | None = None) -> DeviceSession:
    """What ``cuda`` opens, where the device is the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return DeviceSession(onnxruntime, path, options, CPU, ("cpu", 0))


def test_captions_are_those_of_the_cpu_backend(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_cuda, "open_graph", on_the_cpu)
    seen: list[str] = []
    original = DeviceArray._compute

    def watched(self: DeviceArray, graph: bytes, inputs: dict[str, Any]) -> DeviceArray:
        seen.extend(inputs)
        return original(self, graph, inputs)

    monkeypatch.setattr(DeviceArray, "_compute", watched)
    loaded = [Captioner.load(tiny_bundle, backend=name, threads=1) for name in ("cpu", "cuda")]
    pictures = draw_pictures(3)
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.4}):
        texts = [
            [
                result.tokens
                for result in captioner.caption_many(
                    pictures, prompts=["a photo of", None, "two"], batch_size=3, max_new_tokens=8, **options
                )
            ]
            for captioner in loaded
        ]
        assert texts[0] == texts[1]
    assert "rows" in seen  # rows were taken where they are


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rows_and_slots_are_taken_on_the_device(dtype: Any, tiny_bundle: Path) -> None:
    session = on_the_cpu(tiny_bundle / "decoder.onnx")
    values = np.random.default_rng(0).normal(size=(3, 2, 5, 4)).astype(dtype)
    array = DeviceArray(onnxruntime.OrtValue.ortvalue_from_numpy(values), session.run_model)
    rows = np.array([2, 0, 0])
    taken, cut = array[rows], array[:, :, 1:4]
    assert isinstance(taken, DeviceArray)
    assert isinstance(cut, DeviceArray)
    assert (np.asarray(taken) == values[rows]).all()
    assert (np.asarray(cut) == values[:, :, 1:4]).all()
    assert (np.asarray(array[:, :, 5:]) == values[:, :, 5:]).all()
    assert (array[1, 0] == values[1, 0]).all()  # anything else comes from a copy on the host
    assert len(array) == 3
    changed = array.copy()
    changed[...] = 0
    assert (np.asarray(array) == values).all()


def test_a_provider_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path) -> None:
    assert BACKENDS["cuda"].module == "blip2edge.runtime.backends.onnxruntime_cuda"
    backend_cuda.checked_package.cache_clear()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider, only .*blip2edge\[gpu\]"):
            Captioner.load(tiny_bundle, backend="cuda")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    told = SimpleNamespace(ok=False, detail="listed, but fails: no driver", fix="install the driver")
    monkeypatch.setattr(backend_cuda, "check_provider", lambda package, name: told)
    with pytest.raises(BackendError, match=r"listed, but fails: no driver\); install the driver"):
        Captioner.load(tiny_bundle, backend="cuda")
    told.ok = True
    backend_cuda.checked_package.cache_clear()
    with pytest.raises(BackendError, match="fell back to CPUExecutionProvider"):
        backend_cuda.open_with(tiny_bundle / "decoder.onnx", 1, "CUDAExecutionProvider", CPU)
    backend_cuda.checked_package.cache_clear()
