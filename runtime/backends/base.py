"""The ``Session`` protocol, which the loaded graphs of every backend implement, and the table of backends.

A backend is a module with the function ``open_graph(path, threads, optimized)``, which returns a ``Session``. The
module is imported only when the backend is chosen, so that the packages of the other backends need not be installed.
A backend that runs engines or compiled kernels instead of graphs has no such function; see :attr:`Backend.made_by`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import GraphSpec
from blip2edge.errors import BackendError, UsageError, option
from blip2edge.runtime.backends.probe import gather_model, slice_model


class Session(Protocol):
    """A graph that a backend has loaded and can run.

    Several threads may call :meth:`run` at once; this holds for every backend. Each call returns the results of its
    own inputs, and a later call does not change arrays that were returned earlier. So a backend that reuses buffers
    has separate buffers for each running call, or a lock. :meth:`close` is called once, when no :meth:`run` is in
    progress.
    """

    @property
    def input_names(self) -> tuple[str, ...]:
        """Returns the names of the graph's inputs."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """Returns the names of the graph's outputs."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the graph on one set of inputs.

        Args:
            inputs: Every input by name, in the graph's dtype (float32 for bfloat16, which NumPy does not have).
            outputs: Names of the outputs to compute; None for all.

        Returns:
            The computed arrays by output name.

        Raises:
            BackendError: The session is closed, or the backend cannot run the graph (memory is short, for example).
        """

    def close(self) -> None:
        """Releases the graph and its memory. :meth:`run` raises BackendError afterwards."""


class CacheBuffers(Protocol):
    """The KV cache of one decoder state; :meth:`run` runs the decoder, which writes new keys and values.

    Keys and values of a layer are ``[B, H, C, d]``: B rows, H heads of width d, C slots.

    One thread at a time may use the buffers.

    Attributes:
        captures: Whether runs may be captured as CUDA graphs. When a CUDA graph is replayed, the scalar inputs have
            the values of the first run.
    """

    captures: bool

    @property
    def size(self) -> tuple[int, int]:
        """Returns the number of rows B and of slots C in the buffers; 0 and 0 before the first :meth:`resize`."""

    def resize(self, shape: Sequence[int], used: int) -> None:
        """Replaces the buffers by larger ones.

        Args:
            shape: ``(B, H, C, d)`` of the new buffers; B and C must not be smaller than now.
            used: The content of slots 0 to ``used - 1`` is copied.
        """

    def select(self, rows: NDArray[np.int64], used: int) -> None:
        """Reorders the rows: afterwards row i has the content that row ``rows[i]`` had before.

        Args:
            rows: Old row numbers, at most B.
            used: Number of filled slots; the content of other slots may be lost.
        """

    def append(self, other: Any, first: int, count: int, used: int) -> None:
        """Copies rows 0 to ``count - 1`` of ``other``, the buffers of another decoder state, to rows from ``first`` on.

        ``used``: number of slots to copy.
        """

    def run(self, inputs: Mapping[str, Array], first: int, output: str, shape: Sequence[int]) -> Array:
        """Runs the decoder once on some rows of the buffers.

        Args:
            inputs: All inputs except the KV cache, by name.
            first: Index of the first row to use.
            output: Name of the output to return.
            shape: Shape of ``output``; the length of its first axis is the number of rows to use.

        Returns:
            The values of ``output``, a new array.
        """


@runtime_checkable
class InPlaceSession(Protocol):
    """A session that can run a graph on buffers in the memory of the host, without copies."""

    input_names: tuple[str, ...]

    def in_place(self, pairs: Mapping[str, str]) -> CacheBuffers:
        """Makes empty buffers for a KV cache.

        Args:
            pairs: For each ``present`` output, the name of the ``past`` input whose buffer the output is written to.
        """


NO_GRAPH = -1


@runtime_checkable
class BindingSession(Protocol):
    """A session that can run a graph on device memory, with inputs and outputs bound by address.

    Attributes:
        device: Name of the device in ONNX Runtime, such as ``cuda``, and the number of the device.
        dtypes: dtypes of the graph's floating-point inputs, by name.
        captures: Whether repeated runs may be captured as CUDA graphs.
    """

    input_names: tuple[str, ...]
    device: tuple[str, int]
    dtypes: Mapping[str, np.dtype[Any]]
    captures: bool

    def new_binding(self, model: bytes | None = None) -> Any:
        """Returns a new ``IOBinding`` for the graph, or for a small model of :mod:`.probe`."""

    def run_binding(self, binding: Any, model: bytes | None = None, graph: int = NO_GRAPH) -> None:
        """Runs the graph, or a small model, on the bound inputs and outputs.

        Args:
            binding: A binding of :meth:`new_binding`.
            model: The small model; None for the graph.
            graph: Number of the CUDA graph. The first run with a number captures the graph, later runs replay it; they
                need a binding with the same addresses.
        """

    def release_graph(self, graph: int) -> None:
        """Frees the CUDA graph of this number, if there is one."""

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Allocates memory on the device; returns an ``OrtValue``."""

    def on_device(self, array: Array) -> Any:
        """Copies an array to new memory on the device (a single number: on the host); returns an ``OrtValue``."""


POSITION_AXIS = 2
"""Index of the positions' axis in keys or values ``[rows, heads, positions, head width]``."""

RunModel = Callable[[bytes, Mapping[str, Any]], Any]
"""Type of a function that runs a small ONNX model on the device, and returns its output ``y`` as an ``OrtValue``."""


class DeviceArray:
    """Keys or values ``[B, H, P, d]`` (H heads of width d, P positions) in device memory, float32 or float16.

    Args:
        value: ONNX Runtime's ``OrtValue``.
        run_model: Runs the small ONNX models that select rows and cut slices on the device.
    """

    def __init__(self, value: Any, run_model: RunModel) -> None:
        self.value = value
        self._run_model = run_model
        self.shape: tuple[int, ...] = tuple(value.shape())
        self.ndim = len(self.shape)
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.dtype = np.dtype(dtypes[value.data_type()])

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array: Array = self.value.numpy()
        return array if dtype is None else array.astype(dtype)

    def copy(self) -> Array:
        """Copies the values to the host; returns a new array that may be written to."""
        return np.array(self.value.numpy())

    def __getitem__(self, key: Any) -> DeviceArray | Array:
        """Selects rows by an array of indices, or slices positions, on the device; applies other keys on the host."""
        if isinstance(key, np.ndarray) and key.ndim == 1 and key.dtype.kind in "iu":
            return self._compute(gather_model(self.dtype.name), {"rows": key.astype(np.int64)})
        everything = slice(None)
        if isinstance(key, tuple) and key[:-1] == (everything,) * POSITION_AXIS and isinstance(key[-1], slice):
            first, end, step = key[-1].indices(self.shape[POSITION_AXIS])
            if step == 1:
                bounds = {"first": first, "end": max(first, end), "axis": POSITION_AXIS}
                inputs = {name: np.array([value], np.int64) for name, value in bounds.items()}
                return self._compute(slice_model(self.dtype.name), inputs)
        part: Array = self.value.numpy()[key]
        return part

    def _compute(self, model: bytes, inputs: Mapping[str, Array]) -> DeviceArray:
        return DeviceArray(self._run_model(model, {"x": self, **inputs}), self._run_model)


def closed_graph() -> BackendError:
    """Returns the error that a session raises when it is used after :meth:`Session.close`."""
    return BackendError("this graph is closed", "load the bundle again")


@dataclass(frozen=True)
class OptimizedFile:
    """The settings with which a backend loads a graph file that ``blip2edge optimize`` wrote.

    Attributes:
        weights: Directory of the graph's external weights. Their paths in the graph file are relative to this
            directory.
        layout: Whether ONNX Runtime changes the weight layout for this processor when it loads the file (prepacking).
            The file already contains all other optimizations; the weight layout depends on the processor and is not
            stored.
    """

    weights: Path
    layout: bool = False


NO_BF16_KERNELS = "ONNX Runtime has no CPU kernels for it"
NO_BF16_ARRAYS = "tensors reach this backend as NumPy arrays, and NumPy has no bfloat16"


@dataclass(frozen=True)
class Backend:
    """A backend: one value of ``--backend``, and the module that loads graphs for it.

    Attributes:
        module: Module with ``open_graph(path, threads, optimized)``.
        function: Name of the function that opens graphs; not ``open_graph`` if the module serves several backends.
        made_by: If the backend runs engines or compiled kernels, the command that makes them from the bundle's graphs.
            Empty if the backend runs graphs.
        copy: Name of the optimized copy that the backend can run, a folder in ``optimized/``; empty if it runs none.
        others: If the copy contains a compiled decoder and no graphs, the name of the backend that runs the other
            graphs; then the copy must exist, and the module also has ``open_decoder(bundle, directory)`` and
            ``fault_of_copy(bundle, directory)``. Else empty.
        engines: ``tensorrt`` or ``rtx`` if the backend runs engines of this target instead of graphs; else empty. The
            module of such a backend also has a class ``EngineOpener(bundle, target)``.
        host: Whether the backend computes on the CPU.
        profiled: Whether ``function`` also has the parameters ``spec`` and ``precisions``, because the backend builds
            an engine for a range of shapes.
        refuses: Bundle precisions that the backend cannot run, each with the reason.
    """

    module: str
    function: str = "open_graph"
    made_by: str = ""
    copy: str = ""
    others: str = ""
    engines: str = ""
    host: bool = False
    profiled: bool = False
    refuses: Mapping[str, str] = field(default_factory=lambda: {"bf16": NO_BF16_ARRAYS})


BACKENDS = {
    "cpu": Backend(
        "blip2edge.runtime.backends.onnxruntime_cpu", copy="cpu", host=True, refuses={"bf16": NO_BF16_KERNELS}
    ),
    "openvino": Backend("blip2edge.runtime.backends.openvino", copy="openvino", host=True, refuses={}),
    "cuda": Backend("blip2edge.runtime.backends.onnxruntime_cuda", copy="cuda"),
    "cuda-decoder": Backend(
        "blip2edge.runtime.cuda.backend",
        made_by=f"blip2edge optimize {{}} {option('backend')} cuda-decoder",
        copy="cuda-decoder",
        others="cuda",
    ),
    "tensorrt": Backend(
        "blip2edge.runtime.tensorrt.backend",
        made_by=f"blip2edge build {{}} {option('target')} tensorrt",
        engines="tensorrt",
    ),
    "rtx": Backend(
        "blip2edge.runtime.tensorrt.backend", made_by=f"blip2edge build {{}} {option('target')} rtx", engines="rtx"
    ),
    "ort-tensorrt": Backend(
        "blip2edge.runtime.backends.onnxruntime_cuda", function="open_graph_with_tensorrt", profiled=True
    ),
}
"""The backends, by their names in ``--backend``."""

MOST_THREADS = 1024

RUN_FIX = (
    f"if memory ran out, lower {option('batch_size')} or {option('num_beams')}; else use another {option('backend')}"
)
"""Advice in the error message if a loaded graph fails to run."""


def check_threads(threads: object) -> None:
    """Raises UsageError unless ``threads`` is None or a whole number from 1 to :data:`MOST_THREADS`."""
    if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MOST_THREADS):
        raise UsageError(f"{option('threads')} must be from 1 to {MOST_THREADS}, not {threads!r}")


def check_precision(backend: str, precision: str, *, engines_only: bool = False) -> None:
    """Checks that a backend can run bundles of a precision.

    Args:
        backend: Name of a backend, or ``auto``.
        precision: Precision of the bundle: ``fp32``, ``fp16`` or ``bf16``.
        engines_only: Whether the bundle contains no graphs, so that no other backend can run it.

    Raises:
        BackendError: The backend is unknown, or cannot run this precision.
    """
    reason = find_backend(backend).refuses.get(precision)
    if reason is None:
        return
    others = [name for name, row in BACKENDS.items() if precision not in row.refuses]
    name = next(iter(BACKENDS)) if backend == "auto" else backend
    export = f"export with {option('precision')} fp32 or fp16"
    raise BackendError(
        f"the bundle is in {precision}, which the backend {name} does not run: {reason}",
        f"{export}, and build the engines again"
        if engines_only
        else f"use {option('backend')} {' or '.join(others)}, or {export}",
    )


def find_backend(name: str) -> Backend:
    """Returns the backend with this name; ``auto`` means the first backend in :data:`BACKENDS`.

    Raises:
        BackendError: There is no backend of that name.
    """
    if name == "auto":
        return next(iter(BACKENDS.values()))
    if name not in BACKENDS:
        raise BackendError(f"expected {option('backend')} to be one of auto, {', '.join(BACKENDS)}, got {name}")
    return BACKENDS[name]


def open_session(
    path: Path,
    backend: str = "auto",
    threads: int | None = None,
    spec: GraphSpec | None = None,
    precisions: Sequence[str] = (),
) -> Session:
    """Loads an ``.onnx`` file in a backend, without the optimized copy that the bundle may have for it.

    Args:
        path: The ``.onnx`` file in the bundle. (``GraphOpener`` loads optimized copies and engines.)
        backend: Name of a backend, or ``auto``.
        threads: CPU threads within an operator; None leaves the choice to the backend.
        spec: The graph's inputs and outputs, for backends that build an engine for a range of shapes; None if unknown.
        precisions: Precision of the bundle and precision of the graph, for backends that build an engine.

    Raises:
        BackendError: There is no backend of that name, it runs no graphs, or its package or hardware is missing.
        BundleError: The backend cannot load the file.
    """
    row = find_backend(backend)
    if row.made_by:
        raise BackendError(
            f"expected a backend that runs graphs for {path.name}, got {option('backend')} {backend}, which runs "
            "engines or kernels that are made from graphs",
            f"make them: {row.made_by.format(path.parent)}",
        )
    more = {"spec": spec, "precisions": precisions} if row.profiled else {}
    session: Session = getattr(import_module(row.module), row.function)(path, threads, **more)
    return session
