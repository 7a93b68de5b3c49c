"""The backend ``cuda``: ONNX Runtime's CUDA provider, the cache bound on the GPU. It was not yet run on a GPU.

A provider's name in a list is a promise. Before a graph is loaded, the provider multiplies two matrices with the
fallback to the CPU switched off; and a session that came without it is refused.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.user_cache import cache_directory
from blip2edge.errors import BackendError, BundleError
from blip2edge.runtime.backends.base import Settled
from blip2edge.runtime.backends.probe import check_provider

# Two graphs of one node each on float32 [b, h, s, d], IR version 8, opset 17, made with onnx 1.23: Gather(x, rows) on
# axis 0, and Slice(x, first, end, axis). value_info writes the type and the shape's length as the bytes below.
GATHER = base64.b64decode(
    "CAg6fQohCgF4CgRyb3dzEgF5IgZHYXRoZXIqCwoEYXhpcxgAoAECEgFrWh8KAXgSGgoYCAESFAoDEgFiCgMSAWgKAxIBcwoDEgFkWhMKBHJv"
    "d3MSCwoJCAcSBQoDEgFuYh8KAXkSGgoYCAESFAoDEgFCCgMSAUgKAxIBUwoDEgFEQgQKABAR"
)
SLICE = base64.b64decode(
    "CAg6ogEKHwoBeAoFZmlyc3QKA2VuZAoEYXhpcxIBeSIFU2xpY2USAWtaHwoBeBIaChgIARIUCgMSAWIKAxIBaAoDEgFzCgMSAWRaEwoFZmly"
    "c3QSCgoICAcSBAoCCAFaEQoDZW5kEgoKCAgHEgQKAggBWhIKBGF4aXMSCgoICAcSBAoCCAFiHwoBeRIaChgIARIUCgMSAUIKAxIBSAoDEgFT"
    "CgMSAURCBAoAEBE="
)
FLOAT32_4D, FLOAT16_4D = b"\x08\x01\x12\x14", b"\x08\x0a\x12\x14"
SLOTS = 2  # the axis of [B, H, P, d] that is cut

Place = tuple[str, int]
"""A device by its name in ONNX Runtime, and its number."""


class DeviceArray:
    """A tensor ``[B, H, P, d]`` on the device.

    Args:
        value: ONNX Runtime's ``OrtValue``.
        small: Runs one of the two small graphs there.
    """

    def __init__(self, value: Any, small: Callable[[bytes, Mapping[str, Any]], Any]) -> None:
        self.value = value
        self._small = small
        self.shape: tuple[int, ...] = tuple(value.shape())
        self.ndim = len(self.shape)
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        self.dtype = np.dtype(kinds[value.data_type()])

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array: Array = self.value.numpy()
        return array if dtype is None else array.astype(dtype)

    def copy(self) -> Array:
        """The values on the host, to be written to."""
        return np.array(self.value.numpy())

    def __getitem__(self, key: Any) -> DeviceArray | Array:
        """Rows by their numbers, or a piece of the slots, as another tensor on the device."""
        if isinstance(key, np.ndarray) and key.ndim == 1 and key.dtype.kind in "iu":
            return self._run(GATHER, {"rows": key.astype(np.int64)})
        everything = slice(None)
        if isinstance(key, tuple) and len(key) == SLOTS + 1 and key[:SLOTS] == (everything, everything):
            first, end, step = key[SLOTS].indices(self.shape[SLOTS])
            if step == 1:
                bounds = {"first": first, "end": max(first, end), "axis": SLOTS}
                return self._run(SLICE, {name: np.array([at], np.int64) for name, at in bounds.items()})
        part: Array = self.value.numpy()[key]
        return part

    def _run(self, graph: bytes, inputs: Mapping[str, Array]) -> DeviceArray:
        if self.dtype == np.float16:
            graph = graph.replace(FLOAT32_4D, FLOAT16_4D)
        return DeviceArray(self._small(graph, {"x": self.value, **inputs}), self._small)


class BoundSession:
    """A graph whose inputs and outputs are bound where they are; it follows the session protocol.

    Args:
        onnxruntime: The package.
        path: The ``.onnx`` file.
        options: ONNX Runtime's session options.
        providers: Execution providers, best first.
        place: Where what stays is kept.
        kept: Whether an output of that name stays on the device.
    """

    def __init__(
        self,
        onnxruntime: Any,
        path: str,
        options: Any,
        providers: Sequence[Any],
        place: Place,
        kept: Callable[[str], bool],
    ) -> None:
        self._onnxruntime, self._place, self._kept = onnxruntime, place, kept
        self._session = onnxruntime.InferenceSession(path, options, providers=list(providers))
        self._providers = list(providers)
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._small = cache(self._open_small)

    def run(self, inputs: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """See :class:`blip2edge.runtime.backends.base.Session`; inputs and outputs may be on the device."""
        names = list(self.output_names if outputs is None else outputs)
        binding = self._session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, DeviceArray):
                binding.bind_ortvalue_input(name, value.value)
            else:
                binding.bind_ortvalue_input(name, self._value(np.ascontiguousarray(value)))
        for name in names:
            device, number = self._place if self._kept(name) else ("cpu", 0)
            binding.bind_output(name, device, number)
        self._session.run_with_iobinding(binding)
        values = zip(names, binding.get_outputs(), strict=True)
        return {
            name: DeviceArray(value, self._run_small) if self._kept(name) else value.numpy()
            for name, value in values
        }

    def close(self) -> None:
        """See :class:`blip2edge.runtime.backends.base.Session`."""
        del self._session
        self._small.cache_clear()

    def provider(self) -> str:
        """The provider that comes first."""
        return str(self._session.get_providers()[0])

    def _open_small(self, graph: bytes) -> Any:
        options = self._onnxruntime.SessionOptions()
        options.log_severity_level = 3
        return self._onnxruntime.InferenceSession(graph, options, providers=self._providers)

    def _run_small(self, graph: bytes, inputs: Mapping[str, Any]) -> Any:
        session = self._small(graph)
        binding = session.io_binding()
        for name, value in inputs.items():
            if isinstance(value, np.ndarray):
                binding.bind_cpu_input(name, value)
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output("y", *self._place)
        session.run_with_iobinding(binding)
        return binding.get_outputs()[0]


CUDA = "CUDAExecutionProvider"
GPU = ("cuda", 0)
KEPT = ("present.", "cross.")
"""Beginnings of the outputs that stay on the device: keys and values."""

CUDA_OPTIONS = {"cudnn_conv_algo_search": "HEURISTIC", "do_copy_in_default_stream": "1"}


def open_graph(
    path: Path,
    threads: int | None = None,
    settled: Settled | None = None,  # noqa: ARG001 - every backend is asked with it, and there is no copy for this one
) -> BoundSession:
    """Loads a graph on the GPU.

    Raises:
        BackendError: onnxruntime is not installed, or its CUDA provider does not run here.
        BundleError: The file is no graph that it can run.
    """
    return open_with(path, threads, CUDA, [(CUDA, CUDA_OPTIONS)])


def open_with(path: Path, threads: int | None, provider: str, providers: list[Any]) -> BoundSession:
    """Loads a graph with the provider that is to run it, proven beforehand.

    Args:
        path: The ``.onnx`` file.
        threads: CPU threads, for what no GPU takes.
        provider: The one that comes first.
        providers: All, best first, with their options.

    Raises:
        BackendError, BundleError: As :func:`open_graph`.
    """
    onnxruntime = proven(provider)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = BoundSession(onnxruntime, str(path), options, providers, GPU, is_kept)
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        reason = str(error).strip().splitlines()[0]
        raise BundleError(
            f"ONNX Runtime cannot load {path} on {provider} ({reason})", "see `blip2edge doctor`"
        ) from error
    if session.provider() != provider:
        raise BackendError(
            f"ONNX Runtime fell back to {session.provider()} for {path.name}", "see `blip2edge doctor`"
        )
    return session


def is_kept(name: str) -> bool:
    """Whether an output stays on the device."""
    return name.startswith(KEPT)


@cache
def proven(provider: str) -> Any:
    """The package onnxruntime, once its provider has multiplied two matrices.

    Raises:
        BackendError: It is not installed, or the provider does not run here.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(
            f"{provider} needs onnxruntime-gpu, which is not installed",
            'install it: pip install "blip2edge[gpu]"; on a Jetson, see docs/jetson.md',
        ) from error
    if provider not in onnxruntime.get_available_providers():
        names = ", ".join(onnxruntime.get_available_providers())
        raise BackendError(
            f"this onnxruntime has no {provider}, only {names}",
            'pip uninstall onnxruntime, then pip install "blip2edge[gpu]"; on a Jetson, see docs/jetson.md',
        )
    check = check_provider(onnxruntime, provider)
    if not check.ok:
        raise BackendError(f"{provider} is {check.detail}", check.fix or "see `blip2edge doctor`")
    return onnxruntime


TENSORRT = "TensorrtExecutionProvider"


def open_graph_with_tensorrt(
    path: Path,
    threads: int | None = None,
    settled: Settled | None = None,  # noqa: ARG001 - every backend is asked with it, and there is no copy for this one
) -> BoundSession:
    """Loads a graph with TensorRT, and CUDA for what it does not take; errors as those of ``backend_cuda``."""
    kept = cache_directory() / "ort-tensorrt"
    kept.mkdir(parents=True, exist_ok=True)
    options = {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(kept),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(kept),
    }
    return open_with(path, threads, TENSORRT, [(TENSORRT, options), (CUDA, CUDA_OPTIONS)])
