"""Turns matrix multiplications with block-quantised weights into MatMulNBits nodes of ONNX Runtime.

Several multiplications of the same value become one node. Decoding reads every weight once for each token, so small
weights save time. The kernel rounds activations to int8 with a scale for each row and block, so the result of a row
does not depend on the other rows of the batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import (
    Array,
    constant,
    dims,
    initializer,
    insert,
    producer,
    replace,
    with_bias,
)
from blip2edge.optimization.passes.integers import quantised_products

INT8_COMPUTE = 4
"""MatMulNBits' ``accuracy_level``: activations are rounded to int8 by block."""

BITS = {ir.DataType.INT8: 8, ir.DataType.INT4: 4}
LARGEST_BLOCK = 256
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class BlockWeights:
    """A block-quantised weight of a matrix multiplication: the rows of a block share a scale.

    Attributes:
        name: The initializer's name.
        integers: Quantised values, int8 ``[K, N]``.
        scales: Scales of the blocks, float32 ``[K / block, N]``.
        bits: Bits of each quantised value, 4 or 8.
        bias: Bias ``[N]`` that is added to the result; None for none.
    """

    name: str
    integers: Array
    scales: Array
    bits: int
    bias: Array | None

    @property
    def block(self) -> int:
        """Number of rows that share a scale."""
        return len(self.integers) // len(self.scales)


@dataclass(frozen=True)
class _Found:
    """A matrix multiplication with a block-quantised weight.

    ``source`` is the input, ``matrix`` the weight, and ``node`` the last node: the addition of the bias, or the MatMul.
    """

    source: ir.Value
    matrix: BlockWeights
    node: ir.Node

    @property
    def out(self) -> ir.Value:
        """The result of the multiplication, after the addition of the bias."""
        return self.node.outputs[0]


def use_block_kernels(
    model: ir.Model, *, columns_too: bool = False, accuracy: int = INT8_COMPUTE, fused_bias: bool = True
) -> int:
    """Replaces matrix multiplications with block-quantised weights by MatMulNBits nodes.

    Matrix multiplications that read the same value become one node.

    Args:
        model: The graph, after ``optimization.graph.prepare``.
        columns_too: Whether to replace also multiplications with int8 activations and one scale for each column. The
            kernel does not use the recorded ranges of these activations.
        accuracy: ``accuracy_level`` of the kernel; with 0, activations are not rounded.
        fused_bias: Whether the kernel adds the bias; else an addition stays after it, as older CUDA kernels require.

    Returns:
        The number of replaced matrix multiplications.
    """
    found = [found for node in model.graph if (found := _block_product(node, fused_bias)) is not None]
    if columns_too:
        found += _column_products(model)
    groups: dict[tuple[str, int, int, int], list[_Found]] = defaultdict(list)
    for one in found:
        matrix = one.matrix
        key = (str(one.source.name), matrix.bits, matrix.block, len(matrix.integers))
        groups[key].append(one)
    for group in groups.values():
        _replace(model.graph, group, accuracy)
    return len(found)


def _block_product(node: ir.Node, fused_bias: bool) -> _Found | None:
    weight = producer(node.inputs[1], "DequantizeLinear") if node.op_type == "MatMul" else None
    if weight is None or "block_size" not in weight.attributes or node.inputs[0] is None:
        return None
    block = weight.attributes["block_size"].as_int()
    integers, scales = constant(weight.inputs[0]), constant(weight.inputs[1])
    kind = weight.inputs[0].dtype if weight.inputs[0] is not None else None
    if integers is None or scales is None or kind not in BITS or not _fits(block) or scales.dtype != np.float32:
        return None
    zero = constant(weight.inputs[2]) if len(weight.inputs) > 2 else None
    if zero is not None and np.any(zero.astype(np.int8)):
        return None
    last, bias = with_bias(node) if fused_bias else (node, None)
    name = str(weight.inputs[0].name) if weight.inputs[0] is not None else ""
    matrix = BlockWeights(name, integers.astype(np.int8), scales, BITS[kind], constant(bias))
    return _Found(node.inputs[0], matrix, last)


def _fits(block: int) -> bool:
    return SMALLEST_BLOCK <= block <= LARGEST_BLOCK and block & (block - 1) == 0


def _column_products(model: ir.Model) -> list[_Found]:
    found = []
    for product in quantised_products(model):
        integers, scales = constant(product.weight), constant(product.scales)
        rows = dims(product.weight)[0]
        block = int(rows) & -int(rows)  # the largest power of two that divides it
        if integers is None or scales is None or not _fits(min(block, LARGEST_BLOCK)):
            continue
        spread = np.repeat(scales[None], int(rows) // min(block, LARGEST_BLOCK), axis=0)
        bias = constant(product.bias)
        matrix = BlockWeights(str(product.weight.name), integers, spread, 8, bias)
        found.append(_Found(product.activation, matrix, product.last))
    return found


def _replace(graph: ir.Graph, group: Sequence[_Found], accuracy: int) -> None:
    """Replaces matrix multiplications of one value by one node; the result is split again."""
    first, matrices = group[0], [one.matrix for one in group]
    place = next(node for node in graph if node in {one.node for one in group})
    rows, bits, block = len(matrices[0].integers), matrices[0].bits, matrices[0].block
    widths = [matrix.integers.shape[1] for matrix in matrices]
    name = matrices[0].name
    packed = np.concatenate([_packed(matrix.integers, bits, block) for matrix in matrices])
    scales = np.concatenate([matrix.scales.T for matrix in matrices])
    inputs: list[ir.Value | None] = [
        first.source,
        initializer(graph, f"{name}.blocks", packed),
        initializer(graph, f"{name}.scales", np.ascontiguousarray(scales, np.float32)),
    ]
    if any(matrix.bias is not None for matrix in matrices):
        parts = [
            np.zeros(width, np.float32) if matrix.bias is None else matrix.bias
            for matrix, width in zip(matrices, widths, strict=True)
        ]
        inputs += [None, None, initializer(graph, f"{name}.bias", np.concatenate(parts))]
    like = first.out if len(group) == 1 else None
    made = insert(
        place, "MatMulNBits", inputs, [like],
        K=rows, N=sum(widths), bits=bits, block_size=block, accuracy_level=accuracy,
    )  # fmt: skip
    if len(group) > 1:
        source = first.out
        made[0].type = source.type
        made[0].shape = ir.Shape([*dims(source)[:-1], sum(widths)])
        parts_of = initializer(graph, f"{name}.widths", np.array(widths, np.int64))
        made = insert(place, "Split", [made[0], parts_of], [one.out for one in group], domain="", axis=-1)
    for one, value in zip(group, made, strict=True):
        replace(one.out, value)


def _packed(integers: Array, bits: int, block: int) -> Array:
    """Packs int8 ``[K, N]`` for the kernel into uint8 ``[N, K / block, block * bits / 8]``.

    The packed values are unsigned: 0 is stored as 128 with 8 bits, and as 8 with 4 bits.
    """
    shifted = (integers.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8).T
    blocks = np.ascontiguousarray(shifted).reshape(shifted.shape[0], -1, block)
    if bits == 8:
        return blocks
    return np.asarray(blocks[:, :, 0::2] | (blocks[:, :, 1::2] << 4), np.uint8)
