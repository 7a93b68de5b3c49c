"""Rewrites float matrix multiplications as 1 x 1 convolutions, whose weights ONNX Runtime reads faster.

    x [.., K] @ w [K, N] (+ bias)  =  conv(x as [1, K, 1, rows], w as [N, K, 1, 1], bias), reshaped back

ONNX Runtime prepacks the weights of a convolution into blocks of channels for the processor when it loads a graph
(NCHWc, MLAS' ``MlasNchwcConv``), and converts the rows of the input in the same pass. For few rows, weights are then
read at nearly the memory's bandwidth, which ONNX Runtime's MatMul does not reach
(``benchmarks/results/streaming.json``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import (
    Array,
    constant,
    dims,
    initializer,
    insert,
    permutation,
    producer,
    replace,
    with_bias,
)

CHANNELS = 16
"""Channels of the largest block in ONNX Runtime's layout of convolution weights.

A weight ``[K, N]`` is rewritten only if K and N are multiples of this number.
"""

TO_CHANNELS, TO_ROWS = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclass(frozen=True)
class _Product:
    """A MatMul with a constant matrix.

    Attributes:
        source: Input of the MatMul, ``[.., K]``.
        weight: Initializer of the weight, ``[K, N]``.
        matrix: Values of the weight, float32 ``[K, N]``.
        bias: Bias that is added to the result, ``[N]``; None for none.
        last: The last node: the addition of the bias, or the MatMul.
    """

    source: ir.Value
    weight: ir.Value
    matrix: Array
    bias: ir.Value | None
    last: ir.Node

    @property
    def out(self) -> ir.Value:
        """The result of the MatMul, after the addition of the bias."""
        return self.last.outputs[0]


def use_pointwise_convolutions(model: ir.Model, *, narrowing: bool = False) -> int:
    """Replaces float matrix multiplications by convolutions of kernel size 1.

    Args:
        model: The graph, after ``optimization.graph.prepare``.
        narrowing: Whether to replace only multiplications with fewer outputs than inputs. For other multiplications and
            hundreds of rows, ONNX Runtime's MatMul is as fast.

    Returns:
        The number of replaced matrix multiplications.
    """
    found = [product for node in model.graph if (product := _product(node, narrowing)) is not None]
    for product in found:
        _replace(model.graph, product)
    return len(found)


def _product(node: ir.Node, narrowing: bool) -> _Product | None:
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    source, weight = node.inputs[0], node.inputs[1]
    matrix = constant(weight) if len(dims(weight)) == 2 and weight.dtype == ir.DataType.FLOAT else None
    if matrix is None or len(dims(source)) < 2 or any(size % CHANNELS for size in matrix.shape):
        return None
    if narrowing and matrix.shape[0] <= matrix.shape[1]:
        return None
    last, bias = with_bias(node)
    return _Product(source, weight, matrix, bias, last)


def _replace(graph: ir.Graph, product: _Product) -> None:
    inner, columns = product.matrix.shape
    kernel = initializer(graph, f"{product.weight.name}.pointwise", product.matrix.T.reshape(columns, inner, 1, 1))
    inputs = [_channels(graph, product, inner), kernel, product.bias]
    (made,) = insert(product.last, "Conv", inputs, [None], domain="", kernel_shape=[1, 1])
    made.type = product.out.type
    (rows,) = insert(product.last, "Transpose", [made], [None], domain="", perm=list(TO_ROWS))
    (out,) = insert(product.last, "Reshape", [rows, _shape(graph, product, columns)], [product.out], domain="")
    replace(product.out, out)


def _channels(graph: ir.Graph, product: _Product, inner: int) -> ir.Value:
    """Returns the input of a multiplication as ``[1, K, 1, rows]``, the shape that a convolution reads.

    If the input is the ReLU of the result of such a convolution, the shape before the reshape back is used, so that
    nothing is reshaped.
    """
    relu = producer(product.source, "Relu")
    before = producer(relu.inputs[0], "Reshape") if relu is not None else None
    turned = producer(before.inputs[0], "Transpose") if before is not None else None
    if permutation(turned) == list(TO_ROWS) and turned is not None and _is_pointwise(turned.inputs[0]):
        (again,) = insert(product.last, "Relu", [turned.inputs[0]], [None], domain="")
        return again
    target = initializer(graph, f"rows_of_{inner}", np.array([1, 1, -1, inner], np.int64))
    (rows,) = insert(product.last, "Reshape", [product.source, target], [None], domain="")
    (channels,) = insert(product.last, "Transpose", [rows], [None], domain="", perm=list(TO_CHANNELS))
    return channels


def _is_pointwise(value: ir.Value | None) -> bool:
    node = producer(value, "Conv")
    return node is not None and dims(node.inputs[1])[2:] == [1, 1]


def _shape(graph: ir.Graph, product: _Product, columns: int) -> ir.Value:
    """Returns the shape of a multiplication's result: the leading lengths of the input, and ``columns``."""
    leading = dims(product.source)[:-1]
    known = [size for size in leading if isinstance(size, int)]
    if len(known) >= len(leading) - 1:  # at most one unknown length, which ONNX computes
        sizes = [size if isinstance(size, int) else -1 for size in leading]
        name = "x".join(str(size) for size in (*sizes, columns))
        return initializer(graph, f"shape_{name}", np.array([*sizes, columns], np.int64))
    like = next(
        (value for value in graph.inputs if dims(value)[:-1] == leading and len(dims(value)) > 1),
        product.source,
    )
    (front,) = insert(product.last, "Shape", [like], [None], domain="", start=0, end=len(leading))
    last = initializer(graph, f"columns_{columns}", np.array([columns], np.int64))
    (shape,) = insert(product.last, "Concat", [front, last], [None], domain="", axis=0)
    return shape
