"""What one core of this machine can do: bytes streamed from memory, and products of matrices, each a second.

A stage can be no faster than its products at that rate, and no faster than its weights at that bandwidth
(Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009). Measured by process CPU time, so that what others
take from the machine is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession

STREAMED = 1 << 28  # bytes: far more than any cache holds
SIZES = ((1024, 1024, 1024), (256, 768, 768), (192, 768, 3072))  # of products: rows, inner, columns
REPEATS = 7


@dataclass(frozen=True)
class Roofline:
    """One core's limits.

    Attributes:
        bytes_per_s: Read from memory, in one stream.
        float_ops_per_s: Additions and multiplications of float32 products.
        integer_ops_per_s: The same of products of unsigned with signed bytes.
    """

    bytes_per_s: float
    float_ops_per_s: float
    integer_ops_per_s: float

    def to_json(self) -> dict[str, float]:
        """Gigabytes and billions of operations a second."""
        return {
            "gigabytes_per_s": round(self.bytes_per_s / 1e9, 1),
            "gigaflops_fp32": round(self.float_ops_per_s / 1e9, 1),
            "gigaops_int8": round(self.integer_ops_per_s / 1e9, 1),
        }


@dataclass(frozen=True)
class Work:
    """What a stage has to do at least.

    Attributes:
        float_ops: Additions and multiplications in float32.
        integer_ops: The same in bytes.
        bytes: Weights, and keys and values, that are read.
    """

    float_ops: float
    integer_ops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.float_ops + other.float_ops, self.integer_ops + other.integer_ops, self.bytes + other.bytes
        )

    def seconds(self, roofline: Roofline) -> float:
        """The least that it can take: its products, or its bytes where those take longer."""
        products = self.float_ops / roofline.float_ops_per_s + self.integer_ops / roofline.integer_ops_per_s
        return max(products, self.bytes / roofline.bytes_per_s)

    def bound(self, roofline: Roofline) -> str:
        """What limits it: ``products`` or ``bytes``."""
        return "bytes" if self.seconds(roofline) <= self.bytes / roofline.bytes_per_s else "products"


def measure() -> Roofline:
    """Measures this machine, in about a second.

    Raises:
        BackendError: onnxruntime is not installed.
    """
    return Roofline(_bandwidth(), *(_rate(kind) for kind in ("MatMul", "MatMulInteger")))


def _bandwidth() -> float:
    """Bytes a second that a sum of squares reads."""
    stream = np.ones(STREAMED // 4, np.float32)
    return stream.nbytes / _least(lambda: np.dot(stream, stream))


def _rate(kind: str) -> float:
    """Operations a second of a product whose second factor is a weight: the best of some sizes."""
    rng = np.random.default_rng(0)
    best = 0.0
    for rows, inner, columns in SIZES:
        if kind == "MatMul":
            first = rng.standard_normal((rows, inner)).astype(np.float32)
            second = rng.standard_normal((inner, columns)).astype(np.float32)
        else:
            first = rng.integers(0, 256, (rows, inner), np.uint8)
            second = rng.integers(-127, 128, (inner, columns), np.int8)
        best = max(best, 2.0 * rows * inner * columns / _seconds(kind, first, second))
    return best


def _seconds(kind: str, first: Array, second: Array) -> float:
    """The least time of one product."""
    with TemporaryDirectory(prefix="blip2edge-roofline-") as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(product_graph(kind, first, second))
        session = OnnxRuntimeSession(path, 1)
        return _least(lambda: session.run({"a": first}))


def _least(work: Callable[[], Any]) -> float:
    """The least CPU time of some runs."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


# A graph of one node, as bytes: the runtime does without the onnx package. Field numbers: onnx/onnx.proto3.

KINDS: Mapping[str, int] = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6}
IR_VERSION, OPSET = 8, 17


def product_graph(kind: str, first: Array, second: Array) -> bytes:
    """An ONNX model ``c = a · b`` whose ``b`` is stored in it.

    Args:
        kind: ``MatMul`` or ``MatMulInteger``.
        first: An ``a``, for its shape and dtype.
        second: ``b``.
    """
    out = "int32" if kind == "MatMulInteger" else str(first.dtype)
    node = _text(1, "a") + _text(1, "b") + _text(2, "c") + _text(4, kind)
    dims = b"".join(_number(1, size) for size in second.shape)
    weight = dims + _number(2, KINDS[str(second.dtype)]) + _text(8, "b") + _field(9, second.tobytes())
    graph = _field(1, node) + _text(2, "product") + _field(5, weight)
    graph += _field(11, _tensor("a", str(first.dtype), first.shape))
    graph += _field(12, _tensor("c", out, (first.shape[0], second.shape[1])))
    return _number(1, IR_VERSION) + _field(8, _text(1, "") + _number(2, OPSET)) + _field(7, graph)


def _tensor(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _number(1, size)) for size in shape)
    return _text(1, name) + _field(2, _field(1, _number(1, KINDS[dtype]) + _field(2, dims)))


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
