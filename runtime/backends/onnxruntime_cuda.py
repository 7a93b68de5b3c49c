"""The backends ``cuda`` and ``ort-tensorrt``: ONNX Runtime's GPU providers. Not run on a GPU yet.

Keys and values stay on the GPU from step to step. ONNX Runtime may list an execution provider that does not work. So
before a graph is loaded, two matrices are multiplied on the provider, with the fallback to the CPU switched off. If
ONNX Runtime loads the graph on another provider, an error is raised.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER, Axis, GraphSpec
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BackendError, BundleError, option
from blip2edge.packages import pip_command, require
from blip2edge.runtime.backends.base import NO_GRAPH, RUN_FIX, DeviceArray, OptimizedFile, closed_graph
from blip2edge.runtime.backends.onnxruntime_cpu import FLOATS, WEIGHTS_FOLDER, raised_as
from blip2edge.runtime.backends.probe import (
    COMPUTE,
    RECORD_NODES,
    check_provider,
    count_nodes,
)

CUDA, TENSORRT, FALLBACK = "CUDAExecutionProvider", "TensorrtExecutionProvider", "CPUExecutionProvider"
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "do_copy_in_default_stream": "1", "use_tf32": "0"}
"""Options of the CUDA provider. TF32 is off: its mantissa has 10 bits, so token ids could differ from those of FP32."""

CAPTURE = "enable_cuda_graph"
GRAPHS_VARIABLE = "BLIP2EDGE_CUDA_GRAPHS"
GRAPH_ID = "gpu_graph_id"
"""Run option: the number of the CUDA graph to capture or replay; :data:`NO_GRAPH` for a run without CUDA graph."""

PRECISION_FLAGS = {"fp16": "trt_fp16_enable", "int8": "trt_int8_enable"}
"""Options of the TensorRT provider that allow FP16 and INT8 kernels. TF32 kernels are always allowed."""

JETSON = "; on a Jetson, see docs/jetson.md"
GPU, HOST = ("cuda", 0), ("cpu", 0)
"""Devices: ONNX Runtime's name and the number of the device."""

ON_DEVICE = ("present.", "cross.")
"""Prefixes of the names of outputs that stay on the device: keys and values."""


def open_graph(
    path: Path,
    threads: int | None = None,
    optimized: OptimizedFile | None = None,
) -> DeviceSession:
    """Loads a graph with the CUDA provider; raises the errors of :func:`open_with`.

    If the environment variable :data:`GRAPHS_VARIABLE` is 1, decode steps are captured as CUDA graphs. This works only
    with the decoder of an optimized copy.
    """
    captures = optimized is not None and path.stem == DECODER and os.environ.get(GRAPHS_VARIABLE) == "1"
    options = {**CUDA_OPTIONS, CAPTURE: "1"} if captures else CUDA_OPTIONS
    return open_with(path, threads, CUDA, [(CUDA, options)], optimized)


def open_graph_with_tensorrt(
    path: Path,
    threads: int | None = None,
    optimized: OptimizedFile | None = None,  # noqa: ARG001 - one signature for all backends; no copies for this one
    spec: GraphSpec | None = None,
    precisions: Sequence[str] = (),
) -> DeviceSession:
    """Loads a graph with the TensorRT provider; CUDA runs the nodes that TensorRT does not support.

    The provider builds an engine for the whole range of shapes in ``spec``, and keeps it in the user's cache directory.
    Without ``spec``, the engine is built again at each shape outside the range of all earlier shapes. Errors are those
    of :func:`open_with`.
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
    """Makes the TensorRT provider's options with the smallest, usual and largest shape of each input that can vary."""
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
        optimized: How to load a graph of an optimized copy; None for an exported (not optimized) graph.

    Raises:
        BackendError: onnxruntime is not installed, the provider does not work here, or ONNX Runtime runs some matrix
            multiplications, attentions or norms of the graph on the CPU.
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
    """Loads a graph of the optimized copy for CUDA on the CPU, to check the copy on a machine without a GPU."""
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
            f"pip uninstall onnxruntime, then {pip_command('gpu')}{JETSON}",
        )
    check = check_provider(onnxruntime, provider)
    if not check.ok:
        raise BackendError(f"{provider} does not work ({check.detail})", check.fix or "see `blip2edge doctor`")
    return onnxruntime


class DeviceSession:
    """A graph whose keys and values stay on the device; implements the ``Session`` protocol of ``base.py``.

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
        captures: Whether the provider may capture repeated runs as CUDA graphs.
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
        self.captures = any(one[1].get(CAPTURE) == "1" for one in self._providers if isinstance(one, tuple))
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
        values = self._run_with_binding(None, inputs, zip(names, devices, strict=True))
        return {
            name: DeviceArray(value, self.run_model) if name.startswith(ON_DEVICE) else value.numpy()
            for name, value in zip(names, values, strict=True)
        }

    def run_model(self, model: bytes, inputs: Mapping[str, Any]) -> Any:
        """Runs a small serialised ONNX model on the device; returns its output. See :data:`RunModel`."""
        return self._run_with_binding(model, inputs, [("y", self.device)])[0]

    def close(self) -> None:
        """Releases the graph and its memory; see :class:`blip2edge.runtime.backends.base.Session`."""
        self._session = None
        self._open_model.cache_clear()

    def _run_with_binding(
        self, model: bytes | None, inputs: Mapping[str, Any], outputs: Iterable[tuple[str, tuple[str, int]]]
    ) -> list[Any]:
        """Runs the graph, or the small model ``model``; returns an ``OrtValue`` for each output.

        Args:
            model: A serialised small model; None for the graph.
            inputs: Arrays by input name.
            outputs: (name, device) of each output to compute.
        """
        binding = self.new_binding(model)
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, self.value_of(value, None if model else self.dtypes.get(name)))
        for name, device in outputs:
            binding.bind_output(name, *device)
        self.run_binding(binding, model)
        values: list[Any] = binding.get_outputs()
        return values

    def new_binding(self, model: bytes | None = None) -> Any:
        """Returns a new binding of ONNX Runtime for the graph, or for a small model; see ``BindingSession``."""
        if self._session is None:
            raise closed_graph()
        return (self._session if model is None else self._open_model(model)).io_binding()

    def run_binding(self, binding: Any, model: bytes | None = None, graph: int = NO_GRAPH) -> None:
        """Runs the graph, or a small model, on bound values; see ``BindingSession``."""
        if self._session is None:
            raise closed_graph()
        session = self._session if model is None else self._open_model(model)
        options = None
        if self.captures and model is None:
            options = self.onnxruntime.RunOptions()
            options.add_run_config_entry(GRAPH_ID, str(graph))
        with raised_as(BackendError, "ONNX Runtime cannot run the graph", RUN_FIX):
            session.run_with_iobinding(binding, options)

    def release_graph(self, graph: int) -> None:
        """Frees a captured CUDA graph; see ``BindingSession``."""
        if self._session is not None and self.captures and hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(graph)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """Allocates memory on the device; returns ONNX Runtime's ``OrtValue``."""
        return self.onnxruntime.OrtValue.ortvalue_from_shape_and_type(list(shape), dtype, *self.device)

    def on_device(self, array: Array) -> Any:
        """Copies an array to new memory on the device; a scalar stays on the host, where kernels read it."""
        device = HOST if array.ndim == 0 else self.device
        return self.onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array), *device)

    def value_of(self, array: Any, dtype: np.dtype[Any] | None = None) -> Any:
        """Returns ONNX Runtime's ``OrtValue`` for an array in host or device memory.

        Args:
            array: The array.
            dtype: Converts the array to this dtype; None keeps its dtype. Needed because the graphs of an optimized
                copy may have FP16 inputs where the bundle's own graphs have FP32 inputs.
        """
        if isinstance(array, DeviceArray) and dtype in (None, array.dtype):
            return array.value
        converted = np.ascontiguousarray(array, dtype)
        return self.onnxruntime.OrtValue.ortvalue_from_numpy(converted)

    def _open(self, model: bytes) -> Any:
        options = self.onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return self.onnxruntime.InferenceSession(model, options, providers=self._providers)
