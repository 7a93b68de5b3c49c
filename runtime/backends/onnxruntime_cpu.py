"""The backend ``cpu``: runs graphs on the CPU with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, Blip2EdgeError, BundleError, one_line
from blip2edge.packages import require
from blip2edge.runtime.backends.base import RUN_FIX, OptimizedFile, closed_graph
from blip2edge.runtime.backends.huge_pages import HugePages, on_huge_pages
from blip2edge.runtime.backends.probe import cores

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's option with the directory of the external weights, for a graph that is loaded from bytes."""

PROVIDERS = ["CPUExecutionProvider"]
SLOW_FUSIONS = ["SkipLayerNormFusion", "BiasSkipLayerNormFusion"]
"""Fusions that ONNX Runtime must not apply to an optimized file: ``optimize`` applied them where they are faster."""


@contextmanager
def raised_as(kind: type[Blip2EdgeError], problem: str, fix: str | None = None) -> Iterator[None]:
    """Turns an exception that ONNX Runtime raises in the block into an error of this project.

    Args:
        kind: The error class to raise.
        problem: What failed; the error shows it together with ONNX Runtime's message.
        fix: What the user can do; None if unknown.
    """
    try:
        yield
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise kind(f"{problem} ({one_line(error)})", fix) from error


class OnnxRuntimeSession:
    """A graph in ONNX Runtime on the CPU; implements :class:`blip2edge.runtime.backends.base.Session`.

    ONNX Runtime's own session may run in several threads at once.

    Args:
        graph: The ``.onnx`` file, whose weights may be in a data file next to it; or a serialised graph.
        threads: Threads within an operator; None leaves the choice to ONNX Runtime.
        lean: Run the graph as it is written, with as little memory as possible: no folded constants, no prepacked
            weights, no arena. Slow; for checking a graph that is larger than the memory.
        optimized: How to load a file that ``optimize`` wrote; None for an exported (not optimized) graph.
        weights: Directory of the external weights of a serialised graph; None if it has no external weights.

    Raises:
        BackendError: onnxruntime is not installed.
        BundleError: ONNX Runtime cannot load the file.
    """

    def __init__(
        self,
        graph: Path | bytes,
        threads: int | None = None,
        *,
        lean: bool = False,
        optimized: OptimizedFile | None = None,
        weights: Path | None = None,
    ) -> None:
        onnxruntime = require("onnxruntime", "the cpu backend", BackendError)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
            if threads > cores():  # threads that spin on a core would block those that compute
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Idle threads that spin would take the cores from the session that runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if lean or (optimized is not None and not optimized.layout):
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if lean:
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.enable_cpu_mem_arena = False
        name = graph if isinstance(graph, Path) else "a changed graph"
        huge = nullcontext(HugePages()) if lean or isinstance(graph, bytes) else on_huge_pages()
        with raised_as(BundleError, f"ONNX Runtime cannot load {name}", "export the checkpoint again"), huge as pages:
            if optimized is not None and isinstance(graph, Path):
                graph, weights = graph.read_bytes(), optimized.weights
            if weights is not None:
                options.add_session_config_entry(WEIGHTS_FOLDER, str(weights))
            self._session: Any = onnxruntime.InferenceSession(
                str(graph) if isinstance(graph, Path) else graph,
                options,
                providers=PROVIDERS,
                disabled_optimizers=None if optimized is None else SLOW_FUSIONS,
                enable_fallback=False,  # it would try the same again, and print that to stdout
            )
            self.input_names = tuple(value.name for value in self._session.get_inputs())
            # Only a decoder reads all weights for a single row. Products of many rows are as fast on small pages.
            pages.wanted = "logits_indices" in self.input_names
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Runs the graph; returns the outputs by name; see :class:`blip2edge.runtime.backends.base.Session`."""
        names = self.output_names if outputs is None else outputs
        if self._session is None:
            raise closed_graph()
        with raised_as(BackendError, "ONNX Runtime cannot run the graph", RUN_FIX):
            values = self._session.run(list(names), dict(inputs))
        return dict(zip(names, values, strict=True))

    def close(self) -> None:
        """Releases the graph and its memory; see :class:`blip2edge.runtime.backends.base.Session`."""
        self._session = None

    def in_place(self, pairs: Mapping[str, str]) -> HostBuffers:
        """Makes the KV cache for one decoder state; runs of the graph read and write it in place.

        Args:
            pairs: For each ``present`` output, the name of the ``past`` input whose buffer the output is written to.
        """
        if self._session is None:
            raise closed_graph()
        return HostBuffers(self._session, pairs, self._value)


FLOATS: Mapping[str, np.dtype[Any]] = {"tensor(float)": np.dtype(np.float32), "tensor(float16)": np.dtype(np.float16)}
"""NumPy's dtype for each floating-point type, by ONNX Runtime's name of the type."""


class HostBuffers:
    """Buffers of a KV cache in CPU memory. Implements the protocol :class:`CacheBuffers` (``base.py``).

    Args:
        session: An ``onnxruntime.InferenceSession``.
        pairs: For each ``present`` output, the name of the ``past`` input whose buffer the output is written to.
        value_of: Makes ONNX Runtime's ``OrtValue`` of an array, without copying the array.
    """

    captures = False

    def __init__(self, session: Any, pairs: Mapping[str, str], value_of: Callable[[Array], Any]) -> None:
        self._session = session
        self._binding = session.io_binding()  # one thread at a time may use it
        self._pairs = dict(pairs)
        self._value = value_of
        self._dtypes = {value.name: FLOATS.get(value.type) for value in session.get_inputs()}
        self._buffers: dict[str, Array] = {}
        self._bound_rows: tuple[int, int] | None = None
        self._size = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Returns the number of rows and the number of slots; see :class:`CacheBuffers`."""
        return self._size

    def resize(self, shape: Sequence[int], used: int) -> None:
        """Replaces the buffers by larger ones; see :class:`CacheBuffers`."""
        rows, _ = self._size
        for name in self._pairs.values():
            buffer = np.empty(tuple(shape), self._dtypes[name])
            if rows:
                buffer[:rows, :, :used] = self._buffers[name][:, :, :used]
            self._buffers[name] = buffer
        self._size = (shape[0], shape[2])
        self._bound_rows = None

    def select(self, rows: NDArray[np.int64], used: int) -> None:
        """Reorders the rows: row i gets the content of old row ``rows[i]``; see :class:`CacheBuffers`."""
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        for buffer in self._buffers.values() if len(moved) else ():
            buffer[moved, :, :used] = buffer[rows[moved], :, :used]

    def append(self, other: HostBuffers, first: int, count: int, used: int) -> None:
        """Copies rows of another state's buffers into these buffers; see :class:`CacheBuffers`."""
        for name, buffer in self._buffers.items():
            buffer[first : first + count, :, :used] = other._buffers[name][:count, :, :used]

    def run(self, inputs: Mapping[str, Array], first: int, output: str, shape: Sequence[int]) -> Array:
        """Runs the graph once and returns one output, float32; see :class:`CacheBuffers`."""
        if self._bound_rows != (first, shape[0]):
            self._bound_rows = first, shape[0]
            values = {name: self._value(array[first : first + shape[0]]) for name, array in self._buffers.items()}
            for name, value in values.items():
                self._binding.bind_ortvalue_input(name, value)
            for present, name in self._pairs.items():
                self._binding.bind_ortvalue_output(present, values[name])
        result = np.empty(tuple(shape), np.float32)
        for name, array in inputs.items():
            self._binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(array)))
        self._binding.bind_ortvalue_output(output, self._value(result))
        with raised_as(BackendError, "ONNX Runtime cannot run the optimized decoder"):
            self._session.run_with_iobinding(self._binding)
        return result


def open_graph(path: Path, threads: int | None = None, optimized: OptimizedFile | None = None) -> OnnxRuntimeSession:
    """Loads a graph in ONNX Runtime on the CPU; arguments and errors are those of :class:`OnnxRuntimeSession`."""
    return OnnxRuntimeSession(path, threads, optimized=optimized)
