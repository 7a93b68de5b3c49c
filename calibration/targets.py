"""Finds the matrix multiplications of a graph that can be quantized, and the reason for each one that cannot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from blip2edge.calibration.initializers import initializer_tensor

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
NO_WEIGHT = "both factors are activations: an attention product is kept in floating point"
CONSTANT = "its input is the same for every picture"


@dataclass(frozen=True)
class Product:
    """A MatMul of an activation ``[..., K]`` with a weight ``[K, N]``; "product" means such a node in this package.

    Attributes:
        node: The node's name.
        activation: Name of the activation, the MatMul's first input.
        weight: Name of the weight's initializer.
        inner: K, the number of inputs.
        outer: N, the number of outputs.
    """

    node: str
    activation: str
    weight: str
    inner: int
    outer: int


@dataclass(frozen=True)
class Targets:
    """The matrix multiplications of a graph, divided into those that can be quantized and those that cannot.

    Attributes:
        products: Matrix multiplications that can be quantized, in the order of the graph.
        kept_float: Why a matrix multiplication or convolution cannot be quantized, by the node's name.
    """

    products: tuple[Product, ...]
    kept_float: Mapping[str, str]

    def by_activation(self) -> dict[str, list[Product]]:
        """Groups the matrix multiplications by the name of the activation that they read; a group shares one range."""
        groups: dict[str, list[Product]] = defaultdict(list)
        for product in self.products:
            groups[product.activation].append(product)
        return dict(groups)


def find_targets(model: ir.Model) -> Targets:
    """Finds the matrix multiplications of a graph that can be quantized.

    Multiplications of two activations (attention) are kept in floating point: if they are quantized, TensorRT does not
    use its fused attention kernels, and softmax would need its own range (TensorRT#3724). Convolutions are kept too: a
    ViT has only the patch embedding, which has the pixels as input and a hundredth of the weights.
    """
    products: list[Product] = []
    kept_float: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        name = str(node.name)
        if node.op_type == "Conv":
            kept_float[name] = "a convolution of the pixels"
            continue
        value, weight = node.inputs[0], node.inputs[1]
        if value is None or weight is None:
            continue
        reason = _refusal(node, value, weight)
        if reason:
            kept_float[name] = reason
            continue
        inner, outer = initializer_tensor(weight).shape.numpy()
        products.append(Product(name, str(value.name), str(weight.name), inner, outer))
    return Targets(tuple(products), kept_float)


def _refusal(node: ir.Node, value: ir.Value, weight: ir.Value) -> str:
    """Returns the reason why a matrix multiplication cannot be quantized; empty if it can be quantized."""
    if weight.const_value is None or weight.is_graph_input():
        return NO_WEIGHT
    if node.op_type == "Gemm":
        return "it is a Gemm, whose bias would have to be INT32"
    if len(weight.const_value.shape) != 2 or weight.dtype not in FLOATS:
        return "its weight is not a matrix in floating point"
    if value.const_value is not None:
        return CONSTANT
    if any(index != 1 or user.op_type != "MatMul" for user, index in weight.uses()):
        return "another node reads its weight in another way"
    return ""
