"""Folds SmoothQuant's division of an activation's channels into earlier weights, so that no node has to divide.

If a norm computes the activation, the norm's gain and bias are divided. If an attention computes the activation, the
columns and the bias of the value projection are divided. Between the value projection and the output projection there
are only reshapes, transposes and a matrix multiplication over another axis; none of these nodes mixes channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from blip2edge.calibration.targets import Product

Fold = tuple[tuple[str, slice], ...]
"""Names of initializers, each with the slice of the last axis that is divided."""

EVERYTHING = slice(None)


def find_fold(model: ir.Model, products: Sequence[Product]) -> Fold:
    """Finds the initializers that can be divided in place of one activation.

    Args:
        model: The graph.
        products: All matrix multiplications (MatMul nodes) that read the activation.

    Returns:
        Names of the initializers, each with the slice of the last axis that is divided; empty if there are none.
    """
    readers = {product.node for product in products}
    node = next(node for node in model.graph if node.name in readers)
    value = node.inputs[0]
    if value is None or not _only_read_by(value, readers):
        return ()
    return _behind_norm(value, products[0].inner) or _behind_linear(value, products[0].inner)


def _only_read_by(value: ir.Value, readers: set[str]) -> bool:
    """Returns whether only the nodes ``readers`` read a value, so that the value may change."""
    return not value.is_graph_output() and all(user.name in readers and index == 0 for user, index in value.uses())


def _own(value: ir.Value | None, width: int | None) -> str:
    """Returns the name of a constant ``[.., width]`` that only one node uses; an empty text for any other value.

    If ``width`` is None, the last axis may have any length.
    """
    if value is None or value.const_value is None or len(list(value.uses())) != 1 or value.is_graph_output():
        return ""
    shape = tuple(value.const_value.shape)
    return str(value.name) if shape and width in (None, shape[-1]) else ""


def _behind_norm(value: ir.Value, width: int) -> Fold:
    """Finds the constants of a norm that can be divided in place of the norm's output ``value``.

    They are the gain and bias of a LayerNormalization, or the gain of an RMSNorm (the factor of its last Mul).
    """
    node = value.producer()
    while node is not None and node.op_type == "Cast":
        inner = node.inputs[0]
        if inner is None or not _single_use(inner):
            return ()
        node = inner.producer()
    if node is None:
        return ()
    if node.op_type == "LayerNormalization":
        names = [_own(given, width) for given in node.inputs[1:]]
    elif node.op_type == "Mul":
        names = [name for name in (_own(given, width) for given in node.inputs) if name][:1]
    else:
        return ()
    return tuple((name, EVERYTHING) for name in names) if names and all(names) else ()


def _single_use(value: ir.Value) -> bool:
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _behind_linear(value: ir.Value, width: int) -> Fold:
    """Finds the columns of the value projection whose attention output is ``value``.

    The search goes back from ``value`` through Reshape, Transpose and the multiplication of softmax and values.
    """
    producer = _through(value, ("Reshape", "Transpose"))
    if producer is None or producer.op_type != "MatMul":
        return ()
    head = producer.inputs[1]
    if head is None or head.const_value is not None or not _single_use(head):
        return ()
    source = _through(head, ("Reshape", "Transpose"))
    if source is None:
        return ()
    part = EVERYTHING
    if source.op_type == "Split":
        part = _split_part(source, head, width)
        whole = source.inputs[0]
        if part == EVERYTHING or whole is None or not _single_use(whole):
            return ()
        source = whole.producer()
    return _columns(source, part, width)


def _through(value: ir.Value, kinds: tuple[str, ...]) -> ir.Node | None:
    """Returns the nearest node before ``value`` whose operator is not in ``kinds``.

    Returns:
        The node; None if there is no such node, or if a value on the way to it has other users.
    """
    node = value.producer()
    while node is not None and node.op_type in kinds:
        inner = node.inputs[0]
        if inner is None or not _single_use(inner):
            return None
        node = inner.producer()
    return node


def _split_part(split: ir.Node, head: ir.Value, width: int) -> slice:
    """Returns the columns of a fused query, key and value projection that belong to ``head``.

    Args:
        split: The Split node after the projection.
        head: A value that is computed from one output of ``split``.
        width: The expected width of each output of ``split``.

    Returns:
        The columns; all columns if ``head`` does not come from ``split``, or an output has another width.
    """
    value: ir.Value | None = head
    while value is not None and value.producer() is not split:
        producer = value.producer()
        value = producer.inputs[0] if producer is not None else None
    sizes = [output.shape[-1] if output.shape is not None else None for output in split.outputs]
    if value is None or any(size != width for size in sizes):
        return EVERYTHING
    at = list(split.outputs).index(value)
    return slice(at * width, (at + 1) * width)


def _columns(node: ir.Node | None, part: slice, width: int) -> Fold:
    """Returns the weight of a linear layer, and its bias if there is one, to divide them.

    ``node`` is the MatMul, or the Add of the bias after it. The result is empty if they cannot be divided.
    """
    found: list[tuple[str, slice]] = []
    size = width if part == EVERYTHING else None
    if node is not None and node.op_type == "Add":
        biases = [given for given in node.inputs if given is not None and given.const_value is not None]
        sums = [given for given in node.inputs if given is not None and given.const_value is None]
        if len(biases) != 1 or len(sums) != 1 or not _single_use(sums[0]):
            return ()
        bias = _own(biases[0], size)
        if not bias:
            return ()
        found.append((bias, part))
        node = sums[0].producer()
    if node is None or node.op_type != "MatMul":
        return ()
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 2:
        return ()
    name = _own(weight, size)
    return (*found, (name, part)) if name else ()
