"""A decoder's weights on the GPU: matrices as the bundle stores them, vectors in fp32.

Floating-point matrices in fp32 are rounded to fp16; ``optimize`` prints this and records it in the copy. Integers and
their scales are copied as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BundleError, option
from blip2edge.runtime.cuda.device.interface import KernelDevice
from blip2edge.runtime.cuda.layout import DecoderLayout, Stored, StoredMatrix, StoredNorm
from blip2edge.runtime.cuda.products import RowProduct


@dataclass(frozen=True)
class MatrixWeights:
    """A matrix ``[K, N]`` on the GPU; the address of a missing bias or missing scales is 0.

    Attributes:
        bits: Bits of a value: 16, 8 or 4.
        depth: K, the number of rows.
        width: N, the number of columns.
        block: Number of rows that share a scale; 0 for fp16.
        scale: C++ type of the scales.
        weight: Address of the values.
        scales: Address of the scales.
        bias: Address of the bias, fp32 ``[N]``.
    """

    bits: Literal[4, 8, 16]
    depth: int
    width: int
    block: int
    scale: Literal["float", "__half"]
    weight: int
    scales: int
    bias: int

    @property
    def form(self) -> tuple[int, int, str]:
        """Returns bits, block and scale type, which must be equal for all matrices of one launch."""
        return self.bits, self.block, self.scale

    def product(self, rows: int, widths: Sequence[int], **given: Any) -> RowProduct:
        """Describes the multiplication of ``rows`` rows by matrices of this format and these widths."""
        return RowProduct(self.bits, rows, self.depth, tuple(widths), self.block, self.scale, **given)


@dataclass(frozen=True)
class NormWeights:
    """A norm on the GPU; ``weight`` and ``bias`` are addresses, 0 for no bias."""

    kind: str
    weight: int
    bias: int
    epsilon: float


@dataclass(frozen=True)
class LayerOnDevice:
    """A layer on the GPU, as in :class:`blip2edge.runtime.cuda.layout.LayerLayout`."""

    attention_norm: NormWeights
    query: MatrixWeights
    key: MatrixWeights
    value: MatrixWeights
    out: MatrixWeights
    feed_forward_norm: NormWeights
    gate: MatrixWeights | None
    up: MatrixWeights
    down: MatrixWeights


@dataclass(frozen=True)
class DecoderWeights:
    """All weights of a decoder on the GPU.

    Attributes:
        layout: Sizes of the decoder.
        layers: The layers.
        final_norm: The norm before the head.
        head: The head.
        positions: Address of the table of learned positions, fp32; 0 for none.
        rotation: Address of the table of rotary positions, fp32; 0 for none.
    """

    layout: DecoderLayout
    layers: tuple[LayerOnDevice, ...]
    final_norm: NormWeights
    head: MatrixWeights
    positions: int
    rotation: int


def load_weights(layout: DecoderLayout, directory: Path, device: KernelDevice) -> DecoderWeights:
    """Copies a decoder's weights to the GPU.

    Args:
        layout: The decoder.
        directory: Directory of the bundle.
        device: The GPU.

    Raises:
        BundleError: A matrix in fp32 has values that are too large for fp16.
    """
    return _loaded(layout, _Loader(directory, device))


def planned_weights(layout: DecoderLayout) -> DecoderWeights:
    """Describes a decoder's weights without a GPU: all addresses are 0. This is enough to plan launches."""
    return _loaded(layout, _Loader(Path(), None))


def _loaded(layout: DecoderLayout, loader: _Loader) -> DecoderWeights:
    layers = tuple(
        LayerOnDevice(
            attention_norm=loader.norm(one.attention_norm),
            query=loader.matrix(one.query),
            key=loader.matrix(one.key),
            value=loader.matrix(one.value),
            out=loader.matrix(one.out),
            feed_forward_norm=loader.norm(one.feed_forward_norm),
            gate=None if one.gate is None else loader.matrix(one.gate),
            up=loader.matrix(one.up),
            down=loader.matrix(one.down),
        )
        for one in layout.layers
    )
    rotation = 0 if layout.rotation is None else loader.put(np.ascontiguousarray(layout.rotation, np.float32))
    return DecoderWeights(
        layout,
        layers,
        loader.norm(layout.final_norm),
        loader.matrix(layout.head),
        loader.floats(layout.positions),
        rotation,
    )


class _Loader:
    def __init__(self, directory: Path, device: KernelDevice | None) -> None:
        self._directory, self._device = directory, device

    def put(self, values: Array) -> int:
        if self._device is None:
            return 0
        address = self._device.allocate(values.nbytes)
        self._device.write(address, values)
        return address

    def floats(self, stored: Stored | None) -> int:
        """Copies a floating-point tensor to the GPU in fp32; returns its address, 0 for None."""
        if stored is None or self._device is None:
            return 0
        return self.put(stored.read(self._directory).astype(np.float32))

    def norm(self, stored: StoredNorm) -> NormWeights:
        return NormWeights(stored.kind, self.floats(stored.weight), self.floats(stored.bias), stored.epsilon)

    def matrix(self, stored: StoredMatrix) -> MatrixWeights:
        depth, width = stored.weight.shape
        scale = "float" if stored.scales is not None and stored.scales.dtype == "float32" else "__half"
        bits = {"int8": 8, "int4": 4}.get(stored.weight.dtype, 16)
        weight = scales = 0
        if self._device is not None:
            values = stored.weight.read(self._directory)
            weight = self.put(values if bits < 16 else halved(values, stored.weight))
            scales = 0 if stored.scales is None else self.put(stored.scales.read(self._directory))
        bias = self.floats(stored.bias)
        return MatrixWeights(bits, depth, width, stored.block, scale, weight, scales, bias)  # type: ignore[arg-type]


def halved(values: Array, stored: Stored) -> Array:
    """Rounds the values of a matrix to fp16; ``stored`` describes the matrix for the error message.

    Raises:
        BundleError: A value is too large for fp16.
    """
    with np.errstate(over="ignore"):
        rounded: Array = values.astype(np.float16)
    if stored.dtype == "float32" and not np.isfinite(rounded).all():
        largest = float(np.abs(values).max())
        raise BundleError(
            f"expected weights up to 65504 (fp16), found {largest:.3g} in {stored.file} at byte {stored.offset}",
            f"use another {option('backend')}",
        )
    return rounded
