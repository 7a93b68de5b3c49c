"""Writes small ONNX models as bytes, for checks and measurements: the runtime does not depend on the onnx package.

Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3. Wire format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from blip2edge.bundle.dtypes import Array

ELEMENT_TYPES: Mapping[str, int] = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "int32": 6,
    "int64": 7,
    "float16": 10,
}
"""``TensorProto.DataType`` by NumPy's names."""

IR_VERSION, OPSET = 8, 17

TensorType = tuple[str, Sequence[int | str]]
"""dtype and shape; a dimension that is a name takes any length."""

Node = tuple[str, Sequence[str], str]
"""Operator, names of its inputs, name of its output. All attributes have their defaults."""


def onnx_model(
    nodes: Sequence[Node],
    inputs: Mapping[str, TensorType],
    output: tuple[str, TensorType],
    weights: Mapping[str, Array] | None = None,
) -> bytes:
    """Builds a small ONNX model and returns it as a serialised ``ModelProto`` of opset 17.

    Args:
        nodes: The model's nodes, in the order in which they run.
        inputs: The model's inputs by name.
        output: The model's only output.
        weights: Arrays that are stored in the model, by name.
    """
    graph = b""
    for operator, names, result in nodes:
        graph += _field(1, b"".join(_text(1, name) for name in names) + _text(2, result) + _text(4, operator))
    graph += _text(2, "graph")
    for name, values in (weights or {}).items():
        graph += _field(5, _weight(name, values))
    for name, kind in inputs.items():
        graph += _field(11, _value(name, kind))
    graph += _field(12, _value(*output))
    return _number(1, IR_VERSION) + _field(8, _text(1, "") + _number(2, OPSET)) + _field(7, graph)


def _weight(name: str, values: Array) -> bytes:
    """``TensorProto``."""
    dims = b"".join(_number(1, size) for size in values.shape)
    return dims + _number(2, ELEMENT_TYPES[str(values.dtype)]) + _text(8, name) + _field(9, values.tobytes())


def _value(name: str, kind: TensorType) -> bytes:
    """``ValueInfoProto``."""
    dtype, shape = kind
    dims = b"".join(_field(1, _text(2, dim) if isinstance(dim, str) else _number(1, dim)) for dim in shape)
    return _text(1, name) + _field(2, _field(1, _number(1, ELEMENT_TYPES[dtype]) + _field(2, dims)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _field(field, content.encode())
