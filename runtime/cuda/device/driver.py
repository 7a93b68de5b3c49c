"""Runs kernels on a GPU with the CUDA driver, through ``cuda-bindings``. Not run on a GPU yet.

The tests run this code with a simulated driver, and compare the names and arguments of the calls with the installed
``cuda-bindings``.
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError, option
from blip2edge.packages import install_command
from blip2edge.runtime.backends.base import RUN_FIX, closed_graph
from blip2edge.runtime.cuda.kernel import THREADS, Launch

INSTALL = f"{install_command('cuda-decoder')}, with cuda-bindings of the CUDA version that nvidia-smi shows"
OUT_OF_MEMORY = 2
"""The status CUDA_ERROR_OUT_OF_MEMORY of ``cuda.h``."""


def load_driver() -> Any:
    """Imports the module of cuda-bindings with the driver API.

    Raises:
        BackendError: cuda-bindings is not installed or does not load.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"cuda-bindings is not installed or does not load: {error}", INSTALL) from error


class _Pinned(NamedTuple):
    """Host memory that the GPU copies to, and the event that marks the end of a copy."""

    address: int
    size: int
    event: Any


class DriverDevice:
    """One GPU; implements :class:`blip2edge.runtime.cuda.device.interface.KernelDevice`.

    It uses the primary context, which ONNX Runtime and PyTorch use too.

    Args:
        api: The module from :func:`load_driver`.
        number: Number of the GPU.

    Attributes:
        capability: Compute capability times ten.

    Raises:
        BackendError: There is no driver or no GPU.
    """

    def __init__(self, api: Any, number: int = 0) -> None:
        self._api = api
        self._lock = threading.RLock()
        self._closed = False
        self._memory: set[int] = set()
        self._pinned: list[_Pinned] = []
        self._idle: list[_Pinned] = []
        self._graphs: dict[int, Any] = {}
        self._last_graph = 0
        self._modules: list[Any] = []
        self._functions: dict[str, Any] = {}
        self._call(api.cuInit, 0)
        self._device = self._call(api.cuDeviceGet, number)
        names = api.CUdevice_attribute
        major, minor, self.multiprocessors = (
            int(self._call(api.cuDeviceGetAttribute, name, self._device))
            for name in (
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
            )
        )
        self.capability = 10 * major + minor
        self._context = self._call(api.cuDevicePrimaryCtxRetain, self._device)
        self._streams: list[Any] = []
        try:
            with self._current():
                flags = int(api.CUstream_flags.CU_STREAM_NON_BLOCKING)
                for _ in range(2):
                    self._streams.append(self._call(api.cuStreamCreate, flags))
        except BackendError:
            for stream in self._streams:
                self._tried((api.cuStreamDestroy, stream))
            self._tried((api.cuDevicePrimaryCtxRelease, self._device))
            raise
        self._stream, self._capturing = self._streams

    def load(self, cubin: bytes) -> None:
        """Loads a cubin, whose kernels can then be launched.

        Raises:
            BackendError: The driver does not load it.
        """
        with self._current():
            self._modules.append(self._call(self._api.cuModuleLoadData, cubin))

    def allocate(self, size: int) -> int:
        """Allocates memory; see :class:`KernelDevice`."""
        with self._current():
            address = int(self._call(self._api.cuMemAlloc, max(size, 1)))
            self._memory.add(address)
            self._call(self._api.cuMemsetD8Async, address, 0, max(size, 1), self._stream)
        return address

    def free(self, address: int) -> None:
        """Frees memory; see :class:`KernelDevice`."""
        if self._closed:
            return
        with self._current():
            self._call(self._api.cuStreamSynchronize, self._stream)
            self._call(self._api.cuMemFree, address)
            self._memory.discard(address)

    def write(self, address: int, values: Array) -> None:
        """Copies an array to the GPU; see :class:`KernelDevice`."""
        values = np.ascontiguousarray(values)
        with self._current():  # from memory that is not pinned: the driver has read it when the call returns
            self._call(self._api.cuMemcpyHtoDAsync, address, values.ctypes.data, values.nbytes, self._stream)

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> Array:
        """Copies an array from the GPU; see :class:`KernelDevice`."""
        values: Array = np.empty(tuple(shape), dtype)
        with self._current():
            self._call(self._api.cuMemcpyDtoHAsync, values.ctypes.data, address, values.nbytes, self._stream)
            self._call(self._api.cuStreamSynchronize, self._stream)
        return values

    def fetch(self, address: int, shape: Sequence[int], dtype: Any) -> Callable[[], Array]:
        """Starts to copy an array from the GPU; see :class:`KernelDevice`."""
        values: Array = np.empty(tuple(shape), dtype)
        with self._current():
            place = self._take_pinned(values.nbytes)
            self._call(self._api.cuMemcpyDtoHAsync, place.address, address, values.nbytes, self._stream)
            self._call(self._api.cuEventRecord, place.event, self._stream)

        def wait() -> Array:
            with self._current():
                self._call(self._api.cuEventSynchronize, place.event)
                ctypes.memmove(values.ctypes.data, place.address, values.nbytes)
            self._idle.append(place)
            return values

        return wait

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies rows on the GPU; see :class:`KernelDevice`."""
        copy = self._api.CUDA_MEMCPY2D()
        copy.srcMemoryType = copy.dstMemoryType = self._api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        copy.srcDevice, copy.srcPitch = source, source_pitch
        copy.dstDevice, copy.dstPitch = target, target_pitch
        copy.WidthInBytes, copy.Height = width, rows
        with self._current():
            self._call(self._api.cuMemcpy2DAsync, copy, self._stream)

    def run(self, launch: Launch) -> None:
        """Launches a kernel; see :class:`KernelDevice`."""
        with self._current():
            self._launch(launch, self._stream)

    def capture(self, launches: Sequence[Launch]) -> int:
        """Captures launches in a second stream; see :class:`KernelDevice`.

        The other threads may go on launching kernels. If a launch fails, the capture ends, and the stream can be used
        again.
        """
        api = self._api
        with self._lock, self._current():
            mode = api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
            self._call(api.cuStreamBeginCapture, self._capturing, mode)
            try:
                for launch in launches:
                    self._launch(launch, self._capturing)
            except BaseException:
                status, graph = api.cuStreamEndCapture(self._capturing)
                if int(status) == 0:
                    api.cuGraphDestroy(graph)
                raise
            graph = self._call(api.cuStreamEndCapture, self._capturing)
            try:
                made = self._call(api.cuGraphInstantiate, graph, 0)
            except BackendError:
                self._tried((api.cuGraphDestroy, graph))
                raise
            self._call(api.cuGraphDestroy, graph)
            self._last_graph += 1
            self._graphs[self._last_graph] = made
            return self._last_graph

    def replay(self, graph: int) -> None:
        """Launches a graph; see :class:`KernelDevice`."""
        with self._current():
            self._call(self._api.cuGraphLaunch, self._graphs[graph], self._stream)

    def release(self, graph: int) -> None:
        """Frees a graph, after its launches are done; see :class:`KernelDevice`."""
        if self._closed:
            return
        with self._current():
            self._call(self._api.cuStreamSynchronize, self._stream)
            self._call(self._api.cuGraphExecDestroy, self._graphs.pop(graph))

    def close(self) -> None:
        """Frees everything; see :class:`KernelDevice`. The primary context stays for other libraries that use the GPU.

        If one call of the driver fails, the remaining calls are still made. For example, after an error of a kernel,
        every call in its context fails.

        Raises:
            BackendError: A call failed; the first error is raised after all calls.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            failed = [error for error in map(self._tried, self._releases()) if error is not None]
            for kept in (self._graphs, self._pinned, self._idle, self._memory, self._modules, self._functions):
                kept.clear()
        if failed:
            more = f" (and {len(failed) - 1} more of the calls that free the GPU's memory)" if failed[1:] else ""
            raise failed[0].with_problem(lambda problem: f"{problem}{more}")

    def _releases(self) -> list[tuple[Any, ...]]:
        """Returns the calls that free everything, in their order: function and arguments."""
        api = self._api
        return [
            (api.cuCtxSetCurrent, self._context),
            (api.cuStreamSynchronize, self._stream),
            *((api.cuGraphExecDestroy, graph) for graph in self._graphs.values()),
            *((api.cuEventDestroy, place.event) for place in self._pinned),
            *((api.cuMemFreeHost, place.address) for place in self._pinned),
            *((api.cuMemFree, address) for address in self._memory),
            *((api.cuModuleUnload, module) for module in self._modules),
            *((api.cuStreamDestroy, stream) for stream in self._streams),
            (api.cuDevicePrimaryCtxRelease, self._device),
        ]

    def _tried(self, call: tuple[Any, ...]) -> BackendError | None:
        """Calls a function of the driver that frees something; returns the error if it fails.

        An error while something is freed must not replace an earlier error, which says what is wrong.
        """
        try:
            self._call(*call)
        except BackendError as error:
            return error
        return None

    def _launch(self, launch: Launch, stream: Any) -> None:
        kernel = launch.kernel
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(launch.arguments))
        self._call(
            self._api.cuLaunchKernel, self._function(kernel.name), *launch.grid, THREADS, 1, 1, kernel.shared, stream,
            ctypes.addressof(parameters), 0,
        )  # fmt: skip

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            if not self._modules:
                raise BackendError(f"no cubin with the kernel {name} is loaded", REMAKE)
            self._functions[name] = self._call(self._api.cuModuleGetFunction, self._modules[-1], name.encode())
        return self._functions[name]

    def _take_pinned(self, size: int) -> _Pinned:
        """Returns pinned memory of this size that no copy uses."""
        with self._lock:
            for place in self._idle:
                if place.size == size:
                    self._idle.remove(place)
                    return place
            address = int(self._call(self._api.cuMemAllocHost, size))
            flags = self._api.CUevent_flags.CU_EVENT_DISABLE_TIMING
            try:
                event = self._call(self._api.cuEventCreate, int(flags))
            except BackendError:
                self._tried((self._api.cuMemFreeHost, address))
                raise
            place = _Pinned(address, size, event)
            self._pinned.append(place)
            return place

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Makes the GPU's context the current context of this thread. Raises BackendError after :meth:`close`."""
        if self._closed:
            raise closed_graph()
        self._call(self._api.cuCtxSetCurrent, self._context)
        yield

    def _call(self, function: Any, *arguments: Any) -> Any:
        """Calls a function of the driver and returns its result without the status.

        Raises:
            BackendError: The status is an error.
        """
        status, *results = function(*arguments)
        if int(status):
            text = self._api.cuGetErrorString(status)[1]
            text = text.decode() if isinstance(text, bytes) else str(text)
            name = getattr(function, "__name__", "CUDA")
            fix = RUN_FIX if int(status) == OUT_OF_MEMORY else FIXES.get(name, "see `blip2edge doctor`")
            raise BackendError(f"{name} failed: {text}", fix)
        return results[0] if results else None


REMAKE = (
    f"make the copy again, with nvidia-cuda-nvrtc of the CUDA version that nvidia-smi shows or older: "
    f"blip2edge optimize BUNDLE {option('backend')} cuda-decoder"
)
FIXES = {"cuModuleLoadData": REMAKE, "cuModuleGetFunction": REMAKE}
"""For some functions of the driver: what the user can do if the function fails."""
