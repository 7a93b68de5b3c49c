"""A simulation of ``cuda.bindings.driver``: memory on the host, kernels in the shim, and a log of the calls.

It refuses what the driver refuses: calls without the context, unknown handles, copies outside of allocations, launches
that a capture forbids.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np

from blip2edge.runtime.cuda.kernel import Kernel, Launch
from tests.runtime.cuda.shimmed import Shim

CUBIN = b"\x7fELF and the kernels"
SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, INVALID_IMAGE, INVALID_CONTEXT, NOT_FOUND = 0, 1, 2, 200, 201, 500
MESSAGES = {INVALID_VALUE: b"invalid argument", OUT_OF_MEMORY: b"out of memory", NOT_FOUND: b"named symbol not found"}
Result = tuple[Any, ...]


class CUdevice_attribute(IntEnum):  # noqa: N801 - the names of cuda-bindings
    CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT = 16
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
    CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76


class FakeDriver:
    """The module ``cuda.bindings.driver`` with one GPU.

    Args:
        kernels: The kernels that every cubin contains.
        capability: Compute capability of the GPU.
        fails: Called with a function's name; returns the status that the call fails with, 0 to go on.
    """

    CUdevice_attribute = CUdevice_attribute
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)
    CUevent_flags = SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)

    def __init__(
        self,
        kernels: list[Kernel],
        capability: tuple[int, int] = (8, 7),
        multiprocessors: int = 4,
        fails: Callable[[str], int] = lambda name: 0,
    ) -> None:
        self.lock = threading.RLock()  # the shim runs one kernel at a time
        self.calls: list[str] = []
        self.fails = fails
        self._given = kernels
        self._kernels: dict[str, Kernel] = {}
        self._shim: Shim | None = None
        self._attributes = {16: multiprocessors, 75: capability[0], 76: capability[1]}
        self._next = 100
        self._thread = threading.local()
        self.retained = 0
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.pinned: dict[int, np.ndarray[Any, Any]] = {}
        self.live: dict[int, str] = {}  # handles of streams, events, modules, graphs
        self._recorded: dict[int, list[Launch]] = {}
        self._capturing: dict[int, list[Launch]] = {}

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cu") or name == "cuGetErrorString":
            return found

        def call(*arguments: Any) -> Result:
            with self.lock:
                return checked(*arguments)

        def checked(*arguments: Any) -> Result:
            self.calls.append(name)
            status = self.fails(name)
            if not status and name not in WITHOUT_CONTEXT and not getattr(self._thread, "current", False):
                status = INVALID_CONTEXT
            if not status and self._capturing and name in WAITING:
                status = 900  # CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            return (status,) if status else found(*arguments)

        call.__name__ = name
        return call

    def _made(self, kind: str) -> Result:
        self._next += 1
        self.live[self._next] = kind
        return SUCCESS, self._next

    def _gone(self, handle: int, kind: str) -> Result:
        return (SUCCESS,) if self.live.pop(handle, "") == kind else (INVALID_VALUE,)

    def _within(self, address: int, size: int, where: dict[int, np.ndarray[Any, Any]]) -> bool:
        return any(start <= address and address + size <= start + raw.nbytes for start, raw in where.items())

    def cuInit(self, flags: int) -> Result:  # noqa: N802
        return (SUCCESS,)

    def cuGetErrorString(self, error: int) -> Result:  # noqa: N802
        return SUCCESS, MESSAGES.get(error, b"unknown error")

    def cuDeviceGet(self, ordinal: int) -> Result:  # noqa: N802
        return (SUCCESS, 0) if ordinal == 0 else (INVALID_VALUE,)

    def cuDeviceGetAttribute(self, attrib: int, dev: int) -> Result:  # noqa: N802
        return SUCCESS, self._attributes[int(attrib)]

    def cuDevicePrimaryCtxRetain(self, dev: int) -> Result:  # noqa: N802
        self.retained += 1
        return SUCCESS, 7

    def cuDevicePrimaryCtxRelease(self, dev: int) -> Result:  # noqa: N802
        self.retained -= 1
        return (SUCCESS,)

    def cuCtxSetCurrent(self, ctx: int) -> Result:  # noqa: N802
        self._thread.current = ctx == 7 and self.retained > 0
        return (SUCCESS,)

    def cuModuleLoadData(self, image: bytes) -> Result:  # noqa: N802
        if not image.startswith(b"\x7fELF"):
            return (INVALID_IMAGE,)
        if self._shim is None:
            self._kernels = {kernel.name: kernel for kernel in self._given}
            self._shim = Shim(self._kernels.values())
        return self._made("module")

    def cuModuleUnload(self, hmod: int) -> Result:  # noqa: N802
        return self._gone(hmod, "module")

    def cuModuleGetFunction(self, hmod: int, name: bytes) -> Result:  # noqa: N802
        known = self.live.get(hmod) == "module" and name.decode() in self._kernels
        return (SUCCESS, 1 + list(self._kernels).index(name.decode())) if known else (NOT_FOUND,)

    def cuLaunchKernel(  # noqa: N802
        self, f: int, x: int, y: int, z: int, threads: int, by: int, bz: int, shared: int, stream: int,
        kernel_params: int, extra: int,
    ) -> Result:  # fmt: skip
        kernel = list(self._kernels.values())[f - 1]
        if (
            (by, bz, shared, extra) != (1, 1, kernel.shared, 0)
            or max(y, z) > 65535
            or self.live.get(stream) != "stream"
        ):
            return (INVALID_VALUE,)
        place = ctypes.c_void_p.from_address(kernel_params).value
        arguments = kernel.arguments.from_buffer_copy(ctypes.string_at(place or 0, ctypes.sizeof(kernel.arguments)))
        launch = Launch(kernel, (x, y, z), arguments)
        if stream in self._capturing:
            self._capturing[stream].append(launch)
        elif self._shim is not None:
            self._shim.run(launch)
        return (SUCCESS,)

    def cuMemAlloc(self, bytesize: int) -> Result:  # noqa: N802
        raw = np.full(bytesize + 256, 0xFF, np.uint8)
        address = raw.ctypes.data + -raw.ctypes.data % 256
        self.memory[address] = raw[address - raw.ctypes.data :][:bytesize]
        return SUCCESS, address

    def cuMemFree(self, dptr: int) -> Result:  # noqa: N802
        return (SUCCESS,) if self.memory.pop(dptr, None) is not None else (INVALID_VALUE,)

    def cuMemAllocHost(self, bytesize: int) -> Result:  # noqa: N802
        raw = np.zeros(bytesize, np.uint8)
        self.pinned[raw.ctypes.data] = raw
        return SUCCESS, raw.ctypes.data

    def cuMemFreeHost(self, p: int) -> Result:  # noqa: N802
        return (SUCCESS,) if self.pinned.pop(p, None) is not None else (INVALID_VALUE,)

    def cuMemsetD8Async(self, dst: int, uc: int, n: int, stream: int) -> Result:  # noqa: N802
        ctypes.memset(dst, uc, n)
        return (SUCCESS,)

    def cuMemcpyHtoDAsync(self, dst: int, src: int, count: int, stream: int) -> Result:  # noqa: N802
        if not self._within(dst, count, self.memory):
            return (INVALID_VALUE,)
        ctypes.memmove(dst, src, count)
        return (SUCCESS,)

    def cuMemcpyDtoHAsync(self, dst: int, src: int, count: int, stream: int) -> Result:  # noqa: N802
        if not self._within(src, count, self.memory):
            return (INVALID_VALUE,)
        ctypes.memmove(dst, src, count)
        return (SUCCESS,)

    def CUDA_MEMCPY2D(self) -> Any:  # noqa: N802
        return SimpleNamespace()

    def cuMemcpy2DAsync(self, copy: Any, stream: int) -> Result:  # noqa: N802
        if (int(copy.srcMemoryType), int(copy.dstMemoryType)) != (2, 2):
            return (INVALID_VALUE,)
        places = ((int(copy.srcDevice), copy.srcPitch), (int(copy.dstDevice), copy.dstPitch))
        for start, pitch in places:
            size = pitch * (copy.Height - 1) + copy.WidthInBytes
            if copy.WidthInBytes > pitch or not self._within(start, size, self.memory):
                return (INVALID_VALUE,)
        (source, source_pitch), (target, target_pitch) = places
        for row in range(copy.Height):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, copy.WidthInBytes)
        return (SUCCESS,)

    def cuStreamCreate(self, flags: int) -> Result:  # noqa: N802
        return self._made("stream") if flags == 1 else (INVALID_VALUE,)

    def cuStreamDestroy(self, stream: int) -> Result:  # noqa: N802
        return self._gone(stream, "stream")

    def cuStreamSynchronize(self, stream: int) -> Result:  # noqa: N802
        return (SUCCESS,) if self.live.get(stream) == "stream" else (INVALID_VALUE,)

    def cuStreamBeginCapture(self, stream: int, mode: int) -> Result:  # noqa: N802
        if stream in self._capturing or mode != 1:
            return (INVALID_VALUE,)
        self._capturing[stream] = []
        return (SUCCESS,)

    def cuStreamEndCapture(self, stream: int) -> Result:  # noqa: N802
        made = self._made("graph")
        self._recorded[made[1]] = self._capturing.pop(stream)
        return made

    def cuGraphInstantiate(self, graph: int, flags: int) -> Result:  # noqa: N802
        if self.live.get(graph) != "graph" or flags:
            return (INVALID_VALUE,)
        made = self._made("executable")
        self._recorded[made[1]] = self._recorded[graph]
        return made

    def cuGraphDestroy(self, graph: int) -> Result:  # noqa: N802
        return self._gone(graph, "graph")

    def cuGraphExecDestroy(self, graph: int) -> Result:  # noqa: N802
        return self._gone(graph, "executable")

    def cuGraphLaunch(self, graph: int, stream: int) -> Result:  # noqa: N802
        if self.live.get(graph) != "executable" or self._shim is None:
            return (INVALID_VALUE,)
        for launch in self._recorded[graph]:
            self._shim.run(launch)
        return (SUCCESS,)

    def cuEventCreate(self, flags: int) -> Result:  # noqa: N802
        return self._made("event") if flags == 2 else (INVALID_VALUE,)

    def cuEventDestroy(self, event: int) -> Result:  # noqa: N802
        return self._gone(event, "event")

    def cuEventRecord(self, event: int, stream: int) -> Result:  # noqa: N802
        return (SUCCESS,) if self.live.get(event) == "event" else (INVALID_VALUE,)

    def cuEventSynchronize(self, event: int) -> Result:  # noqa: N802
        return (SUCCESS,) if self.live.get(event) == "event" else (INVALID_VALUE,)


WITHOUT_CONTEXT = (
    "cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease",
    "cuCtxSetCurrent",
)  # fmt: skip
WAITING = ("cuStreamSynchronize", "cuEventSynchronize", "cuMemAlloc", "cuMemFree")
"""Functions that a thread may not call while it captures."""
