"""The backends ``cuda`` and ``ort-tensorrt``: ONNX Runtime's GPU providers. Not run on a GPU yet.

Keys and values stay on the GPU from step to step. ONNX Runtime may list a provider that does not work, so before a
graph is loaded, a product of two matrices is run on the provider, without the fallback to the CPU. A session that does
not use the provider is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import Axis, GraphSpec
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BackendError, BundleError, option
from blip2edge.packages import require
from blip2edge.runtime.backends.base import RUN_FIX, DeviceArray, OptimizedFile, closed_graph
from blip2edge.runtime.backends.onnxruntime_cpu import FLOATS, WEIGHTS_FOLDER, raised_as
from blip2edge.runtime.backends.probe import (
    COMPUTE,
    RECORD_NODES,
    check_provider,
    count_nodes,
    gather_model,
    pad_model,
)

CUDA, TENSORRT, FALLBACK = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "do_copy_in_default_stream": "1", "use_tf32": "0"}
"""TF32 is off: it has 10 bits of mantissa, and FP32 graphs promise the token ids of FP32."""

PRECISION_FLAGS = {"fp16": "trt_fp16_enable", "int8": "trt_int8_enable"}
"""Options of the TensorRT provider that allow kernels of a precision. It has none for TF32, which is on in TensorRT."""

JETSON = "; on a Jetson, see docs/jetson.md"
GPU, HOST = ("cuda", 0), ("cpu", 0)
"""A device as ONNX Runtime names it, and its number."""

ON_DEVICE = ("present.", "cross.")
"""Beginnings of the names of outputs that stay on the device: keys and values."""


def open_graph(
    path: Path,
    threads: int | None = None,
    optimized: OptimizedFile | None = None,
) -> DeviceSession:
    """Loads a graph with the CUDA provider; raises the errors of :func:`open_with`."""
    return open_with(path, threads, CUDA, [(CUDA, CUDA_OPTIONS)], optimized)


def open_graph_with_tensorrt(
    path: Path,
    threads: int | None = None,
    optimized: OptimizedFile | None = None,  # noqa: ARG001 - one signature for all backends; no copies for this one
    spec: GraphSpec | None = None,
    precisions: Sequence[str] = (),
) -> DeviceSession:
    """Loads a graph with the TensorRT provider; CUDA runs the nodes that TensorRT does not support.

    The provider builds an engine for the whole range of shapes in ``spec``, and keeps it in the user's cache directory.
    Without ``spec``, it builds the engine again whenever a shape leaves the range seen so far. Errors are those of
    :func:`open_with`.
    """
    folder = cache_directory() / "ort-tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        **{PRECISION_FLAGS[name]: "1" for name in precisions if name in PRECISION_FLAGS},
        **({} if spec is None else profile_options(spec)),
    }
    return open_with(path, threads, TENSORRT, [(TENSORRT, options), (CUDA, CUDA_OPTIONS)])


def profile_options(spec: GraphSpec) -> dict[str, str]:
    """The TensorRT provider's options for the smallest, usual and largest shape of every input that varies."""
    varying = [tensor for tensor in spec.inputs if any(isinstance(dim, Axis) for dim in tensor.dims)]
    found = {}
    for end in ("min", "opt", "max") if varying else ():
        sizes = {name: int(getattr(axis, end)) for name, axis in spec.axes().items()}
        shapes = (f"{tensor.name}:{'x'.join(map(str, tensor.shape(sizes)))}" for tensor in varying)
        found[f"trt_profile_{end}_shapes"] = ",".join(shapes)
    return found


def open_with(
    path: Path, threads: int | None, provider: str, providers: list[Any], optimized: OptimizedFile | None = None
) -> DeviceSession:
    """Checks that an execution provider works, then loads a graph with this provider.

    Args:
        path: The ``.onnx`` file.
        threads: CPU threads, for operators that no GPU provider supports.
        provider: The provider that must come first.
        providers: All providers, best first, with their options.
        optimized: How to load a graph of an optimized copy; None for a portable graph.

    Raises:
        BackendError: onnxruntime is not installed, the provider does not work here, or ONNX Runtime runs some of the
            graph's products, attentions or norms on the CPU.
        BundleError: ONNX Runtime cannot load the file.
    """
    onnxruntime = checked_package(provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    with raised_as(BundleError, f"ONNX Runtime cannot load {path} on {provider}", "see `blip2edge doctor`"):
        session = DeviceSession(onnxruntime, path, options, providers, GPU, optimized)
    if session.provider != provider:
        raise BackendError(
            f"expected ONNX Runtime to run {path.name} on {provider}, but ONNX Runtime fell back to {session.provider}",
            "see `blip2edge doctor`",
        )
    fallen = {kind: count for kind, count in session.nodes.get(FALLBACK, {}).items() if kind in COMPUTE}
    if fallen:
        counts = ", ".join(f"{count} {kind}" for kind, count in fallen.items())
        raise BackendError(
            f"expected ONNX Runtime to run {path.name} on {provider}, but it runs some nodes on the CPU ({counts})",
            f"make a copy for CUDA: blip2edge optimize BUNDLE {option('backend')} cuda",
        )
    return session


def open_on_host(path: Path, optimized: OptimizedFile | None = None) -> DeviceSession:
    """Loads a graph with the CPU in place of the GPU, to check a copy or this module where there is no GPU."""
    onnxruntime = require("onnxruntime", "the check of a copy for CUDA", BackendError)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Basic: ONNX Runtime folds the casts of FP16 weights, which it computes with in FP32, and fuses no nodes.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with raised_as(BackendError, f"ONNX Runtime cannot load {path}"):
        return DeviceSession(onnxruntime, path, options, [FALLBACK], HOST, optimized)


@cache
def checked_package(provider: str) -> Any:
    """Returns the module onnxruntime, after checking that ``provider`` can multiply two matrices.

    Raises:
        BackendError: onnxruntime is not installed, or the provider does not work here.
    """
    onnxruntime = require("onnxruntime", provider, BackendError, "gpu", JETSON)
    if provider not in onnxruntime.get_available_providers():
        names = ", ".join(onnxruntime.get_available_providers())
        raise BackendError(
            f"the installed onnxruntime has no {provider}, only {names}",
            f"pip uninstall onnxruntime, then pip install 'blip2edge[gpu]'{JETSON}",
        )
    check = check_provider(onnxruntime, provider)
    if not check.ok:
        raise BackendError(f"{provider} does not work ({check.detail})", check.fix or "see `blip2edge doctor`")
    return onnxruntime


class DeviceSession:
    """A graph whose keys and values stay on the device; it follows the ``Session`` protocol of ``base.py``.

    Every call has a binding of its own, so several threads may call :meth:`run` at once.

    Args:
        onnxruntime: The package.
        path: The ``.onnx`` file.
        options: ONNX Runtime's session options.
        providers: Execution providers, best first.
        device: The device that the outputs of :data:`ON_DEVICE` stay on.
        optimized: How to load a graph of an optimized copy; None for a portable graph.

    Attributes:
        provider: The provider that comes first in the loaded session.
        nodes: Number of nodes by provider and operator; empty if this version of ONNX Runtime does not report it.
        dtypes: dtypes of the floating-point inputs, by name. Arrays of another floating type are converted.
    """

    def __init__(
        self,
        onnxruntime: Any,
        path: Path,
        options: Any,
        providers: Sequence[Any],
        device: tuple[str, int],
        optimized: OptimizedFile | None = None,
    ) -> None:
        self.onnxruntime, self._providers, self.device = onnxruntime, list(providers), device
        graph: str | bytes = str(path)
        if optimized is not None:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(optimized.weights))
            graph = path.read_bytes()
        options.add_session_config_entry(RECORD_NODES, "1")
        self._session: Any = onnxruntime.InferenceSession(graph, options, providers=self._providers)
        self._open_model = cache(self._open)
        self.provider = str(self._session.get_providers()[0])
        self.nodes = count_nodes(self._session)
        self.dtypes = {value.name: FLOATS[value.type] for value in self._session.get_inputs() if value.type in FLOATS}
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the graph; arrays may be on the device. See :class:`blip2edge.runtime.backends.base.Session`."""
        if self._session is None:
            raise closed_graph()
        names = list(self.output_names if outputs is None else outputs)
        devices = [self.device if name.startswith(ON_DEVICE) else ("cpu", 0) for name in names]
        values = self._run_with_binding(self._session, inputs, zip(names, devices, strict=True))
        return {
            name: DeviceArray(value, self.run_model) if name.startswith(ON_DEVICE) else value.numpy()
            for name, value in zip(names, values, strict=True)
        }

    def run_model(self, model: bytes, inputs: Mapping[str, Any]) -> Any:
        """Runs a small serialised ONNX model on the device; returns its output. See :data:`RunModel`."""
        if self._session is None:
            raise closed_graph()
        return self._run_with_binding(self._open_model(model), inputs, [("y", self.device)])[0]

    def close(self) -> None:
        """Releases the graph and its memory; see :class:`blip2edge.runtime.backends.base.Session`."""
        self._session = None
        self._open_model.cache_clear()

    def _run_with_binding(
        self, session: Any, inputs: Mapping[str, Any], outputs: Iterable[tuple[str, tuple[str, int]]]
    ) -> list[Any]:
        """Runs a session of ONNX Runtime; returns an ``OrtValue`` per output, on the device given with its name."""
        binding = session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, self.value_of(value, self.dtypes.get(name)))
        for name, device in outputs:
            binding.bind_output(name, *device)
        with raised_as(BackendError, "ONNX Runtime cannot run the graph", RUN_FIX):
            session.run_with_iobinding(binding)
        values: list[Any] = binding.get_outputs()
        return values

    def in_place(self, pairs: Mapping[str, str]) -> DeviceBuffers:
        """Makes buffers on the device that runs read and write in place; see ``base.py``."""
        if self._session is None:
            raise closed_graph()
        return DeviceBuffers(self, pairs)

    def new_binding(self, model: bytes | None = None) -> tuple[Any, Any]:
        """Returns ONNX Runtime's session of the graph, or of a small model, with a new binding for it."""
        session = self._session if model is None else self._open_model(model)
        if self._session is None:
            raise closed_graph()
        return session, session.io_binding()

    def value_of(self, array: Any, dtype: np.dtype[Any] | None = None) -> Any:
        """ONNX Runtime's value of an array on the host or on the device; of type ``dtype`` if it is given.

        A graph of a copy takes FP16 where the bundle's own graph takes FP32. Only the arrays of a graph without a copy
        are converted here.
        """
        if isinstance(array, DeviceArray) and dtype in (None, array.dtype):
            return array.value
        converted = np.ascontiguousarray(array, dtype)
        return self.onnxruntime.OrtValue.ortvalue_from_numpy(converted)

    def _open(self, model: bytes) -> Any:
        options = self.onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return self.onnxruntime.InferenceSession(model, options, providers=self._providers)


class DeviceBuffers:
    """Buffers of a KV cache on the device; they follow :class:`CacheBuffers` of ``base.py``.

    Args:
        session: The decoder's session.
        pairs: Names of outputs, each with the name of the input whose buffer the output is written to.
    """

    def __init__(self, session: DeviceSession, pairs: Mapping[str, str]) -> None:
        self._device = session
        self._pairs = dict(pairs)
        self._values: dict[str, Any] = {}
        self._spare: dict[str, Any] = {}
        self._shape: tuple[int, ...] = (0, 0, 0, 0)
        self._bound: tuple[tuple[int, int], Any, Any] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Rows and slots; see :class:`CacheBuffers`."""
        return self._shape[0], self._shape[2]

    def resize(self, shape: Sequence[int], used: int) -> None:  # noqa: ARG002 - whole rows are copied
        """Replaces the buffers by larger ones; see :class:`CacheBuffers`."""
        old, had = self._values, self._shape
        self._shape = tuple(shape)
        self._values, self._spare = self._empty(), {}
        self._bound = None
        for name in old if had[0] else ():
            self._copy(name, old[name], had, had[0], 0)

    def select(self, rows: NDArray[np.int64], used: int) -> None:  # noqa: ARG002 - as above
        """Copies rows to their new places; see :class:`CacheBuffers`."""
        if np.array_equal(rows, np.arange(len(rows))):
            return
        whole = np.concatenate([rows, np.arange(len(rows), self._shape[0])]).astype(np.int64)
        spare = self._spare or self._empty()
        for name, value in self._values.items():
            self._move(gather_model(self._dtype(name).name), name, (value, self._shape), {"rows": whole}, spare[name])
        self._values, self._spare = spare, self._values
        self._bound = None

    def append(self, other: DeviceBuffers, first: int, count: int, used: int) -> None:
        """Copies the rows of another state behind the own ones; see :class:`CacheBuffers`."""
        if other.size[1] > self.size[1]:
            self.resize((*self._shape[:2], other.size[1], self._shape[3]), used)
        for name, value in other._values.items():
            self._copy(name, value, other._shape, count, first)

    def run(self, inputs: Mapping[str, Array], first: int, output: str, shape: Sequence[int]) -> Array:
        """Runs the graph once and returns one output; see :class:`CacheBuffers`."""
        if self._bound is None or self._bound[0] != (first, shape[0]):
            session, binding = self._device.new_binding()
            for name, value in self._values.items():
                binding.bind_input(name, *self._part(name, value, first, shape[0]))
            for present, name in self._pairs.items():
                binding.bind_output(present, *self._part(name, self._values[name], first, shape[0]))
            self._bound = (first, shape[0]), session, binding
        _, session, binding = self._bound
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._device.value_of(array, self._device.dtypes.get(name)))
        binding.bind_output(output, *HOST)
        with raised_as(BackendError, "ONNX Runtime cannot run the optimized decoder", RUN_FIX):
            session.run_with_iobinding(binding)
        return np.array(binding.get_outputs()[-1].numpy())  # the outputs are in the order in which they were bound

    def _dtype(self, name: str) -> np.dtype[Any]:
        return self._device.dtypes[name]

    def _empty(self) -> dict[str, Any]:
        """Buffers of zeros: kernels may read slots that no token was written to, and NaN would spread from there."""
        make = self._device.onnxruntime.OrtValue.ortvalue_from_numpy
        return {
            name: make(np.zeros(self._shape, self._dtype(name)), *self._device.device) for name in self._pairs.values()
        }

    def _part(self, name: str, value: Any, first: int, rows: int, shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        """Some rows of a buffer as ONNX Runtime binds them: device, its number, dtype, shape and address."""
        of = shape or self._shape
        row = int(np.prod(of[1:])) * self._dtype(name).itemsize
        return (*self._device.device, self._dtype(name).type, [rows, *of[1:]], value.data_ptr() + first * row)

    def _copy(self, name: str, source: Any, shape: tuple[int, ...], rows: int, first: int) -> None:
        """Copies the first rows of a smaller buffer of this shape to the rows from ``first`` on."""
        pads = np.array([0, 0, 0, 0, 0, 0, self._shape[2] - shape[2], 0], np.int64)
        self._move(
            pad_model(self._dtype(name).name),
            name,
            (source, (rows, *shape[1:])),
            {"pads": pads},
            self._values[name],
            first,
        )

    def _move(
        self,
        model: bytes,
        name: str,
        source: tuple[Any, tuple[int, ...]],
        inputs: Mapping[str, Array],
        target: Any,
        first: int = 0,
    ) -> None:
        """Runs a small model on the first rows of a buffer; writes its output to rows of another one."""
        value, shape = source
        session, binding = self._device.new_binding(model)
        binding.bind_input("x", *self._part(name, value, 0, shape[0], shape))
        for key, array in inputs.items():
            binding.bind_ortvalue_input(key, self._device.value_of(array))
        binding.bind_output("y", *self._part(name, target, first, shape[0]))
        with raised_as(BackendError, "ONNX Runtime cannot move the KV cache", RUN_FIX):
            session.run_with_iobinding(binding)
