"""A device whose kernels run on the CPU through the shim: each is compiled when it is first launched."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from blip2edge.runtime.cuda.kernel import Kernel, Launch
from tests.runtime.cuda.shimmed import FORWARD, FaultError, Shim

ALIGNMENT, GUARD = 256, 256


class ShimDevice:
    """Implements :class:`blip2edge.runtime.cuda.device.interface.KernelDevice`; a CUDA graph is a list of launches.

    Args:
        multiprocessors: Number of multiprocessors that launches are planned for.
        order: Order of the threads.
    """

    def __init__(self, multiprocessors: int = 4, order: int = FORWARD) -> None:
        self.multiprocessors, self.order = multiprocessors, order
        self.launches = 0
        self.memory: dict[int, tuple[np.ndarray[Any, Any], int]] = {}
        self._shims: dict[str, Shim] = {}
        self._graphs: dict[int, list[Launch]] = {}
        self.captured = self.replayed = self.fetched = 0

    def allocate(self, size: int) -> int:
        raw = np.full(size + ALIGNMENT + 2 * GUARD, 0xFF, np.uint8)
        start = raw.ctypes.data + GUARD
        address = start + -start % ALIGNMENT
        raw[address - raw.ctypes.data :][:size] = 0
        self.memory[address] = raw, size
        return address

    def free(self, address: int) -> None:
        raw, size = self.memory.pop(address, (np.empty(0, np.uint8), 0))
        first = address - raw.ctypes.data
        if (raw[:first] != 0xFF).any() or (raw[first + size :] != 0xFF).any():
            raise FaultError("a kernel wrote outside of its memory")

    def write(self, address: int, values: np.ndarray[Any, Any]) -> None:
        values = np.ascontiguousarray(values)
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> np.ndarray[Any, Any]:
        values = np.empty(tuple(shape), dtype)
        ctypes.memmove(values.ctypes.data, address, values.nbytes)
        return values

    def fetch(self, address: int, shape: Sequence[int], dtype: Any) -> Callable[[], np.ndarray[Any, Any]]:
        values = self.read(address, shape, dtype)
        self.fetched += 1

        def wait() -> np.ndarray[Any, Any]:
            self.fetched -= 1
            return values

        return wait

    def capture(self, launches: Sequence[Launch]) -> int:
        """The parameters are copied: a replay does not see what is written into them later."""
        self.captured += 1
        self._graphs[self.captured] = [replace(one, arguments=copied(one.arguments)) for one in launches]
        return self.captured

    def replay(self, graph: int) -> None:
        self.replayed += 1
        for launch in self._graphs[graph]:
            self.run(launch)

    def release(self, graph: int) -> None:
        self._graphs.pop(graph, None)

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        for row in range(rows):
            ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)

    def compile(self, kernels: Iterable[Kernel]) -> None:
        """Compiles several kernels at once, which takes less time than one by one."""
        names = {kernel.name: kernel for kernel in kernels}
        self._shims.update(dict.fromkeys(names, Shim(names.values())))

    def run(self, launch: Launch) -> None:
        name = launch.kernel.name
        if name not in self._shims:
            self._shims[name] = Shim([launch.kernel])
        self._shims[name].run(launch, self.order)
        self.launches += 1

    def close(self) -> None:
        """Frees everything, and checks the guards."""
        self._graphs.clear()
        for address in list(self.memory):
            self.free(address)


def copied(arguments: ctypes.Structure) -> ctypes.Structure:
    """A structure with the same bytes."""
    return type(arguments).from_buffer_copy(arguments)
