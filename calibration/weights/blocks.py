"""Rounds matrices to symmetric integers in blocks: the input axis is divided into blocks that share a scale.

A graph computes ``weight[k, n] = integers[k, n] * scales[k // block, n]``, ONNX's DequantizeLinear with
``axis=0`` and ``block_size`` (https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html, version 21). Matrices
have MatMul's layout ``[K, N]``: K inputs, N outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float32]
Integers = NDArray[np.int8]

BLOCKS = {4: (128, 64, 32, 16), 8: (64, 32, 16)}
"""Block sizes (rows that share a scale) by the number of bits, the preferred first.

TensorRT documents 64 and 128 for INT4; 16 and 32 are for widths that 64 does not divide. A block must divide the width,
because TensorRT's parser takes no partial blocks (it derives ``block_size`` from the shape of the scales). ONNX Runtime
has a fused kernel for blocks whose size is a power of two from 16 on. Only ONNX Runtime and TensorRT-RTX run 8-bit
blocks; 64 is the fastest there.
"""

SHRINKS = tuple(np.linspace(1.0, 0.5, 26))
"""Factors of a block's largest value that are tried in the search of its scale."""


@dataclass(frozen=True)
class BlockFormat:
    """The integer format of a matrix whose rows are quantized in blocks.

    Attributes:
        bits: Bits of an integer, 4 or 8.
        block: Number of rows that share a scale.
    """

    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in BLOCKS or self.block not in BLOCKS[self.bits]:
            raise ValueError(
                f"expected one of the block sizes {BLOCKS}, got {self.bits} bits in blocks of {self.block}"
            )

    @property
    def high(self) -> int:
        """The largest integer of the format: 7 for 4 bits, 127 for 8 bits."""
        return (1 << (self.bits - 1)) - 1

    @property
    def low(self) -> int:
        """The smallest integer of the format: -8 for 4 bits, -127 for 8 bits."""
        return -self.high - 1 if self.bits == 4 else -self.high

    @classmethod
    def for_width(cls, width: int, bits: int, most: int = 0) -> BlockFormat | None:
        """Returns the preferred format for a matrix ``[K, N]``; None if no block size divides K.

        Args:
            width: K, the number of rows, which are divided into blocks.
            bits: Bits of an integer: 4 or 8.
            most: The largest block; 0 for the largest of :data:`BLOCKS`.
        """
        fitting = [block for block in BLOCKS[bits] if width % block == 0 and block <= (most or block)]
        return cls(bits, fitting[0]) if fitting else None


def largest(weight: Floats, form: BlockFormat) -> Floats:
    """Returns the largest absolute value of each block of a matrix: ``[K, N]`` to ``[K / block, N]``."""
    found: Floats = np.abs(_blocks(weight, form)).max(axis=1)
    return found


def plain_scales(weight: Floats, form: BlockFormat) -> Floats:
    """Computes scales ``[K / block, N]`` that map each block's largest value to the largest integer."""
    scales = largest(weight, form) / np.float32(form.high)
    return np.where(scales > 0, scales, np.float32(1))  # a block of zeros may have any scale


def searched_scales(weight: Floats, form: BlockFormat, importance: Floats | None = None) -> Floats:
    """Finds the scale of each block with the least rounding error: the plain scale times one of :data:`SHRINKS`.

    Args:
        weight: The matrix, ``[K, N]``.
        form: The integer format.
        importance: Factor on the error of each input, ``[K]``: the mean square of its activation; None for 1.

    Returns:
        Scales ``[K / block, N]``.
    """
    blocks = _blocks(weight, form)
    cost = np.ones(weight.shape[0], np.float32) if importance is None else importance.astype(np.float32)
    cost = cost.reshape(-1, form.block, 1)
    plain = plain_scales(weight, form)
    best, least = plain, np.full(plain.shape, np.inf, np.float32)
    for shrink in SHRINKS:
        scales = plain * np.float32(shrink)
        rounded = np.clip(np.rint(blocks / scales[:, None]), form.low, form.high)
        error = (np.square(rounded * scales[:, None] - blocks) * cost).sum(axis=1)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best


def rounded(weight: Floats, scales: Floats, form: BlockFormat) -> Integers:
    """Rounds a matrix ``[K, N]`` to the nearest integers, int8 ``[K, N]``, with scales ``[K / block, N]``."""
    spread = np.repeat(scales, form.block, axis=0)
    nearest: Integers = np.clip(np.rint(weight / spread), form.low, form.high).astype(np.int8)
    return nearest


def restored(integers: Integers, scales: Floats, form: BlockFormat) -> Floats:
    """Computes the weights ``[K, N]`` in float32 from integers and scales, in the same way as DequantizeLinear."""
    spread: Floats = np.repeat(scales.astype(np.float32), form.block, axis=0)
    return integers.astype(np.float32) * spread


def packed(integers: Integers, bits: int) -> NDArray[np.uint8]:
    """Packs integers into bytes in ONNX's layout, flat; two 4-bit values per byte, the first in the lower half."""
    flat: NDArray[np.uint8] = np.ascontiguousarray(integers).reshape(-1).view(np.uint8)
    if bits == 8:
        return flat
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    pairs: NDArray[np.uint8] = np.bitwise_or(flat[0::2] & np.uint8(0x0F), flat[1::2] << np.uint8(4))
    return pairs


def _blocks(weight: Floats, form: BlockFormat) -> Floats:
    """Reshapes ``[K, N]`` to ``[K / block, block, N]``."""
    return weight.reshape(-1, form.block, weight.shape[1])
