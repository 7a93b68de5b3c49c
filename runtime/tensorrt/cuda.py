"""Calls CUDA through cuda-python: buffers, streams, events and graphs. Every returned status is checked.

A tensor that both host and GPU access is a :class:`Mirror`: a pinned buffer on the host and a buffer on the GPU, with
copies between them. If host and GPU share one memory (Jetson), a mirror is a single pinned buffer with two addresses.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, option

MODULES = ("cuda.bindings.runtime", "cuda.cudart")
"""Names under which cuda-python's runtime API can be imported, the newest name first."""


def load_cuda() -> Any:
    """Imports the module of cuda-python with the CUDA runtime API.

    Raises:
        BackendError: cuda-python is not installed or cannot be loaded.
    """
    reasons = []
    for name in MODULES:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise BackendError(
        f"cuda-python is not installed or does not load ({'; '.join(reasons)})",
        "install it: pip install cuda-bindings, in the CUDA version that nvidia-smi shows",
    )


class Cuda:
    """The functions of the CUDA runtime that this project uses.

    Args:
        api: The module from :func:`load_cuda`.

    Attributes:
        shares_memory: Whether host and GPU share one memory.

    Raises:
        BackendError: There is no driver or no GPU.
    """

    def __init__(self, api: Any) -> None:
        self.api = api
        self.shares_memory = bool(self(api.cudaGetDeviceProperties, 0).integrated)

    def __call__(self, function: Any, *arguments: Any) -> Any:
        """Calls a function of the API and returns its result without the status.

        Raises:
            BackendError: The status is an error.
        """
        status, *results = function(*arguments)
        if int(status) != 0:
            text = self.api.cudaGetErrorString(status)[1]
            text = text.decode() if isinstance(text, bytes) else str(text)
            name = getattr(function, "__name__", "CUDA")
            hint = "see `blip2edge doctor`"
            if "memory" in text:
                hint = f"build the engines again with a smaller {option('capacity')} or {option('max_batch')}, "
                hint += "or stop other programs that use the GPU"
            raise BackendError(f"{name} failed: {text}", hint)
        return results[0] if len(results) == 1 else tuple(results)

    def stream(self) -> int:
        """Creates a CUDA stream that does not wait for the default stream; returns its handle."""
        return int(self(self.api.cudaStreamCreateWithFlags, self.api.cudaStreamNonBlocking))

    def synchronize(self, stream: int) -> None:
        """Waits until all work in the stream is done."""
        self(self.api.cudaStreamSynchronize, stream)

    def event(self) -> int:
        """Creates a CUDA event without timing; returns its handle."""
        return int(self(self.api.cudaEventCreateWithFlags, self.api.cudaEventDisableTiming))

    def record(self, event: int, stream: int) -> None:
        """Records the event in the stream, after the work that the stream contains now."""
        self(self.api.cudaEventRecord, event, stream)

    def wait(self, event: int) -> None:
        """Waits until the stream has reached the recorded event."""
        self(self.api.cudaEventSynchronize, event)

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Copies ``size`` bytes in the stream; ``target`` and ``source`` are addresses on the host or on the GPU."""
        self(self.api.cudaMemcpyAsync, target, source, size, self._anywhere, stream)

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        stream: int,
    ) -> None:
        """Copies ``height`` rows of ``width`` bytes in the stream; a pitch is the distance of two rows in bytes."""
        copy = self.api.cudaMemcpy2DAsync
        self(copy, target, target_pitch, source, source_pitch, width, height, self._anywhere, stream)

    def zero(self, target: int, size: int, stream: int) -> None:
        """Fills ``size`` bytes at the GPU address ``target`` with zeros, in the stream."""
        self(self.api.cudaMemsetAsync, target, 0, size, stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Records the work that a function adds to a stream as a CUDA graph, without executing the work.

        Args:
            stream: The stream. If ``work`` raises an error, the capture ends, and the stream can be used again.
            work: Adds the work to the stream; the function must not wait for the stream.

        Returns:
            The handle of a CUDA graph that can be launched.
        """
        mode = self.api.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self(self.api.cudaStreamBeginCapture, stream, mode)
        try:
            work()
        except BaseException:
            status, graph = self.api.cudaStreamEndCapture(stream)
            if int(status) == 0 and graph is not None:
                self.api.cudaGraphDestroy(graph)
            raise
        graph = self(self.api.cudaStreamEndCapture, stream)
        made: int = self(self.api.cudaGraphInstantiate, graph, 0)
        self(self.api.cudaGraphDestroy, graph)
        return made

    def destroy_graph(self, graph: int) -> None:
        """Frees a CUDA graph from :meth:`capture`."""
        self(self.api.cudaGraphExecDestroy, graph)

    def destroy_event(self, event: int) -> None:
        """Frees an event."""
        self(self.api.cudaEventDestroy, event)

    def destroy_stream(self, stream: int) -> None:
        """Frees a stream; its work must be finished."""
        self(self.api.cudaStreamDestroy, stream)

    def launch(self, graph: int, stream: int) -> None:
        """Launches a CUDA graph in the stream."""
        self(self.api.cudaGraphLaunch, graph, stream)

    @property
    def _anywhere(self) -> Any:
        return self.api.cudaMemcpyKind.cudaMemcpyDefault


class DeviceBuffer:
    """Memory on the GPU.

    Args:
        cuda: The CUDA runtime.
        size: Size in bytes.
    """

    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda = cuda
        self.size = size
        self.address = int(cuda(cuda.api.cudaMalloc, max(size, 1)))

    def free(self) -> None:
        """Frees the memory; a second call does nothing."""
        if self.address:
            address, self.address = self.address, 0
            self._cuda(self._cuda.api.cudaFree, address)


class Mirror:
    """A tensor that both host and GPU access: one shared buffer, or a buffer on each side.

    Args:
        cuda: The CUDA runtime.
        shape: The largest shape of the tensor.
        dtype: dtype of the elements.
        on_device: Whether to make a buffer of the GPU's own even if host and GPU share one memory. The GPU does not
            cache pinned memory of the host, so large tensors that it reads in every step need their own buffer.

    Attributes:
        address: Address of the buffer on the GPU.
    """

    def __init__(self, cuda: Cuda, shape: Sequence[int], dtype: np.dtype[Any], *, on_device: bool = False) -> None:
        self._cuda = cuda
        self.dtype = dtype
        self._count = math.prod(shape)
        size = max(self._count * dtype.itemsize, 1)
        shared = cuda.shares_memory and not on_device
        flags = cuda.api.cudaHostAllocMapped if shared else cuda.api.cudaHostAllocDefault
        self._pinned = int(cuda(cuda.api.cudaHostAlloc, size, flags))
        view = (ctypes.c_uint8 * size).from_address(self._pinned)
        self._host: Array = np.frombuffer(memoryview(view), dtype, count=self._count)
        self._device: DeviceBuffer | None = None
        if shared:
            self.address = int(cuda(cuda.api.cudaHostGetDevicePointer, self._pinned, 0))
        else:
            self._device = DeviceBuffer(cuda, size)
            self.address = self._device.address

    def view(self, shape: Sequence[int]) -> Array:
        """Returns the host's buffer as an array of this shape; the array begins at the start of the buffer.

        Raises:
            ValueError: The shape has more elements than the buffer.
        """
        count = math.prod(shape)
        if count > self._count:
            raise ValueError(f"a tensor {tuple(shape)} does not fit a buffer of {self._count} elements")
        return self._host[:count].reshape(shape)

    def holds(self, shape: Sequence[int]) -> bool:
        """Returns whether a tensor of this shape fits into the buffer."""
        return math.prod(shape) <= self._count

    def put(self, values: Array, stream: int) -> None:
        """Starts a copy of ``values`` to the GPU. Wait for the stream before the next call."""
        self.view(values.shape)[...] = values
        if self._device is not None:
            self._cuda.copy(self.address, self._pinned, values.size * self.dtype.itemsize, stream)

    def fetch(self, shape: Sequence[int], stream: int) -> Array:
        """Starts a copy from the GPU to the host; the returned array is valid when the stream has finished the copy."""
        if self._device is not None:
            size = math.prod(shape) * self.dtype.itemsize
            self._cuda.copy(self._pinned, self.address, size, stream)
        return self.view(shape)

    def free(self) -> None:
        """Frees the memory; a second call does nothing."""
        if self._pinned:
            pinned, self._pinned = self._pinned, 0
            self._host = np.empty(0, self.dtype)
            self._cuda(self._cuda.api.cudaFreeHost, pinned)
        if self._device is not None:
            self._device.free()
