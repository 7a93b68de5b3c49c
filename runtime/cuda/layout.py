"""Describes a decoder for the kernels: sizes, norms, and the place of each weight in the bundle's files.

``optimization/decoder_layout.py`` makes this description from the decoder's graph. The formula of a layer is

    x = x + out(attention(query(n), key(n), value(n)))      n = attention_norm(x)
    x = x + down(f(n))                                      n = feed_forward_norm(x)

with ``f(n) = relu(up(n))`` (OPT) or ``silu(gate(n)) * up(n)`` (Llama). The logits are ``head(final_norm(x))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blip2edge.bundle.dtypes import Array

NUMPY = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "int4": np.uint8}
"""NumPy's dtypes of stored values; two 4-bit values are one byte, the first value in the lower half."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file of the bundle.

    Attributes:
        file: Name of the file.
        offset: Position of the tensor's first byte in the file.
        dtype: A key of :data:`NUMPY`.
        shape: The tensor's shape.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    def read(self, directory: Path) -> Array:
        """Maps the tensor's values into memory; 4-bit values are returned as bytes, two values in each byte."""
        count = int(np.prod(self.shape))
        shape = ((count + 1) // 2,) if self.dtype == "int4" else self.shape
        mapped: Array = np.memmap(directory / self.file, NUMPY[self.dtype], "r", self.offset, shape)
        return mapped


@dataclass(frozen=True)
class StoredMatrix:
    """A weight matrix ``[K, N]``. Integer weights have a scale for each block of rows and each column.

    Attributes:
        weight: The values.
        scales: The scales, ``[K / block, N]``; None in floating point.
        bias: The bias ``[N]``; None without bias.
    """

    weight: Stored
    scales: Stored | None = None
    bias: Stored | None = None

    @property
    def block(self) -> int:
        """Returns the number of rows that share a scale; 0 for floating-point weights."""
        return self.weight.shape[0] // self.scales.shape[0] if self.scales is not None else 0


@dataclass(frozen=True)
class StoredNorm:
    """A LayerNorm, or an RMSNorm: ``kind`` is one of :data:`blip2edge.runtime.cuda.steps.NORMS`."""

    kind: str
    weight: Stored
    bias: Stored | None
    epsilon: float


@dataclass(frozen=True)
class LayerLayout:
    """The weights of a layer; ``gate`` is None if ReLU is the activation."""

    attention_norm: StoredNorm
    query: StoredMatrix
    key: StoredMatrix
    value: StoredMatrix
    out: StoredMatrix
    feed_forward_norm: StoredNorm
    gate: StoredMatrix | None
    up: StoredMatrix
    down: StoredMatrix


@dataclass(frozen=True, eq=False)
class DecoderLayout:
    """A decoder of the OPT or Llama kind.

    Attributes:
        width: D, width of the residual stream.
        heads: H, query heads of a layer.
        kv_heads: G, heads of keys and values.
        head_dim: d, width of a head.
        scale: Factor on the attention scores.
        window: Number of last slots that a token attends to, its own slot included; 0 for all slots up to it.
        positions: Table of learned positions ``[P, D]``; None for rotary positions.
        position_offset: Number of unused rows at the start of ``positions``.
        rotation: float32 ``[positions, d]``, d / 2 cosines and d / 2 sines; None for learned positions.
        layers: The layers.
        final_norm: The norm before the head.
        head: The matrix ``[D, V]``.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int
    positions: Stored | None
    position_offset: int
    rotation: Array | None
    layers: tuple[LayerLayout, ...]
    final_norm: StoredNorm
    head: StoredMatrix

    @property
    def group(self) -> int:
        """Returns the number of query heads that share a head of keys and values."""
        return self.heads // self.kv_heads

    @property
    def inner(self) -> int:
        """Returns the width of the feed-forward layer."""
        return self.layers[0].up.weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """Returns V, the number of tokens in the vocabulary."""
        return self.head.weight.shape[1]
