"""Fuses each norm, and the residual and bias that are added before it, into one node."""

from __future__ import annotations

import onnx_ir as ir

from blip2edge.optimization.graph import (
    biased,
    clean,
    dims,
    insert,
    only_user,
    operands,
    other_operand,
    producer,
    replace,
    users,
    vector,
    with_scalar,
)

IN_FP32 = "in fp32"
"""Key in ``Node.meta``: the node has to be computed in FP32, also in an FP16 graph."""

SKIPS = {
    "LayerNormalization": "SkipLayerNormalization",
    "SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization",
}
"""For each norm, ONNX Runtime's operator that adds the residual and computes the norm in one node."""


def fuse_norms(model: ir.Model) -> int:
    """Fuses root-mean-square norms, then all norms with their residuals; returns the number of fused nodes."""
    return fuse_rms_norms(model) + sum(_skip(node) for node in list(model.graph) if node.op_type in SKIPS)


def fuse_rms_norms(model: ir.Model) -> int:
    """Fuses root-mean-square norms, without the residuals before them; returns the number of fused nodes."""
    clean(model)  # nodes of norms that are fused already
    return sum(_rms(node) for node in list(model.graph) if node.op_type == "Reciprocal")


def _rms(reciprocal: ir.Node) -> bool:
    """Fuses ``x / sqrt(mean(x²) + eps) * weight`` (Zhang and Sennrich, arXiv 1910.07467) around a Reciprocal node.

    Returns:
        Whether the nodes were fused.
    """
    root = producer(reciprocal.inputs[0], "Sqrt")
    plus = with_scalar(producer(root.inputs[0], "Add")) if root is not None else None
    mean = producer(plus[0], "ReduceMean") if plus is not None else None
    square = mean.inputs[0] if mean is not None else None
    x = _squared(square)
    scaled = only_user(reciprocal.outputs[0], "Mul")
    if x is None or plus is None or scaled is None or other_operand(scaled, reciprocal.outputs[0]) is not x:
        return False
    weighted = only_user(scaled.outputs[0], "Mul")
    if weighted is None:
        return False
    weight = other_operand(weighted, scaled.outputs[0])
    width = dims(x)[-1:]
    if vector(weight) is None or dims(weight) != width:
        return False
    out = weighted.outputs[0]
    made = insert(
        weighted, "SimplifiedLayerNormalization", [x, weight], [out], domain="",
        axis=-1, epsilon=plus[1], stash_type=1,
    )  # fmt: skip
    replace(out, made[0])
    return True


def _squared(value: ir.Value | None) -> ir.Value | None:
    """Returns ``x`` if a value is computed as ``x²`` by Pow or Mul; None otherwise."""
    power = with_scalar(producer(value, "Pow"))
    if power is not None:
        return power[0] if power[1] == 2.0 else None
    node = producer(value, "Mul")
    if node is None:
        return None
    first, second = operands(node)
    return first if first is second else None


def _skip(norm: ir.Node) -> bool:
    """Fuses a norm with the sum of two values ``[B, S, D]`` before it, and with a bias that is added to one of them."""
    total = norm.inputs[0]
    node = producer(total, "Add")
    axis = norm.attributes.get("axis")
    if (
        node is None
        or node.meta.get(IN_FP32)
        or total is None
        or axis is None
        or axis.as_int() not in (-1, len(dims(total)) - 1)
    ):
        return False
    first, second = operands(node)
    shape = dims(total)
    if len(shape) != 3 or dims(first) != shape or dims(second) != shape:
        return False
    bias = None
    for value in (second, first):
        before = biased(value)
        if before is not None and len(users(value)) == 1 and not value.is_graph_output():
            other = first if value is second else second
            (first, bias), second = before, other
            break
    inputs: list[ir.Value | None] = [first, second, *norm.inputs[1:]]
    if norm.op_type == "LayerNormalization":
        inputs += [None] * (4 - len(inputs))
    inputs.append(bias)
    epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
    out = norm.outputs[0]
    summed = len(users(total)) > 1 or total.is_graph_output()
    like = [out, None, None, total] if summed else [out]
    made = insert(norm, SKIPS[norm.op_type], inputs, like, epsilon=epsilon)
    replace(out, made[0])
    if summed:
        replace(total, made[3])
    return True
