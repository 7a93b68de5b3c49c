"""Rewrites INT8 matrix multiplications for CPUs: one node takes float activations and returns a float result.

In the exported graph, symmetric QuantizeLinear and DequantizeLinear nodes are around each multiplication, as TensorRT
requires. A CPU multiplies unsigned activations by signed weights, so zero points change from 0 to 128. It can also
compute the range of an activation at run time (a dynamic range), which is as fast as a recorded range and never
saturates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import (
    constant,
    dims,
    initializer,
    insert,
    producer,
    replace,
    vector,
    with_bias,
)

MIDDLE = 128
"""The zero point of unsigned activations; an unsigned value is the signed value plus 128."""


@dataclass(frozen=True)
class QuantisedProduct:
    """A MatMul with quantised activation and weight, written with Q/DQ nodes.

    Attributes:
        node: The MatMul.
        activation: Float input of the MatMul before quantisation, ``[.., K]``.
        step: The recorded scale of the activation.
        weight: Quantised weight, int8 ``[K, N]``.
        scales: Scales of the weight's columns, ``[N]``.
        bias: Bias ``[N]`` that is added to the result; None for none.
        last: The last node: the addition of the bias, or the MatMul.
    """

    node: ir.Node
    activation: ir.Value
    step: ir.Value
    weight: ir.Value
    scales: ir.Value
    bias: ir.Value | None
    last: ir.Node

    @property
    def out(self) -> ir.Value:
        """The result of the MatMul, after the addition of the bias."""
        return self.last.outputs[0]


def quantised_products(model: ir.Model) -> list[QuantisedProduct]:
    """Finds the MatMuls of a graph with int8 activations and int8 weights, with one scale for each weight column."""
    found = (_product(node) for node in model.graph if node.op_type == "MatMul")
    return [product for product in found if product is not None]


def _product(node: ir.Node) -> QuantisedProduct | None:
    restored, weight = (
        producer(node.inputs[0], "DequantizeLinear"),
        producer(node.inputs[1], "DequantizeLinear"),
    )
    rounded = producer(restored.inputs[0], "QuantizeLinear") if restored is not None else None
    if rounded is None or weight is None or "block_size" in weight.attributes:
        return None
    activation, step = rounded.inputs[0], rounded.inputs[1]
    matrix, scales = weight.inputs[0], weight.inputs[1]
    if activation is None or step is None or matrix is None or scales is None or vector(scales) is None:
        return None
    if constant(matrix) is None or matrix.dtype != ir.DataType.INT8 or scales.dtype != ir.DataType.FLOAT:
        return None
    last, bias = with_bias(node)
    return QuantisedProduct(node, activation, step, matrix, scales, bias, last)


def use_dynamic_ranges(model: ir.Model) -> int:
    """Replaces INT8 matrix multiplications by nodes that compute the range of each activation at run time.

    Returns:
        The number of replaced matrix multiplications.
    """
    products = quantised_products(model)
    for product in products:
        zeros = _zeros(model.graph, product)
        inputs = [product.activation, product.weight, product.scales, zeros, product.bias]
        replace(product.out, insert(product.node, "DynamicQuantizeMatMul", inputs, [product.out])[0])
    return len(products)


def use_recorded_ranges(model: ir.Model) -> int:
    """Replaces INT8 matrix multiplications by nodes that use the ranges of the calibration.

    Activations become unsigned, around 128.

    Returns:
        The number of replaced matrix multiplications.
    """
    products = quantised_products(model)
    zero = initializer(model.graph, "middle", np.array(MIDDLE, np.uint8))
    rounded: dict[tuple[str, str], ir.Value] = {}
    for product in products:
        key = (str(product.activation.name), str(product.step.name))
        if key not in rounded:
            made = insert(product.node, "QuantizeLinear", [product.activation, product.step, zero], [None], domain="")
            made[0].dtype, made[0].shape = ir.DataType.UINT8, product.activation.shape
            rounded[key] = made[0]
        inputs = [
            rounded[key], product.weight, product.step, product.scales, zero, _zeros(model.graph, product),
            product.bias,
        ]  # fmt: skip
        replace(product.out, insert(product.node, "MatMulIntegerToFloat", inputs, [product.out])[0])
    return len(products)


def without_rounding(model: ir.Model) -> int:
    """Removes the rounding of activations, to compute a reference for INT8 graphs.

    Returns:
        The number of changed matrix multiplications.
    """
    products = quantised_products(model)
    for product in products:
        product.node.replace_input_with(0, product.activation)
    return len(products)


def _zeros(graph: ir.Graph, product: QuantisedProduct) -> ir.Value:
    """Returns an initializer with the zero points of a weight's columns, all 0."""
    width = int(dims(product.scales)[0])
    return initializer(graph, f"zeros.{width}", np.zeros(width, np.int8))
