"""What a decode step costs: the bytes that it reads, and its kernel launches."""

from __future__ import annotations

from blip2edge.runtime.cuda.layout import NUMPY, DecoderLayout, Stored
from blip2edge.runtime.cuda.plan import FLOAT, HALF

LAYER_LAUNCHES = 7
"""Launches of a layer: norm; query, key and value; attention; output; norm; up (and gate); down."""

OTHER_LAUNCHES = 3
"""Other launches of a step: the last norm, the head, the choice of the token."""


def step_launches(layers: int) -> int:
    """Returns the number of kernel launches in a greedy step.

    Query, key and value must have the same format, and so must gate and up; else there are more launches.
    """
    return LAYER_LAUNCHES * layers + OTHER_LAUNCHES


def step_bytes(layout: DecoderLayout, context: int) -> int:
    """Returns the bytes of weights, keys and values that a step of one row reads.

    Args:
        layout: The decoder.
        context: Number of tokens in the cache.
    """
    weights = sum(
        _on_device(part)
        for matrix, _, _ in layout.matrices()
        for part in (matrix.weight, matrix.scales, matrix.bias)
        if part is not None
    )
    cache = 2 * HALF * len(layout.layers) * layout.kv_heads * layout.head_dim * context
    return weights + cache


def _on_device(stored: Stored) -> int:
    """Returns the bytes of a tensor on the GPU, where fp32 matrices are stored in fp16, and all vectors in fp32."""
    if len(stored.shape) == 1:
        return FLOAT * stored.shape[0]
    return stored.bytes // 2 if NUMPY[stored.dtype] is NUMPY["float32"] else stored.bytes
