"""INT8 products as the CPU has them: one node from a float activation to a float result.

The source holds a symmetric QuantizeLinear and DequantizeLinear around each product, which is TensorRT's form. A CPU
multiplies unsigned activations by signed weights, so zero points move from 0 to 128; and it can find the range of
an activation as it comes, which is as fast as a recorded one and never saturates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from blip2edge.optimization.graph import (
    Array,
    constant,
    initializer,
    insert,
    only_user,
    other_operand,
    producer,
    replace,
    vector,
)

MIDDLE = 128
"""An unsigned zero point: a signed byte shifted by it keeps its meaning."""


@dataclass(frozen=True)
class QuantisedProduct:
    """A MatMul between Q/DQ nodes.

    Attributes:
        node: The MatMul.
        activation: Its float input before quantisation ``[.., K]``.
        step: The recorded scale of the activation.
        weight: int8 ``[K, N]``.
        scales: ``[N]``.
        bias: ``[N]`` that is added behind it; None for nothing.
        out: What the product, or the addition behind it, gives.
        last: The node that gives it.
    """

    node: ir.Node
    activation: ir.Value
    step: ir.Value
    weight: ir.Value
    scales: ir.Value
    bias: ir.Value | None
    out: ir.Value
    last: ir.Node


def quantised_products(model: ir.Model) -> list[QuantisedProduct]:
    """The products of a graph whose both sides are int8 with scales a column."""
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
    last, bias = node, None
    plus = only_user(node.outputs[0], "Add")
    if plus is not None and vector(other_operand(plus, node.outputs[0])) is not None:
        last, bias = plus, other_operand(plus, node.outputs[0])
    return QuantisedProduct(node, activation, step, matrix, scales, bias, last.outputs[0], last)


def use_dynamic_ranges(model: ir.Model) -> int:
    """Products that find the range of their activation as it comes (one range a tensor); how many there are."""
    products = quantised_products(model)
    for product in products:
        inputs = [
            product.activation,
            product.weight,
            product.scales,
            _zeros(model.graph, product),
            product.bias,
        ]
        if product.bias is None:
            inputs.pop()
        made = insert(product.node, "DynamicQuantizeMatMul", inputs, [product.out])
        replace(product.out, made[0])
    return len(products)


def use_recorded_ranges(model: ir.Model) -> int:
    """Products with the ranges of the calibration, activations unsigned around 128; how many there are."""
    products = quantised_products(model)
    zero = initializer(model.graph, "middle", np.array(MIDDLE, np.uint8))
    rounded: dict[tuple[str, str], ir.Value] = {}
    for product in products:
        key = (str(product.activation.name), str(product.step.name))
        if key not in rounded:
            made = insert(
                product.node, "QuantizeLinear", [product.activation, product.step, zero], [None], domain=""
            )
            made[0].dtype, made[0].shape = ir.DataType.UINT8, product.activation.shape
            rounded[key] = made[0]
        inputs = [
            rounded[key], product.weight, product.step, product.scales, zero, _zeros(model.graph, product),
            product.bias,
        ]  # fmt: skip
        if product.bias is None:
            inputs.pop()
        out = insert(product.node, "MatMulIntegerToFloat", inputs, [product.out])
        replace(product.out, out[0])
    return len(products)


def forget_ranges(model: ir.Model) -> int:
    """Leaves activations unrounded: what INT8 is compared with; how many products there were."""
    products = quantised_products(model)
    for product in products:
        product.node.replace_input_with(0, product.activation)
    return len(products)


def _zeros(graph: ir.Graph, product: QuantisedProduct) -> ir.Value:
    """Zero points of a weight's columns."""
    width = len(_array(product.scales))
    return initializer(graph, f"zeros.{width}", np.zeros(width, np.int8))


def _array(value: ir.Value) -> Array:
    array = constant(value)
    if array is None:
        raise ValueError(f"{value.name} is no constant")
    return array
