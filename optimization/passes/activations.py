"""Fuses the nodes of an activation function, and the bias before it, into one node."""

from __future__ import annotations

import math

import onnx_ir as ir

from blip2edge.optimization.graph import (
    biased,
    insert,
    only_user,
    operands,
    other_operand,
    producer,
    replace,
    users,
    with_scalar,
)

TIE_MARGIN = 5e-4
"""Relative difference up to which two constants count as equal; FP16 graphs store them with 11 bits of mantissa."""


def fuse_activations(model: ir.Model) -> int:
    """Fuses GELU (with Erf) and ``x * sigmoid(a x)`` (SiLU, CLIP's quick GELU); returns the number of fused nodes."""
    found = 0
    for node in list(model.graph):
        if node.graph is None:  # removed together with an earlier one
            continue
        if node.op_type == "Erf":
            found += _gelu(node)
        elif node.op_type == "Sigmoid":
            found += _swish(node)
    return found


def _is(number: float, wanted: float) -> bool:
    return math.isclose(number, wanted, rel_tol=TIE_MARGIN)


def _gelu(erf: ir.Node) -> bool:
    """Fuses ``0.5 x (1 + erf(x / sqrt 2))`` (Hendrycks and Gimpel, arXiv 1606.08415, equation 2) around an Erf node.

    Returns:
        Whether the nodes were fused.
    """
    scaled = erf.inputs[0]
    divided = with_scalar(producer(scaled, "Div"))
    multiplied = with_scalar(producer(scaled, "Mul"))
    if divided is not None and _is(divided[1], math.sqrt(2)):
        x = divided[0]
    elif multiplied is not None and _is(multiplied[1], math.sqrt(0.5)):
        x = multiplied[0]
    else:
        return False
    plus = only_user(erf.outputs[0], "Add")
    shifted = with_scalar(plus)
    if plus is None or shifted is None or shifted[1] != 1.0:
        return False
    last = _halved(x, plus.outputs[0])
    if last is None:
        return False
    before = biased(x)
    readers = {scaled.producer() if scaled is not None else None, *last}
    if before is not None and set(users(x)) <= readers and not x.is_graph_output():
        out = insert(last[-1], "BiasGelu", list(before), [last[-1].outputs[0]])
    else:
        out = insert(last[-1], "Gelu", [x], [last[-1].outputs[0]])
    replace(last[-1].outputs[0], out[0])
    return True


def _halved(x: ir.Value, shifted: ir.Value) -> list[ir.Node] | None:
    """Finds the two multiplications after ``1 + erf``, by ``x`` and by 0.5, in either order.

    Returns:
        The Mul nodes that come after ``shifted``, in order; None if the nodes are different.
    """
    first = only_user(shifted, "Mul")
    second = only_user(first.outputs[0], "Mul") if first is not None else None
    if first is None:
        return None
    half = with_scalar(first)
    if half is not None and half[1] == 0.5:
        return [first, second] if second is not None and other_operand(second, first.outputs[0]) is x else None
    if other_operand(first, shifted) is x and second is not None:
        half = with_scalar(second)
        return [first, second] if half is not None and half[1] == 0.5 else None
    halved = with_scalar(producer(other_operand(first, shifted), "Mul"))
    return [first] if halved is not None and halved[0] is x and halved[1] == 0.5 else None


def _swish(sigmoid: ir.Node) -> bool:
    """Fuses ``x * sigmoid(a x)`` (Ramachandran et al., arXiv 1710.05941) to QuickGelu; returns whether it was fused."""
    inner, out = sigmoid.inputs[0], sigmoid.outputs[0]
    product = only_user(out, "Mul")
    if inner is None or product is None:
        return False
    x, alpha = inner, 1.0
    if other_operand(product, out) is not inner:
        scaled = with_scalar(producer(inner, "Mul"))
        if scaled is None or scaled[0] not in operands(product):
            return False
        x, alpha = scaled
    fused = insert(product, "QuickGelu", [x], [product.outputs[0]], alpha=alpha)
    replace(product.outputs[0], fused[0])
    return True


def fuse_tanh_gelus(model: ir.Model) -> int:
    """Replaces GELU with tanh by FastGelu nodes; returns the number of fused nodes.

    The formula is ``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x³)))`` (Hendrycks and Gimpel, arXiv 1606.08415,
    section 2).
    """
    return sum(_tanh_gelu(node) for node in list(model.graph) if node.op_type == "Tanh")


def _tanh_gelu(tanh: ir.Node) -> bool:
    scaled = with_scalar(producer(tanh.inputs[0], "Mul"))
    total = producer(scaled[0], "Add") if scaled is not None else None
    if scaled is None or total is None or not _is(scaled[1], math.sqrt(2 / math.pi)):
        return False
    first, second = operands(total)
    for x, term in ((first, second), (second, first)):
        cubic = with_scalar(producer(term, "Mul"))
        power = with_scalar(producer(cubic[0], "Pow")) if cubic is not None else None
        if cubic is None or power is None or power != (x, 3.0) or not _is(cubic[1], 0.044715):
            continue
        plus = only_user(tanh.outputs[0], "Add")
        shifted = with_scalar(plus)
        last = _halved(x, plus.outputs[0]) if plus is not None and shifted is not None and shifted[1] == 1.0 else None
        if last is not None:
            out = last[-1].outputs[0]
            replace(out, insert(last[-1], "FastGelu", [x], [out])[0])
            return True
    return False
