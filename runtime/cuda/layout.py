"""Describes a decoder for the kernels: sizes, norms, and the place of each weight in the bundle's files.

``optimization/cuda_kernels/layout.py`` makes this description from the decoder's graph. The formula of a layer is

    x = x + out(attention(query(n), key(n), value(n)))      n = attention_norm(x)
    x = x + down(f(n))                                      n = feed_forward_norm(x)

with ``f(n) = relu(up(n))`` (OPT) or ``silu(gate(n)) * up(n)`` (Llama). The logits are ``head(final_norm(x))``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.cuda.products import CHUNK

NUMPY = {"float32": np.float32, "float16": np.float16, "int8": np.int8, "int4": np.uint8}
"""NumPy's dtypes of stored values; two 4-bit values are one byte, the first value in the lower half."""

FLOATS = ("float32", "float16")


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

    @property
    def bytes(self) -> int:
        """Returns the size of the tensor in the file, in bytes."""
        count = math.prod(self.shape)
        return (count + 1) // 2 if self.dtype == "int4" else count * np.dtype(NUMPY[self.dtype]).itemsize

    def read(self, directory: Path) -> Array:
        """Maps the tensor's values into memory; 4-bit values are returned as bytes, two values in each byte."""
        shape = (self.bytes,) if self.dtype == "int4" else self.shape
        mapped: Array = np.memmap(directory / self.file, NUMPY[self.dtype], "r", self.offset, shape)
        return mapped


@dataclass(frozen=True)
class StoredMatrix:
    """A weight matrix ``[K, N]``. Integer weights have a scale for each block of rows in each column.

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

    @property
    def fault(self) -> str:
        """Returns why no kernel can multiply by this matrix; empty if a kernel can."""
        shape, dtype, scales = self.weight.shape, self.weight.dtype, self.scales
        if len(shape) != 2:
            return f"has the shape {list(shape)}, not that of a matrix"
        if scales is None:
            return "" if dtype in FLOATS else f"is in {dtype} without scales"
        if dtype in FLOATS or scales.dtype not in FLOATS:
            return f"is in {dtype} with scales in {scales.dtype}"
        if len(scales.shape) != 2 or scales.shape[1] != shape[1] or shape[0] % max(scales.shape[0], 1):
            return f"has the shape {list(shape)} and scales of the shape {list(scales.shape)}"
        if self.block % CHUNK:
            return f"is in blocks of {self.block} rows, not of a multiple of {CHUNK}"
        return f"has rows of {shape[1]} 4-bit values, not an even number" if self.is_odd else ""

    @property
    def is_odd(self) -> bool:
        """Returns whether the rows of 4-bit values have an odd length, so that a row would end within a byte."""
        return self.weight.dtype == "int4" and bool(self.weight.shape[-1] % 2)


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
        window: Number of last slots that a token attends to, its own slot included; 0 for no limit.
        positions: Table of learned positions ``[P, D]``; None for rotary positions.
        position_offset: Number of unused rows at the start of ``positions``.
        rotation: float32 ``[positions, d]``, d / 2 cosines and d / 2 sines; None for learned positions.
        layers: The layers.
        final_norm: The norm before the head.
        head: The matrix ``[D, V]`` that computes the logits of V tokens.
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

    def stored(self) -> Iterator[Stored]:
        """Yields every tensor in the bundle's files."""
        norms = [
            self.final_norm,
            *(norm for one in self.layers for norm in (one.attention_norm, one.feed_forward_norm)),
        ]
        for parts in (*norms, *(matrix for matrix, _, _ in self.matrices())):
            yield from (one for one in vars(parts).values() if isinstance(one, Stored))
        if self.positions is not None:
            yield self.positions

    def matrices(self) -> Iterator[tuple[StoredMatrix, int, int]]:
        """Yields every matrix with the sizes ``K, N`` that it must have."""
        queries, keys, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.inner
        for one in self.layers:
            yield one.query, self.width, queries
            yield one.key, self.width, keys
            yield one.value, self.width, keys
            yield one.out, queries, self.width
            if one.gate is not None:
                yield one.gate, self.width, inner
            yield one.up, self.width, inner
            yield one.down, inner, self.width
        yield self.head, self.width, self.vocabulary

    def check(self) -> None:
        """Checks that the sizes fit each other and the kernels.

        Raises:
            ValueError: A size does not fit the other sizes or the kernels; the message names the tensor.
        """
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads do not share {self.kv_heads} heads of keys evenly")
        for matrix, depth, width in self.matrices():
            if matrix.weight.shape != (depth, width) or matrix.fault:
                fault = matrix.fault or f"has the shape {list(matrix.weight.shape)}"
                raise ValueError(f"expected a matrix [{depth}, {width}], got a matrix that {fault}")
            if matrix.bias is not None and matrix.bias.shape != (width,):
                raise ValueError(f"expected a bias of {width} values, got the shape {list(matrix.bias.shape)}")
        for norm in (self.final_norm, *(n for one in self.layers for n in (one.attention_norm, one.feed_forward_norm))):
            if any(one is not None and one.shape != (self.width,) for one in (norm.weight, norm.bias)):
                raise ValueError(f"expected weight and bias of each norm to have {self.width} values")
        if self.rotation is not None and self.rotation.shape[1:] != (self.head_dim,):
            raise ValueError(f"expected rotary positions [P, {self.head_dim}], got {list(self.rotation.shape)}")
        if self.positions is not None and self.positions.shape[1:] != (self.width,):
            raise ValueError(f"expected learned positions [P, {self.width}], got {list(self.positions.shape)}")

    @property
    def group(self) -> int:
        """Returns the number of query heads that share a head of keys and values."""
        return self.heads // self.kv_heads

    @property
    def max_positions(self) -> int:
        """Returns the longest context in tokens."""
        if self.positions is not None:
            return self.positions.shape[0] - self.position_offset
        return 0 if self.rotation is None else self.rotation.shape[0]

    @property
    def inner(self) -> int:
        """Returns the width of the feed-forward layer."""
        return self.layers[0].up.weight.shape[1]

    @property
    def vocabulary(self) -> int:
        """Returns V, the number of tokens in the vocabulary."""
        return self.head.weight.shape[1]
