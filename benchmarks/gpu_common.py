"""Functions that several steps of ``gpu.py`` use: the picture, a model of published size, and the clock."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import torch
from random_checkpoint import published, shrunk
from reporting import ROOT

sys.path.insert(0, str(ROOT))  # the simulated GPU of the tests

MODEL = "blip2-opt-2.7b"
TOKENS = 20  # of each caption
ROUNDS = 5
MIB = 1 << 20
DEVICES = {True: "cpu", False: "cuda"}  # torch's device, by whether this is a dry run


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
