"""Measures the roofline of this machine's cores: bytes read from memory per second, and operations per second.

A stage cannot be faster than its number of operations divided by the operations per second, nor than the bytes of its
weights divided by the bytes per second (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009). One core is
measured in CPU time of this process, which hardly depends on the load of other processes; several cores are measured
in wall time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError
from blip2edge.packages import pip_command
from blip2edge.runtime.backends.base import BACKENDS, open_session
from blip2edge.runtime.backends.probe import Node, cores, onnx_model, processor
from blip2edge.runtime.bench.devices import CPU_EFFICIENCY, GB, THIS, Board
from blip2edge.runtime.bench.memory import machine_memory
from blip2edge.runtime.images.preprocess import Preprocessing
from blip2edge.shapes.cost import Roofline

STREAMED = 1 << 28  # bytes, more than any cache holds
SIZES = ((1024, 1024, 1024), (256, 768, 768), (192, 768, 3072))  # of products: rows, inner, columns
REPEATS = 7
PICTURE = (480, 640)  # rows and columns of the picture that preprocessing is timed for, as in `bench`
CPU_BASE = int(0.15 * GB)  # interpreter, NumPy, tokenizers, ONNX Runtime
INPUT_PIXEL_S, OUTPUT_PIXEL_S = 6.2e-9, 25e-9
"""Seconds of preprocessing for each pixel of the picture, and for each pixel of the vision encoder's input, on one core
of the reference processor. Measured: 3.1 ms from 480 x 640 to 224 x 224 pixels, 4.6 to 7.0 ms to 384 x 384."""

ELEMENTS = 1 << 16
OPERATORS = 1.5
"""Assumed time of the operators after a matrix multiplication, in multiples of the time of a tanh on the same numbers.
The value was chosen so that predicted times come near the measured times in ``benchmarks/results/plan.json``."""

SMALL: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Mul", ("{0}", "{0}")), ("ReduceMean", ("{1}",)), ("Sqrt", ("{2}",)), ("Reciprocal", ("{3}",)),
    ("Mul", ("{0}", "{4}")), ("Reshape", ("{5}", "heads")), ("Transpose", ("{6}",)), ("Reshape", ("{7}", "flat")),
)  # fmt: skip
"""Typical operators between matrix multiplications, each with its inputs: ``{0}`` is the input of the first operator,
``{n}`` the output of operator n."""

BLOCKS, WIDTH = 32, 256
READ = (24, 1024)  # matrices and their sides, more than any cache holds: what a decode step reads
CACHED_READ = (6, 512)  # as READ, for a model that the last cache holds


def measure(backend: str, threads: int = 1) -> Roofline:
    """Measures bytes and operations per second of ``threads`` cores of this machine; takes about a second.

    Args:
        backend: The backend that runs the matrix multiplications, ``cpu`` or ``openvino``.
        threads: Number of cores.

    Raises:
        BackendError: The backend's package is not installed.
    """
    rates = [_rate(backend, threads, integer=integer) for integer in (False, True)]
    return Roofline(_bandwidth(threads), *rates)


def this_device(threads: int | None = None, image_size: int = 224) -> Board:
    """Measures bandwidth, rates of matrix multiplication, and preprocessing of this machine; takes a few seconds.

    Args:
        threads: CPU threads; None for all cores.
        image_size: Height and width of the vision encoder's input in pixels; preprocessing resizes a picture to it.

    Raises:
        BackendError: Neither ONNX Runtime nor OpenVINO is installed.
    """
    threads = threads or cores()
    for backend in (name for name, row in BACKENDS.items() if row.host):
        try:
            found = measure(backend, threads)
            call_s = call_seconds(backend)
            read = min(1.0, read_bytes_per_s(backend, threads) / found.bytes_per_s)
            cached = max(read, read_bytes_per_s(backend, threads, CACHED_READ) / found.bytes_per_s)
            element_s = element_seconds(backend)
            break
        except BackendError:  # its package is not installed
            continue
    else:
        raise BackendError(
            "measuring this machine needs ONNX Runtime or OpenVINO, and neither is installed",
            f"install one: {pip_command('cpu')}",
        )
    memory = machine_memory()
    total, free = (memory.total, memory.free) if memory is not None else (0, 0)
    rates = {"fp32": found.float_ops_per_s, "int8": found.integer_ops_per_s}
    shares = {**CPU_EFFICIENCY.bytes, "fp32": read, "fp16": read}
    efficiency = replace(
        CPU_EFFICIENCY,
        bytes=shares,
        call_s=call_s,
        cached_bytes=cached,
        element_s=element_s,
    )
    return Board(
        name=THIS,
        title=f"{processor()}, {threads} {'thread' if threads == 1 else 'threads'}, CPU",
        memory=total,
        reserved=total - free,
        base=CPU_BASE,
        bytes_per_s=found.bytes_per_s,
        rates=rates,
        host=preprocess_seconds(PICTURE, image_size) / reference_seconds(image_size),
        efficiency=efficiency,
        source=f"measured with backend {backend}",
        measured=True,
    )


def reference_seconds(size: int) -> float:
    """Returns the seconds in which the reference processor preprocesses a picture to ``size`` × ``size`` pixels."""
    return PICTURE[0] * PICTURE[1] * INPUT_PIXEL_S + size * size * OUTPUT_PIXEL_S


def call_seconds(backend: str) -> float:
    """Measures the mean seconds of a call of a small operator whose data is no longer in the processor's caches.

    This is the case in a decode step: the weights of all layers are read between two calls of the same operator.

    Raises:
        BackendError: The backend's package is not installed.
    """
    nodes: list[Node] = []
    name = "x"
    for block in range(BLOCKS):
        names = [name, *(f"v{block}_{number}" for number in range(len(SMALL)))]
        for (operator, places), output in zip(SMALL, names[1:], strict=True):
            nodes.append((operator, tuple(one.format(*names) for one in places), output))
        name = names[-1]
    shapes = {"heads": np.array([4, WIDTH // 4], np.int64), "flat": np.array([1, WIDTH], np.int64)}
    kind = ("float32", (1, WIDTH))
    model = onnx_model(nodes, {"x": kind}, (name, kind), shapes)
    other = np.ones(STREAMED // 4, np.float32)
    inputs = {"x": np.ones((1, WIDTH), np.float32)}
    return _run_seconds(backend, model, inputs, 1, before=lambda: np.dot(other, other)) / len(nodes)


def read_bytes_per_s(backend: str, threads: int = 1, matrices: tuple[int, int] = READ) -> float:
    """Measures the bytes of float32 weights that are read per second while one row is multiplied by matrices.

    A decode step of one picture consists of such multiplications.

    Args:
        backend: The backend that runs the multiplications.
        threads: Number of cores.
        matrices: Number of square matrices that are read, and the number of rows of each matrix.

    Raises:
        BackendError: The backend's package is not installed.
    """
    count, side = matrices
    rng = np.random.default_rng(0)
    weights = {f"w{number}": rng.standard_normal((side, side), np.float32) for number in range(count)}
    least = min(_read_seconds(backend, threads, weights, convolutions) for convolutions in (False, True))
    return sum(one.nbytes for one in weights.values()) / least


def _read_seconds(backend: str, threads: int, weights: dict[str, Array], convolutions: bool) -> float:
    """Measures the least seconds of multiplying one row by each matrix of ``weights``.

    ``convolutions``: whether the model has Conv nodes in place of MatMul nodes; optimized copies have both kinds.
    """
    side = len(next(iter(weights.values())))
    shape = (1, side, 1, 1) if convolutions else (1, side)
    held = {name: one.reshape(side, side, 1, 1) if convolutions else one for name, one in weights.items()}
    operator, kind = "Conv" if convolutions else "MatMul", ("float32", shape)
    nodes: list[Node] = [(operator, ("x", name), f"y{name}") for name in held]
    nodes.append(("Sum", [f"y{name}" for name in held], "y"))
    model = onnx_model(nodes, {"x": kind}, ("y", kind), held)
    return _run_seconds(backend, model, {"x": np.ones(shape, np.float32)}, threads)


def element_seconds(backend: str) -> float:
    """Measures the seconds that the operators between matrix multiplications need for each number.

    A tanh is measured, and its time multiplied by :data:`OPERATORS`.

    Raises:
        BackendError: The backend's package is not installed.
    """
    return OPERATORS * _operator_seconds(backend, 16, ELEMENTS) / ELEMENTS


def _operator_seconds(backend: str, nodes: int, elements: int) -> float:
    """Measures the least CPU seconds of one tanh on ``elements`` numbers, in a chain of ``nodes`` such operators."""
    chain: list[Node] = [("Tanh", (f"v{number}",), f"v{number + 1}") for number in range(nodes)]
    kind = ("float32", (1, elements))
    model = onnx_model(chain, {"v0": kind}, (f"v{nodes}", kind))
    return _run_seconds(backend, model, {"v0": np.zeros((1, elements), np.float32)}, 1) / nodes


def preprocess_seconds(picture: tuple[int, int], size: int) -> float:
    """Measures the CPU seconds of preprocessing one picture.

    ``picture``: rows and columns of the picture; ``size``: height and width after preprocessing.
    """
    pixels = np.random.default_rng(0).integers(0, 256, (*picture, 3), dtype=np.uint8)
    preprocessing = Preprocessing(size={"height": size, "width": size})
    return _least(lambda: preprocessing.batch([pixels]))


def _bandwidth(threads: int = 1) -> float:
    """Measures the bytes per second that ``threads`` threads read from memory; each computes a sum of squares."""
    streams = [np.ones(STREAMED // 4 // threads, np.float32) for _ in range(threads)]
    if threads == 1:
        return streams[0].nbytes / _least(lambda: np.dot(streams[0], streams[0]))
    with ThreadPoolExecutor(threads) as pool:
        least = _least(lambda: list(pool.map(lambda one: np.dot(one, one), streams)), time.perf_counter)
    return sum(one.nbytes for one in streams) / least


def _rate(backend: str, threads: int = 1, *, integer: bool) -> float:
    """Measures the operations per second of matrix multiplications; returns the best of several sizes.

    ``integer``: whether both matrices are 8-bit integers.
    """
    return max(
        2.0 * rows * inner * columns / product_seconds(backend, rows, inner, columns, threads, integer=integer)
        for rows, inner, columns in SIZES
    )


def product_seconds(backend: str, rows: int, inner: int, columns: int, threads: int = 1, *, integer: bool) -> float:
    """Measures the least time of one matrix multiplication, in seconds."""
    rng = np.random.default_rng(0)
    if integer:
        second = rng.integers(-127, 128, (inner, columns), np.int8)
    else:
        second = rng.standard_normal((inner, columns), np.float32)
    first = rng.uniform(-120, 120, (rows, inner)).astype(np.float32)
    return _run_seconds(backend, product_graph(rows, second), {"a": first}, threads)


def _run_seconds(
    backend: str,
    model: bytes,
    inputs: dict[str, Array],
    threads: int,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Runs a model several times; returns the least time in seconds (CPU time with one thread, else wall time).

    ``before`` is called before each run, and its time does not count.
    """
    with TemporaryDirectory(prefix="blip2edge-roofline-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(model)
        session = open_session(path, backend, threads)
        clock = time.process_time if threads == 1 else time.perf_counter
        least = _least(lambda: session.run(inputs), clock, before)
        session.close()
    return least


def _least(
    compute: Callable[[], Any],
    clock: Callable[[], float] | None = None,
    before: Callable[[], object] = lambda: None,
) -> float:
    """Calls ``compute`` once as warm-up and :data:`REPEATS` times more; returns the least time in seconds.

    The time is CPU time if no ``clock`` is given. The time of ``before``, called before each run, does not count.
    """
    clock = clock or time.process_time
    compute()
    times = []
    for _ in range(REPEATS):
        before()
        start = clock()
        compute()
        times.append(clock() - start)
    return max(min(times), 1e-9)


def product_graph(rows: int, second: Array) -> bytes:
    """Makes an ONNX model of ``c = a @ b`` (matrices) with ``b`` stored in the model; returns the model's bytes.

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


def measure_available(own: str) -> tuple[Roofline | None, str]:
    """Measures the roofline of one core with the backend ``own``, or else with another CPU backend.

    Returns:
        The roofline and the name of the backend; None and an empty name if no CPU backend is installed.
    """
    hosts = [name for name, row in BACKENDS.items() if row.host]
    for backend in sorted(hosts, key=lambda name: name != own):
        try:
            return measure(backend), backend
        except BackendError:  # its package is not installed
            continue
    return None, ""
