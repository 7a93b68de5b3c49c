"""ONNX operators in torch, by name: floating tensors come in FP32, and the caller rounds the result to its type.

The definitions are those of https://onnx.ai/onnx/operators, opsets 13 to 24. Products and sums accumulate in FP32, as
tensor cores do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

DTYPES: dict[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.BOOL: torch.bool,
}
"""How a value of an ONNX type is held; one of INT4 is a byte with a value from -8 to 7."""

RANGES = {ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255), ir.DataType.INT4: (-8, 7)}
"""Smallest and largest value of the types that QuantizeLinear writes."""


@dataclass(frozen=True)
class Call:
    """A node with the values of its inputs.

    Attributes:
        node: The node.
        inputs: Its inputs, floating ones in FP32; None for an input that is left out.
        types: The ONNX types of the inputs.
        half_sums: Whether products of fp16 matrices are summed in fp16.
    """

    node: ir.Node
    inputs: Sequence[Tensor | None]
    types: Sequence[ir.DataType | None]
    half_sums: bool = False

    def __getitem__(self, index: int) -> Tensor:
        value = self.optional(index)
        if value is None:
            raise ValueError(f"{self.node.op_type} needs an input {index}")
        return value

    def optional(self, index: int) -> Tensor | None:
        """An input that may be left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def integers(self, index: int) -> list[int]:
        """An input with sizes, axes or places."""
        return [int(number) for number in self[index].reshape(-1)]

    def attribute(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        found = self.node.attributes.get(name)
        return default if found is None else found.value

    def axes(self, index: int) -> list[int]:
        """Axes: an input, or an attribute in older opsets; all axes where there are none."""
        if self.optional(index) is not None:
            return self.integers(index)
        given = self.attribute("axes")
        if given is not None:
            return list(given)
        return [] if self.attribute("noop_with_empty_axes", 0) else list(range(self[0].dim()))


Operator = Callable[[Call], "Tensor | Sequence[Tensor]"]


def _each(function: Callable[..., Tensor]) -> Operator:
    """An operator whose inputs are the function's."""
    return lambda call: function(*(call[index] for index in range(len(call.inputs))))


def _folded(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """An operator of any number of inputs, two at a time."""

    def run(call: Call) -> Tensor:
        result = call[0]
        for index in range(1, len(call.inputs)):
            result = function(result, call[index])
        return result

    return run


def _reduced(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    def run(call: Call) -> Tensor:
        axes = call.axes(1)
        return function(call[0], axes, bool(call.attribute("keepdims", 1))) if axes else call[0]

    return run


def _divide(call: Call) -> Tensor:
    return torch.div(call[0], call[1], rounding_mode=None if call[0].is_floating_point() else "trunc")


def _clip(call: Call) -> Tensor:
    low, high = call.optional(1), call.optional(2)
    return call[0] if low is None and high is None else torch.clamp(call[0], low, high)


def _reshape(call: Call) -> Tensor:
    shape = call.integers(1)
    if not call.attribute("allowzero", 0):
        shape = [call[0].shape[axis] if size == 0 else size for axis, size in enumerate(shape)]
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = call[0].numel() // rest if rest else 0
    return call[0].reshape(shape)


def _squeeze(call: Call) -> Tensor:
    if call.optional(1) is None and call.attribute("axes") is None:
        return call[0].squeeze()
    return call[0].squeeze(tuple(call.axes(1)))


def _unsqueeze(call: Call) -> Tensor:
    rank = call[0].dim() + len(call.axes(1))
    value = call[0]
    for axis in sorted(axis % rank for axis in call.axes(1)):
        value = value.unsqueeze(axis)
    return value


def _shape(call: Call) -> Tensor:
    sizes = list(call[0].shape)
    return torch.tensor(sizes[call.attribute("start", 0) : call.attribute("end", len(sizes))], dtype=torch.int64)


def _expand(call: Call) -> Tensor:
    return call[0].expand(torch.broadcast_shapes(call[0].shape, tuple(call.integers(1))))


def _gather(call: Call) -> Tensor:
    axis = call.attribute("axis", 0) % call[0].dim()
    places = torch.where(call[1] < 0, call[1] + call[0].shape[axis], call[1])
    shape = (*call[0].shape[:axis], *places.shape, *call[0].shape[axis + 1 :])
    return call[0].index_select(axis, places.reshape(-1)).reshape(shape)


def _gather_elements(call: Call) -> Tensor:
    axis = call.attribute("axis", 0)
    places = torch.where(call[1] < 0, call[1] + call[0].shape[axis], call[1])
    return torch.gather(call[0], axis, places)


def _scatter_elements(call: Call) -> Tensor:
    if call.attribute("reduction", "none") != "none":
        raise NotImplementedError(f"ScatterElements with reduction {call.attribute('reduction')}")
    axis = call.attribute("axis", 0)
    places = torch.where(call[1] < 0, call[1] + call[0].shape[axis], call[1])
    return call[0].scatter(axis, places, call[2])


def _slice(call: Call) -> Tensor:
    value, starts, ends = call[0], call.integers(1), call.integers(2)
    axes = list(range(len(starts))) if call.optional(3) is None else call.integers(3)
    steps = [1] * len(starts) if call.optional(4) is None else call.integers(4)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        places = range(*slice(start, end, step).indices(value.shape[axis]))
        value = value.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return value


def _split(call: Call) -> Sequence[Tensor]:
    axis, count = call.attribute("axis", 0), len(call.node.outputs)
    if call.optional(1) is not None:
        return torch.split(call[0], call.integers(1), axis)
    size = -(-call[0].shape[axis] // count)
    return torch.split(call[0], [*[size] * (count - 1), call[0].shape[axis] - size * (count - 1)], axis)


def _constant(call: Call) -> Tensor:
    if call.attribute("value") is not None:
        return tensor_of(call.attribute("value"))
    kinds = {"value_int": torch.int64, "value_ints": torch.int64, "value_float": torch.float32}
    name = next(name for name in (*kinds, "value_floats") if call.attribute(name) is not None)
    return torch.tensor(call.attribute(name), dtype=kinds.get(name, torch.float32))


def _constant_of_shape(call: Call) -> Tensor:
    value = call.attribute("value")
    return (torch.zeros(1) if value is None else tensor_of(value)).expand(call.integers(0))


def _cumulative(call: Call) -> Tensor:
    value, axis = call[0], int(call[1])
    if call.attribute("reverse", 0):
        value = value.flip(axis)
    total = value.cumsum(axis)
    if call.attribute("exclusive", 0):
        total = total - value
    return total.flip(axis) if call.attribute("reverse", 0) else total


def _arg_max(call: Call) -> Tensor:
    if call.attribute("select_last_index", 0):
        raise NotImplementedError("ArgMax with select_last_index")
    return call[0].argmax(call.attribute("axis", 0), bool(call.attribute("keepdims", 1)))


def _top(call: Call) -> Sequence[Tensor]:
    axis, largest = call.attribute("axis", -1), bool(call.attribute("largest", 1))
    values, places = torch.sort(call[0], dim=axis, descending=largest, stable=True)
    count = call.integers(1)[0]
    return values.narrow(axis, 0, count), places.narrow(axis, 0, count)


def _conv(call: Call) -> Tensor:
    if call.attribute("auto_pad", "NOTSET") != "NOTSET":
        raise NotImplementedError(f"Conv with auto_pad {call.attribute('auto_pad')}")
    rank = call[0].dim() - 2
    pads = list(call.attribute("pads", [0] * 2 * rank))
    ends = [size for axis in reversed(range(rank)) for size in (pads[axis], pads[axis + rank])]
    run = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    strides, dilations = (list(call.attribute(name, [1] * rank)) for name in ("strides", "dilations"))
    padded = functional.pad(call[0], ends)
    return run(padded, call[1], call.optional(2), strides, 0, dilations, call.attribute("group", 1))


def _product(call: Call, left: Tensor, right: Tensor) -> Tensor:
    """A matrix product; with ``half_sums``, one instruction's 16 products are added exactly, and their sums in fp16."""
    if not (call.half_sums and call.types[0] == ir.DataType.FLOAT16):
        return left @ right
    total = torch.zeros(())
    for columns, rows in zip(left.split(16, -1), right.split(16, -2), strict=True):
        total = (total + columns @ rows).half().float()
    return total


def _gemm(call: Call) -> Tensor:
    left, right = (call[at].T if call.attribute(name, 0) else call[at] for at, name in ((0, "transA"), (1, "transB")))
    product, added = call.attribute("alpha", 1.0) * _product(call, left, right), call.optional(2)
    return product if added is None else product + call.attribute("beta", 1.0) * added


def _layer_norm(call: Call) -> Tensor:
    """In FP32 with one rounding at the end, as TensorRT's normalization layer."""
    axis = call.attribute("axis", -1) % call[0].dim()
    shape = call[0].shape[axis:]
    bias = call.optional(2)
    normal = functional.layer_norm(call[0], shape, None, None, call.attribute("epsilon", 1e-5)) * call[1]
    return normal if bias is None else normal + bias


def _attention(call: Call) -> Tensor:
    """Scores and softmax in FP32 with one rounding at the end, as fused kernels compute them; opset 23 and 24."""
    rest = [index for index in range(4, len(call.inputs)) if call.inputs[index] is not None]
    if call[0].dim() != 4 or rest or call.attribute("softcap", 0.0) or len(call.node.outputs) > 1:
        raise NotImplementedError("Attention other than of query, key, value and mask with 4 dimensions")
    (query, key, value), mask = (call[index] for index in range(3)), call.optional(3)
    groups = query.shape[1] // key.shape[1]
    scale = call.attribute("scale") or query.shape[-1] ** -0.5
    scores = (query * scale) @ key.repeat_interleave(groups, 1).transpose(2, 3)
    if call.attribute("is_causal", 0):
        scores = scores.masked_fill(~torch.ones(scores.shape[2:], dtype=torch.bool).tril(), -math.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1) @ value.repeat_interleave(groups, 1)


def _tensor_scatter(call: Call) -> Tensor:
    """Writes an update into a cache, row by row, from an index on; opset 24."""
    if call.attribute("mode", "linear") != "linear":
        raise NotImplementedError(f"TensorScatter with mode {call.attribute('mode')}")
    cache, update, axis = call[0].clone(), call[1], call.attribute("axis", -2) % call[0].dim() - 1
    starts = [0] * len(cache) if call.optional(2) is None else call.integers(2)
    for row, start in enumerate(starts):
        cache[row].narrow(axis, start, update.shape[axis + 1]).copy_(update[row])
    return cache


def _along(call: Call, parameter: Tensor) -> Tensor:
    """A scale or zero point in the shape of the quantised tensor: of all, of each slice of an axis, or of blocks."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    axis, block = call.attribute("axis", 1) % call[0].dim(), call.attribute("block_size", 0)
    if block:
        return parameter.repeat_interleave(block, axis).narrow(axis, 0, call[0].shape[axis])
    return parameter.reshape([-1 if at == axis else 1 for at in range(call[0].dim())])


def _quantize(call: Call) -> Tensor:
    zero, kind = call.optional(2), quantized_type(call)
    scaled = torch.round(call[0] / _along(call, call[1]))  # half to even
    return torch.clamp(scaled + (0 if zero is None else _along(call, zero)), *RANGES[kind])


def quantized_type(call: Call) -> ir.DataType:
    """The type that QuantizeLinear writes: that of its zero point, or of its attribute."""
    given = call.types[2] if len(call.types) > 2 else None
    return given or ir.DataType(call.attribute("output_dtype", 0) or ir.DataType.UINT8)


def _dequantize(call: Call) -> Tensor:
    zero, value = call.optional(2), call[0].to(torch.float32)
    return (value if zero is None else value - _along(call, zero)) * _along(call, call[1])


def tensor_of(stored: ir.TensorProtocol) -> Tensor:
    """A stored tensor as one of torch's; bfloat16 by its bits, INT4 as bytes."""
    array = stored.numpy()
    if stored.dtype == ir.DataType.BFLOAT16:
        return torch.from_numpy(array.view("int16").copy()).view(torch.bfloat16)
    return torch.from_numpy(array.astype("int8") if stored.dtype == ir.DataType.INT4 else array.copy())


_SAME_NAME = (
    "Abs",
    "Cos",
    "Erf",
    "Exp",
    "Floor",
    "Log",
    "Neg",
    "Relu",
    "Reciprocal",
    "Sigmoid",
    "Sin",
    "Sqrt",
    "Tanh",
    "Add",
    "Sub",
    "Mul",
    "Pow",
    "Where",
)
"""Operators that torch has under the same name."""

OPERATORS: dict[str, Operator] = {
    **{name: _each(getattr(torch, name.lower())) for name in _SAME_NAME},
    "And": _each(torch.logical_and),
    "Or": _each(torch.logical_or),
    "Not": _each(torch.logical_not),
    "Equal": _each(torch.eq),
    "Greater": _each(torch.gt),
    "GreaterOrEqual": _each(torch.ge),
    "Less": _each(torch.lt),
    "LessOrEqual": _each(torch.le),
    "Range": _each(torch.arange),
    "Identity": lambda call: call[0],
    "Cast": lambda call: call[0],
    "Max": _folded(torch.maximum),
    "Min": _folded(torch.minimum),
    "Div": _divide,
    "Clip": _clip,
    "ReduceMean": _reduced(lambda value, axes, kept: value.mean(axes, kept)),
    "ReduceSum": _reduced(lambda value, axes, kept: value.sum(axes, kept)),
    "ReduceMax": _reduced(lambda value, axes, kept: value.amax(axes, kept)),
    "ReduceMin": _reduced(lambda value, axes, kept: value.amin(axes, kept)),
    "ReduceL2": _reduced(lambda value, axes, kept: value.square().sum(axes, kept).sqrt()),
    "Concat": lambda call: torch.cat([call[at] for at in range(len(call.inputs))], call.attribute("axis")),
    "Transpose": lambda call: call[0].permute(tuple(call.attribute("perm", range(call[0].dim())[::-1]))),
    "Softmax": lambda call: torch.softmax(call[0], call.attribute("axis", -1)),
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Shape": _shape,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "ScatterElements": _scatter_elements,
    "Slice": _slice,
    "Split": _split,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative,
    "ArgMax": _arg_max,
    "TopK": _top,
    "Conv": _conv,
    "MatMul": lambda call: _product(call, call[0], call[1]),
    "Gemm": _gemm,
    "LayerNormalization": _layer_norm,
    "Attention": _attention,
    "TensorScatter": _tensor_scatter,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
}
"""Operator name -> its function."""
