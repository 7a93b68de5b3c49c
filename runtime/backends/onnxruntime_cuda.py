"""The backends ``cuda`` and ``ort-tensorrt``: ONNX Runtime's GPU providers. Not run on a GPU yet.

Keys and values stay on the GPU from step to step. ONNX Runtime may list a provider that does not work, so before a
graph is loaded, a product of two matrices is run on the provider, without the fallback to the CPU. A session that does
not use the provider is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BackendError, BundleError
from blip2edge.packages import require
from blip2edge.runtime.backends.base import RUN_FIX, OptimizedFile, closed_graph
from blip2edge.runtime.backends.onnxruntime_cpu import raised_as
from blip2edge.runtime.backends.probe import check_provider, onnx_model

CUDA, TENSORRT = "CUDAExecutionProvider", "TensorrtExecutionProvider"
CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "do_copy_in_default_stream": "1"}
JETSON = "; on a Jetson, see docs/jetson.md"
GPU = ("cuda", 0)
"""A device as ONNX Runtime names it, and its number."""

ON_DEVICE = ("present.", "cross.")
"""Beginnings of the names of outputs that stay on the device: keys and values."""

POSITION_AXIS = 2
"""The axis of ``[B, H, P, d]`` that is sliced."""

RunModel = Callable[[bytes, Mapping[str, Any]], Any]
"""Runs a model of :mod:`blip2edge.runtime.backends.probe` on the device; its output ``y`` as an ``OrtValue``."""


def open_graph(
    path: Path,
    threads: int | None = None,
    optimized: OptimizedFile | None = None,  # noqa: ARG001 - one signature for all backends; no copies for this one
) -> DeviceSession:
    """Loads a graph with the CUDA provider; raises the errors of :func:`open_with`."""
    return open_with(path, threads, CUDA, [(CUDA, CUDA_OPTIONS)])


def open_graph_with_tensorrt(
    path: Path,
    threads: int | None = None,
    optimized: OptimizedFile | None = None,  # noqa: ARG001 - as above
) -> DeviceSession:
    """Loads a graph with the TensorRT provider; CUDA runs the nodes that TensorRT does not support.

    Errors are those of :func:`open_with`.
    """
    folder = cache_directory() / "ort-tensorrt"
    folder.mkdir(parents=True, exist_ok=True)
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    return open_with(path, threads, TENSORRT, [(TENSORRT, options), (CUDA, CUDA_OPTIONS)])


def open_with(path: Path, threads: int | None, provider: str, providers: list[Any]) -> DeviceSession:
    """Checks that an execution provider works, then loads a graph with this provider.

    Args:
        path: The ``.onnx`` file.
        threads: CPU threads, for operators that no GPU provider supports.
        provider: The provider that must come first.
        providers: All providers, best first, with their options.

    Raises:
        BackendError: onnxruntime is not installed, or the provider does not work here.
        BundleError: ONNX Runtime cannot load the file.
    """
    onnxruntime = checked_package(provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    with raised_as(BundleError, f"ONNX Runtime cannot load {path} on {provider}", "see `blip2edge doctor`"):
        session = DeviceSession(onnxruntime, path, options, providers, GPU)
    if session.provider != provider:
        raise BackendError(
            f"expected ONNX Runtime to run {path.name} on {provider}, but ONNX Runtime fell back to {session.provider}",
            "see `blip2edge doctor`",
        )
    return session


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

    Attributes:
        provider: The provider that comes first in the loaded session.
    """

    def __init__(
        self, onnxruntime: Any, path: Path, options: Any, providers: Sequence[Any], device: tuple[str, int]
    ) -> None:
        self._onnxruntime, self._providers, self._device = onnxruntime, list(providers), device
        self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=self._providers)
        self._open_model = cache(self._open)
        self.provider = str(self._session.get_providers()[0])
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Runs the graph; arrays may be on the device. See :class:`blip2edge.runtime.backends.base.Session`."""
        if self._session is None:
            raise closed_graph()
        names = list(self.output_names if outputs is None else outputs)
        devices = [self._device if name.startswith(ON_DEVICE) else ("cpu", 0) for name in names]
        values = self._run_with_binding(self._session, inputs, zip(names, devices, strict=True))
        return {
            name: DeviceArray(value, self.run_model) if name.startswith(ON_DEVICE) else value.numpy()
            for name, value in zip(names, values, strict=True)
        }

    def run_model(self, model: bytes, inputs: Mapping[str, Any]) -> Any:
        """Runs a small serialised ONNX model on the device; returns its output. See :data:`RunModel`."""
        if self._session is None:
            raise closed_graph()
        return self._run_with_binding(self._open_model(model), inputs, [("y", self._device)])[0]

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
            binding.bind_ortvalue_input(name, self._value(value))
        for name, device in outputs:
            binding.bind_output(name, *device)
        with raised_as(BackendError, "ONNX Runtime cannot run the graph", RUN_FIX):
            session.run_with_iobinding(binding)
        values: list[Any] = binding.get_outputs()
        return values

    def _value(self, array: Any) -> Any:
        """ONNX Runtime's value of an array on the host or on the device."""
        if isinstance(array, DeviceArray):
            return array.value
        return self._onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    def _open(self, model: bytes) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return self._onnxruntime.InferenceSession(model, options, providers=self._providers)


class DeviceArray:
    """Keys or values ``[B, H, P, d]`` in device memory, float32 or float16.

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
        """Selects rows by an array of indices, or slices positions, on the device; any other key on the host."""
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


@cache
def gather_model(dtype: str) -> bytes:
    """An ONNX model that selects rows on the device: ``y = x[rows]`` for ``x [b, h, s, d]`` of this dtype."""
    x, y = (dtype, ("b", "h", "s", "d")), (dtype, ("n", "h", "s", "d"))
    return onnx_model([("Gather", ("x", "rows"), "y")], {"x": x, "rows": ("int64", ("n",))}, ("y", y))


@cache
def slice_model(dtype: str) -> bytes:
    """An ONNX model that cuts a slice on the device, for ``x [b, h, s, d]`` of this dtype.

    The slice goes from ``first`` to ``end`` (exclusive) along ``axis``; these three inputs are int64 ``[1]``.
    """
    bounds = dict.fromkeys(("first", "end", "axis"), ("int64", (1,)))
    x, y = (dtype, ("b", "h", "s", "d")), (dtype, ("B", "H", "S", "D"))
    return onnx_model([("Slice", ("x", *bounds), "y")], {"x": x, **bounds}, ("y", y))
