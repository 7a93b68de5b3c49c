"""What a decode step costs: the bytes that it reads, and its kernel launches."""

from __future__ import annotations

from blip2edge.runtime.cuda.layout import NUMPY, DecoderLayout, Stored
from blip2edge.runtime.cuda.plan import FLOAT, HALF

LAYER_LAUNCHES = 7
"""Launches of a layer: norm; query, key and value; attention; output; norm; up (and gate); down."""

OTHER_LAUNCHES = 3
"""Other launches of a step: the last norm, the head, the choice of the token."""


def step_launches(layers: int) -> int:
    """Returns the number of kernels of a greedy step, if query, key and value (gate and up) have one format."""
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
    """Returns the bytes of a tensor on the GPU: matrices in fp32 are in fp16 there, and vectors in fp32."""
    if len(stored.shape) == 1:
        return FLOAT * stored.shape[0]
    return stored.bytes // 2 if NUMPY[stored.dtype] is NUMPY["float32"] else stored.bytes
