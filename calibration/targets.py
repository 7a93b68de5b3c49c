"""Which products of a graph become INT8, and which stay as they are, with the reason."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
NO_WEIGHT = "both factors are activations: an attention product stays in floating point"
CONSTANT = "its input is the same for every picture"


@dataclass(frozen=True)
class Product:
    """A MatMul of an activation ``[..., K]`` with a weight ``[K, N]``.

    Attributes:
        node: The node's name.
        activation: Name of its first input.
        weight: Name of the initializer.
        inner: K.
        outer: N.
    """

    node: str
    activation: str
    weight: str
    inner: int
    outer: int


@dataclass(frozen=True)
class Targets:
    """The products of a graph.

    Attributes:
        products: Those that can be quantised, in the order of the graph.
        left: Nodes that multiply and cannot be, by name, with the reason.
    """

    products: tuple[Product, ...]
    left: Mapping[str, str]

    def by_activation(self) -> dict[str, list[Product]]:
        """The products that read each activation; they share its range."""
        groups: dict[str, list[Product]] = defaultdict(list)
        for product in self.products:
            groups[product.activation].append(product)
        return dict(groups)


def held(value: ir.Value) -> ir.TensorProtocol:
    """The tensor of an initializer.

    Raises:
        ValueError: It has none.
    """
    if value.const_value is None:
        raise ValueError(f"the initializer {value.name} has no value")
    return value.const_value


def find_targets(model: ir.Model) -> Targets:
    """Looks through a graph.

    Products of two activations (attention) are left: quantised, they lose the fused kernels of TensorRT, and
    softmax needs a range of its own (TensorRT#3724). Convolutions are left: a ViT has one, it sees the pixels,
    and it holds a hundredth of the weights.
    """
    products: list[Product] = []
    left: dict[str, str] = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        name = str(node.name)
        if node.op_type == "Conv":
            left[name] = "a convolution of the pixels"
            continue
        value, weight = node.inputs[0], node.inputs[1]
        if value is None or weight is None:
            continue
        reason = _refusal(node, value, weight)
        if reason:
            left[name] = reason
            continue
        inner, outer = held(weight).shape.numpy()
        products.append(Product(name, str(value.name), str(weight.name), inner, outer))
    return Targets(tuple(products), left)


def _refusal(node: ir.Node, value: ir.Value, weight: ir.Value) -> str:
    """Why a product cannot be quantised; empty where it can."""
    if weight.const_value is None or weight.is_graph_input():
        return NO_WEIGHT
    if node.op_type == "Gemm":
        return "a Gemm, whose bias would have to be INT32"
    if len(weight.const_value.shape) != 2 or weight.dtype not in FLOATS:
        return "its weight is no matrix of floats"
    if value.const_value is not None:
        return CONSTANT
    if any(index != 1 or user.op_type != "MatMul" for user, index in weight.uses()):
        return "its weight is read in another way too"
    return ""
