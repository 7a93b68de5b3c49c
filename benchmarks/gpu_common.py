"""Functions that several steps of ``gpu.py`` use: prepared files, the picture, a model of published size, the clock."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import torch
from random_checkpoint import published, shrunk
from reporting import ROOT

from blip2edge.runtime.backends import onnxruntime_cuda
from blip2edge.runtime.backends.base import OptimizedFile
from blip2edge.runtime.backends.onnxruntime_cuda import CAPTURE, DeviceSession, open_on_host

sys.path.insert(0, str(ROOT))  # the simulated GPU of the tests
BUILD = ROOT / "build"
BUNDLES, TRUE_SIZE, KERNELS = BUILD / "gpu-bundles", BUILD / "gpu-true-size", BUILD / "gpu-kernels"
"""The folders that ``gpu_prepare.py`` makes; they are copied to a machine without a network."""

MODEL = "blip2-opt-2.7b"
TOKENS = 20  # of each caption
ROUNDS = 5
MIB = 1 << 20
DEVICES = {True: "cpu", False: "cuda"}  # torch's device, by whether this is a dry run


@contextmanager
def prepared(folder: Path, dry: bool, make: Callable[[Path], None]) -> Iterator[Path]:
    """Yields a folder of ``gpu_prepare.py``; if it was not made, yields a temporary folder that ``make`` fills."""
    if folder.is_dir() and not dry:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        make(Path(scratch))
        yield Path(scratch)


@contextmanager
def cuda_sessions(dry: bool) -> Iterator[dict[str, DeviceSession]]:
    """Yields a dict of sessions of the backend ``cuda``, by graph name; each session is added when it is opened.

    In a dry run, the backend's code runs with ONNX Runtime's CPU provider, and with the CPU as the device.
    """
    opened: dict[str, DeviceSession] = {}
    original = onnxruntime_cuda.open_with

    def open_with(
        path: Path, threads: int | None, provider: str, providers: list[Any], optimized: OptimizedFile | None = None
    ) -> DeviceSession:
        if dry:
            session = open_on_host(path, optimized)
            session.captures = any(options.get(CAPTURE) == "1" for _, options in providers)
        else:
            session = original(path, threads, provider, providers, optimized)
        opened[path.stem] = session
        return session

    with mock.patch.object(onnxruntime_cuda, "open_with", open_with):
        yield opened


def picture() -> PIL.Image.Image:
    """Makes the picture that the steps caption: noise, 640 × 480 pixels."""
    return PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8))


def synchronize(dry: bool) -> None:
    """Waits until the GPU is idle."""
    if not dry:
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], object], dry: bool, rounds: int = ROUNDS) -> list[float]:
    """Calls a function several times after a warm-up call; returns the wall seconds of each call.

    The script waits until the GPU is idle before and after each call.
    """
    call()
    found = []
    for _ in range(rounds):
        synchronize(dry)
        start = time.perf_counter()
        call()
        synchronize(dry)
        found.append(time.perf_counter() - start)
    return found


def peer_model(dry: bool) -> tuple[Any, dict[str, torch.Tensor]]:
    """Makes transformers' model of the published size, with random weights on the device, and the model's inputs."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    values = shrunk(published(MODEL)) if dry else published(MODEL)
    dtype = torch.float32 if dry else torch.float16
    torch.manual_seed(0)
    with torch.device(DEVICES[dry]):
        torch.set_default_dtype(dtype)
        model = Blip2ForConditionalGeneration(Blip2Config.from_dict(values)).eval()
        torch.set_default_dtype(torch.float32)
    size, slots = values["vision_config"]["image_size"], values["num_query_tokens"]
    image = values["image_token_index"]
    inputs = {
        "pixel_values": torch.randn(1, 3, size, size, device=DEVICES[dry], dtype=dtype),
        "input_ids": torch.tensor([[image] * slots + [2, 4, 5]], device=DEVICES[dry]),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return model, inputs


def peer_caption(
    model: Any, inputs: dict[str, torch.Tensor], image: PIL.Image.Image, **generation: Any
) -> Callable[[], Any]:
    """Returns a function that writes a caption of :data:`TOKENS` tokens with transformers, preprocessing included."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    size = inputs["pixel_values"].shape[-1]
    processor = BlipImageProcessorPil(size={"height": size, "width": size})

    def caption() -> Any:
        pixels = processor(images=image, return_tensors="pt")["pixel_values"]
        given = {**inputs, "pixel_values": pixels.to(model.device, model.dtype)}
        with torch.inference_mode():
            forced = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
            return model.generate(**given, **forced, **generation)

    return caption


def compiled_options(dry: bool) -> dict[str, Any]:
    """Options of ``generate``: a static KV cache, with which transformers compiles the step with ``reduce-overhead``.

    In a dry run nothing is compiled.
    """
    return {"cache_implementation": "static", **({"disable_compile": True} if dry else {})}
