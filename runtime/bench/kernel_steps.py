"""Predicts a decode step of ``cuda-decoder``: bytes read, kernel launches, and the time to read the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from blip2edge.runtime.bench.devices import Board
from blip2edge.runtime.bench.plan import PlanOptions
from blip2edge.runtime.cuda.plan import HALF
from blip2edge.runtime.cuda.speed import step_launches
from blip2edge.shapes.model_shape import ModelShape

FORMATS: Mapping[str, str] = {"fp16": "fp16", "int8": "int8", "int4": "int4"}
"""Precisions of a bundle, each with the format of the weights on the GPU. The kernels round fp32 to fp16."""


@dataclass(frozen=True)
class KernelStep:
    """A decode step in one precision.

    Attributes:
        precision: Precision of the bundle.
        bytes: Bytes of weights, keys and values that the step reads, in the middle of the caption.
        launches: Number of kernels, all of them in one CUDA graph.
        least_ms: Milliseconds to read the bytes at the board's full bandwidth: a bound, not a measured time.
    """

    precision: str
    bytes: int
    launches: int
    least_ms: float

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON object for ``plan --json``."""
        return {**vars(self), "least_ms": round(self.least_ms, 3), "measured": False}


def kernel_steps(shape: ModelShape, device: Board, options: PlanOptions) -> tuple[KernelStep, ...]:
    """Predicts a decode step in each precision; empty for a CPU, and for decoders that the CUDA kernels cannot run.

    Args:
        shape: Sizes of the model's layers.
        device: The board.
        options: Lengths of the prompt and of the caption.
    """
    if device.is_cpu or not shape.decoder.kernels:
        return ()
    tokens = shape.tokens(options.frames or shape.frames, options.prompt_tokens)
    context = tokens["context"] + 1 + (options.new_tokens - 1) // 2
    cache = shape.cache.bytes(context, 0, HALF)
    steps = []
    for precision, weights in FORMATS.items():
        size = int(shape.decoder.bytes(weights) + cache)
        steps.append(KernelStep(precision, size, step_launches(shape.cache.layers), size / device.bytes_per_s * 1e3))
    return tuple(steps)
