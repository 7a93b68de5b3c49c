"""Traces a module on the meta device to an ONNX graph without weights.

Initializers have the names of the checkpoint's parameters and a shape, but no values; later ``weights.py`` writes the
values to the graph's data file.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch import nn

from blip2edge.bundle.schema import Axis, GraphSpec, TensorSpec
from blip2edge.errors import ExportError, one_line

OPSET = 18
"""The newest opset that TensorRT 10.3 (JetPack 6.2) supports completely; it has LayerNormalization."""

TRACE_SIZES = {"batch": 2, "past": 5, "steps": 3, "asked": 2, "source": 7, "instruction": 11, "text": 13, "queries": 4}
"""Length of each axis during tracing.

No length is 0 or 1, because torch.export would treat these as constants. Sums of different lengths are different, so
that torch.export does not take one axis for another.
"""


@dataclass(frozen=True)
class WeightSlot:
    """Describes an initializer of a graph: the parameter with its values, its shape, and whether it is transposed."""

    parameter: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass
class Traced:
    """A graph without weights.

    Attributes:
        model: The graph.
        spec: Inputs and outputs of the graph.
        slots: For each initializer, by name: the parameter that its values come from.
    """

    model: ir.Model
    spec: GraphSpec
    slots: dict[str, WeightSlot]


def trace(module: nn.Module, spec: GraphSpec) -> Traced:
    """Traces a module whose parameters are on the meta device.

    Args:
        module: The module; its arguments and results are in the order of ``spec``.
        spec: Names, dtypes and axes of the inputs and outputs.

    Raises:
        ExportError: torch could not trace the module, or could not convert it to ONNX.
    """
    with torch.device("meta"):
        args = tuple(_empty(tensor) for tensor in spec.inputs)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(module.eval(), args, dynamic_shapes=_dynamic(module, spec), strict=False)
            onnx_program = torch.onnx.export(program, dynamo=True, optimize=False, opset_version=OPSET, verbose=False)
    except Exception as error:  # torch.export and the exporter raise a dozen kinds
        raise ExportError(f"the graph {spec.name} could not be traced ({one_line(error)})") from error
    if onnx_program is None:
        raise ExportError(f"the graph {spec.name} could not be converted to ONNX")
    model = onnx_program.model
    _name_tensors(model.graph, spec)
    slots = _empty_initializers(model.graph)
    _turn_transposed_weights(model.graph, slots)
    with _quiet():
        _simplify(model)
    for name in set(slots) - set(model.graph.initializers):
        del slots[name]
    return Traced(model, spec, slots)


def _empty(spec: TensorSpec) -> torch.Tensor:
    return torch.empty(spec.shape(TRACE_SIZES), dtype=getattr(torch, spec.dtype))


def _dynamic(module: nn.Module, spec: GraphSpec) -> tuple[object, ...]:
    """Returns the dynamic axes of each argument of the module, as ``torch.export`` expects them.

    The arguments that the module takes as ``*rest`` are together in one tuple.
    """
    named = [
        {index: torch.export.Dim.AUTO for index, dim in enumerate(tensor.dims) if isinstance(dim, Axis)}
        for tensor in spec.inputs
    ]
    code = module.forward.__code__
    has_rest = bool(code.co_flags & 0x04)  # CO_VARARGS
    fixed = code.co_argcount - 1  # without self
    if not has_rest or len(named) == fixed:  # torch leaves an empty rest out
        return tuple(named)
    return (*named[:fixed], tuple(named[fixed:]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes on optional packages, and torch's own deprecation warnings."""
    names = (
        "torch.onnx._internal.exporter._registration",
        "torch._export.non_strict_utils",
        "onnx_ir.passes.common.initializer_deduplication",
    )
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _name_tensors(graph: ir.Graph, spec: GraphSpec) -> None:
    """Renames the inputs and outputs to the names in the spec, and torch's symbolic sizes to the axis names there."""
    names: dict[str, str] = {}
    for values, tensors in ((graph.inputs, spec.inputs), (graph.outputs, spec.outputs)):
        if len(values) != len(tensors):
            raise ExportError(f"the graph {spec.name} has {len(values)} tensors where its spec has {len(tensors)}")
        for value, tensor in zip(values, tensors, strict=True):
            for size, dim in zip(value.shape or (), tensor.dims, strict=True):
                if isinstance(size, ir.SymbolicDim) and isinstance(dim, Axis) and size.value is not None:
                    names.setdefault(str(size.value), dim.name)
            value.name = tensor.name
    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])
    for value, tensor in zip(graph.outputs, spec.outputs, strict=True):
        value.shape = ir.Shape([dim if isinstance(dim, int) else dim.name for dim in tensor.dims])


def _renamed(size: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    return size if isinstance(size, int) else names.get(str(size.value), size.value)


def _empty_initializers(graph: ir.Graph) -> dict[str, WeightSlot]:
    """Removes the meta tensors from the initializers, so that no graph pass tries to read their values.

    Returns the parameter and shape of each initializer, by name.
    """
    slots = {}
    for name, value in graph.initializers.items():
        shape = tuple(value.shape.numpy()) if value.shape is not None else ()
        slots[name] = WeightSlot(name, shape)
        value.const_value = None
    return slots


def _turn_transposed_weights(graph: ir.Graph, slots: dict[str, WeightSlot]) -> None:
    """Removes each Transpose node of a weight; the weight is written transposed instead."""
    for node in list(graph):
        if node.op_type != "Transpose" or node.inputs[0] is None or node.inputs[0].name not in slots:
            continue
        source = node.inputs[0]
        slot = slots[str(source.name)]
        permutation = node.attributes.get("perm")
        if len(slot.shape) != 2 or (permutation is not None and list(permutation.as_ints()) != [1, 0]):
            continue
        name = f"{slot.parameter}.T"
        turned = graph.initializers.get(name)
        if turned is None:
            shape = slot.shape[::-1]
            turned = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
            graph.initializers[name] = turned
            slots[name] = WeightSlot(slot.parameter, shape, transposed=True)
        ir.convenience.replace_all_uses_with(node.outputs[0], turned)
        graph.remove(node, safe=True)
        if not source.uses():
            del graph.initializers[str(source.name)]


def _simplify(model: ir.Model) -> None:
    """Folds constants and shapes, merges common subexpressions and removes unused nodes."""
    optimizer.optimize_ir(model, num_iterations=2)
    _constant_reshapes(model.graph)  # last: the optimiser takes the 0 of a reshape for an empty axis
    passes.IdentityEliminationPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.NameFixPass()(model)
    model.producer_name = "blip2edge"


def _constant_reshapes(graph: ir.Graph) -> None:
    """Replaces the computed target shape of each Reshape node by a constant, where ONNX allows this.

    In ONNX, a length 0 is copied from the same axis of the input, and one length may be -1, which is computed. So at
    most one length may be neither fixed nor copied. For example, the reshape from ``[B, S, D]`` to ``[B, S, H, d]``
    then needs no nodes that compute shapes.
    """
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        source, target = node.inputs[0], node.outputs[0]
        if source is None or source.shape is None or target.shape is None:
            continue
        dims: list[int] = []
        for axis, size in enumerate(target.shape):
            if isinstance(size, int):
                dims.append(size)
            elif axis < len(source.shape) and source.shape[axis] == size:
                dims.append(0)
            else:
                dims.append(-1)
        if dims.count(-1) > 1:
            continue
        constant = ir.node("Constant", [], attributes={"value": ir.tensor(dims, dtype=ir.DataType.INT64)})
        constant.outputs[0].name = f"{target.name}_shape"
        graph.insert_before(node, constant)
        node.replace_input_with(1, constant.outputs[0])
        node.attributes.pop("allowzero", None)  # with it, a 0 would mean an empty axis
