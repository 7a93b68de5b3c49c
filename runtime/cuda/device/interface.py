"""The interface between a decoder and the GPU: memory, copies, kernel launches and CUDA graphs.

``driver.py`` implements it with the CUDA driver. The tests implement it on the CPU, so that the code of the decoder is
the same with and without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.cuda.kernel import Launch


class KernelDevice(Protocol):
    """Memory, copies and kernel launches on one GPU, in one stream: they run in the order of the calls.

    Several threads may call the methods at once.

    Attributes:
        multiprocessors: Number of the GPU's multiprocessors.
    """

    multiprocessors: int

    def allocate(self, size: int) -> int:
        """Allocates ``size`` bytes, filled with zeros; returns the address, a multiple of 256."""

    def free(self, address: int) -> None:
        """Frees memory of :meth:`allocate`, after the launches so far are done; does nothing after :meth:`close`."""

    def write(self, address: int, values: Array) -> None:
        """Copies an array to the GPU; the array may change afterwards."""

    def read(self, address: int, shape: Sequence[int], dtype: Any) -> Array:
        """Waits for the launches so far, and copies an array from the GPU."""

    def fetch(self, address: int, shape: Sequence[int], dtype: Any) -> Callable[[], Array]:
        """Starts to copy an array from the GPU, after the launches so far.

        Returns:
            A function that waits for this copy, not for later launches, and returns the array. Call it once.
        """

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """Copies ``rows`` rows of ``width`` bytes on the GPU; a pitch is the distance of two rows in bytes."""

    def run(self, launch: Launch) -> None:
        """Launches a kernel."""

    def capture(self, launches: Sequence[Launch]) -> int:
        """Captures launches as a CUDA graph, without running them; returns the graph's number."""

    def replay(self, graph: int) -> None:
        """Launches all kernels of a captured graph, with the parameters of the capture."""

    def release(self, graph: int) -> None:
        """Frees a captured graph; does nothing after :meth:`close`."""

    def close(self) -> None:
        """Frees all memory and graphs. A second call does nothing."""


@contextmanager
def freed_on_error(device: KernelDevice, addresses: list[int]) -> Iterator[None]:
    """Frees the memory in a list, and empties the list, if the block raises an error, for example for want of memory.

    Args:
        device: The GPU.
        addresses: Addresses of memory; also those that the block adds are freed.
    """
    try:
        yield
    except BaseException:
        while addresses:
            device.free(addresses.pop())
        raise


class Run:
    """The launches of one run of a decoder, with fixed addresses; from the second run on, they are one CUDA graph.

    Args:
        device: The GPU.
        launches: The launches, in their order.
    """

    def __init__(self, device: KernelDevice, launches: Sequence[Launch]) -> None:
        self._device, self.launches = device, tuple(launches)
        self._started = False
        self._graph: int | None = None

    def start(self) -> None:
        """Launches the kernels; from the second call on, as one CUDA graph."""
        if self._graph is None and self._started:
            self._graph = self._device.capture(self.launches)
        if self._graph is not None:
            self._device.replay(self._graph)
            return
        for launch in self.launches:
            self._device.run(launch)
        self._started = True

    def close(self) -> None:
        """Frees the CUDA graph."""
        if self._graph is not None:
            self._device.release(self._graph)
            self._graph = None
