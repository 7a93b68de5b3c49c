"""Measures the roofline of one core: bytes read from memory per second, and operations per second.

The time of a stage has two lower bounds: its operations divided by that rate, and the bytes of its weights divided by
that bandwidth (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009). Measured in CPU time of this process,
so that the load of other processes does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.backends.base import open_session
from blip2edge.runtime.backends.probe import Node, onnx_model
from blip2edge.shapes.cost import Roofline

STREAMED = 1 << 28  # bytes, more than any cache holds
SIZES = ((1024, 1024, 1024), (256, 768, 768), (192, 768, 3072))  # of products: rows, inner, columns
REPEATS = 7


def measure(backend: str) -> Roofline:
    """Measures the limits of one core of this machine; takes about a second.

    Args:
        backend: The backend that runs the matrix products, ``cpu`` or ``openvino``.

    Raises:
        BackendError: The backend's package is not installed.
    """
    rates = [_rate(backend, integer=integer) for integer in (False, True)]
    return Roofline(_bandwidth(), *rates)


def _bandwidth() -> float:
    """Bytes per second read from memory, measured with a sum of squares."""
    stream = np.ones(STREAMED // 4, np.float32)
    return stream.nbytes / _least(lambda: np.dot(stream, stream))


def _rate(backend: str, *, integer: bool) -> float:
    """Operations per second of a matrix product with a constant weight, the best of several sizes."""
    return max(
        2.0 * rows * inner * columns / _seconds(backend, rows, inner, columns, integer=integer)
        for rows, inner, columns in SIZES
    )


def _seconds(backend: str, rows: int, inner: int, columns: int, *, integer: bool) -> float:
    """The least CPU time of one matrix product, in seconds."""
    rng = np.random.default_rng(0)
    if integer:
        second = rng.integers(-127, 128, (inner, columns), np.int8)
    else:
        second = rng.standard_normal((inner, columns), np.float32)
    first = rng.uniform(-120, 120, (rows, inner)).astype(np.float32)
    with TemporaryDirectory(prefix="blip2edge-roofline-") as folder:
        path = Path(folder) / "product.onnx"
        path.write_bytes(product_graph(rows, second))
        session = open_session(path, backend, 1)
        least = _least(lambda: session.run({"a": first}))
        session.close()
    return least


def _least(compute: Callable[[], Any]) -> float:
    """The least CPU time of :data:`REPEATS` runs, after one that warms up."""
    compute()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        compute()
        times.append(time.process_time() - start)
    return max(min(times), 1e-9)


def product_graph(rows: int, second: Array) -> bytes:
    """Makes an ONNX model of a matrix product ``c = a @ b``, with ``b`` stored in the model; returns its bytes.

    Args:
        rows: Number of rows of the input ``a``, float32 ``[rows, inner]``.
        second: The matrix ``b [inner, columns]``, float32 or int8. If int8, the model quantises ``a`` to uint8 (scale
            1, zero point 128) with Q/DQ nodes as in int8 graphs, so that both runtimes multiply integers.
    """
    weights: dict[str, Array] = {"b": second}
    nodes: list[Node] = [("MatMul", ("a", "b"), "c")]
    if second.dtype == np.int8:
        weights |= {"scale": np.array(1, np.float32), "zero": np.array(128, np.uint8)}
        nodes = [
            ("QuantizeLinear", ("a", "scale", "zero"), "quantised"),
            ("DequantizeLinear", ("quantised", "scale", "zero"), "first"),
            ("DequantizeLinear", ("b", "scale"), "second"),
            ("MatMul", ("first", "second"), "c"),
        ]
    inner, columns = second.shape
    return onnx_model(nodes, {"a": ("float32", (rows, inner))}, ("c", ("float32", (rows, columns))), weights)
