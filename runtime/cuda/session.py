"""Runs a decoder's kernels behind the interface of an in-place KV cache (``runtime/decoding/kv/in_place.py``).

So prompts of different lengths, batches, beam search, speculative decoding and continuous batching use the code of the
other in-place decoders.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.runtime.cuda.plan import HALF, CacheAddresses, RunBuffers, RunSizes, new_buffers, plan_run
from blip2edge.runtime.cuda.weights import DecoderWeights, KernelDevice
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, TOTAL

KEPT_SIZES = 4
"""Number of run sizes whose buffers are kept."""


class KernelSession:
    """A decoder on the GPU; see :class:`blip2edge.runtime.backends.base.InPlaceSession`.

    Args:
        weights: The decoder's weights.
        device: The GPU that the weights are on.
    """

    input_names: tuple[str, ...] = ("inputs_embeds", "logits_indices", LENGTHS, TOTAL)

    def __init__(self, weights: DecoderWeights, device: KernelDevice) -> None:
        self.weights, self.device = weights, device
        self.lock = threading.Lock()  # of the buffers of runs
        self._buffers: dict[RunSizes, RunBuffers] = {}

    def in_place(self, pairs: Mapping[str, str]) -> KernelBuffers:  # noqa: ARG002 - the names of graphs
        """Makes empty buffers of keys and values; see :class:`InPlaceSession`."""
        return KernelBuffers(self)

    def buffers(self, sizes: RunSizes) -> RunBuffers:
        """Returns the buffers for runs of these sizes."""
        if sizes not in self._buffers:
            while len(self._buffers) >= KEPT_SIZES:
                for address in self._buffers.pop(next(iter(self._buffers))).addresses:
                    self.device.free(address)
            self._buffers[sizes] = new_buffers(self.device, self.weights, sizes)
        return self._buffers[sizes]


class KernelBuffers:
    """Keys and values of a batch on the GPU; see :class:`blip2edge.runtime.backends.base.CacheBuffers`.

    Args:
        session: The decoder.
    """

    captures = False

    def __init__(self, session: KernelSession) -> None:
        self._session, self._device = session, session.device
        self._layout = session.weights.layout
        self._addresses: list[int] = []
        self._shape = (0, 0, 0, 0)
        self._free = weakref.finalize(self, _free_all, self._device, self._addresses)

    @property
    def size(self) -> tuple[int, int]:
        """Returns the numbers of rows and slots; see :class:`CacheBuffers`."""
        return self._shape[0], self._shape[2]

    def resize(self, shape: Sequence[int], used: int) -> None:
        """Replaces the buffers by larger ones; see :class:`CacheBuffers`."""
        old, had = list(self._addresses), self._shape
        self._shape = (shape[0], shape[1], shape[2], shape[3])
        self._addresses[:] = [self._new() for _ in range(2 * len(self._layout.layers))]
        for source, target in zip(old, self._addresses, strict=False):
            self._copy(source, had, 0, target, 0, had[0], used)
            self._device.free(source)

    def select(self, rows: NDArray[np.int64], used: int) -> None:
        """Copies rows to their new places; see :class:`CacheBuffers`."""
        if np.array_equal(rows, np.arange(len(rows))):
            return
        for index, source in enumerate(self._addresses):
            target = self._new()
            for row in range(self._shape[0]):
                origin = int(rows[row]) if row < len(rows) else row
                self._copy(source, self._shape, origin, target, row, 1, used)
            self._addresses[index] = target
            self._device.free(source)

    def append(self, other: KernelBuffers, first: int, count: int, used: int) -> None:
        """Copies rows of another state's buffers into these buffers; see :class:`CacheBuffers`."""
        for source, target in zip(other._addresses, self._addresses, strict=True):
            self._copy(source, other._shape, 0, target, first, count, used)

    def run(self, inputs: Mapping[str, Array], first: int, output: str, shape: Sequence[int]) -> Array:  # noqa: ARG002
        """Runs the decoder once and returns the logits, float32 ``[B, K, V]``; see :class:`CacheBuffers`."""
        embeds, indices = inputs["inputs_embeds"], inputs["logits_indices"]
        rows, steps, _ = embeds.shape
        after = inputs[LENGTHS].astype(np.int32) + 1
        is_prefill = int(inputs[TOTAL]) == steps  # else all rows have S valid new tokens
        fresh = after if is_prefill else np.full(rows, steps, np.int32)
        sizes = RunSizes(rows, steps, indices.shape[1], self._shape[2])
        session, device = self._session, self._device
        with session.lock:
            buffers = session.buffers(sizes)
            device.write(buffers.embeddings, np.ascontiguousarray(embeds, np.float32))
            device.write(buffers.before, after - fresh)
            device.write(buffers.fresh, fresh)
            device.write(buffers.chosen, (indices + np.arange(rows)[:, None] * steps).astype(np.int32))
            for launch in plan_run(session.weights, sizes, buffers, self.addresses(first), device.multiprocessors):
                device.run(launch)
            return device.read(buffers.logits, (rows, indices.shape[1], self._layout.vocabulary), np.float32)

    def addresses(self, first: int) -> CacheAddresses:
        """Returns the addresses of each layer's keys and values, from row ``first`` on."""
        start = first * self._row_bytes(self._shape)
        places = [address + start for address in self._addresses]
        return CacheAddresses(places[0::2], places[1::2])

    def _new(self) -> int:
        return self._device.allocate(self._shape[0] * self._row_bytes(self._shape))

    @staticmethod
    def _row_bytes(shape: tuple[int, int, int, int]) -> int:
        return HALF * shape[1] * shape[2] * shape[3]

    def _copy(
        self, source: int, had: tuple[int, int, int, int], origin: int, target: int, first: int, count: int, used: int
    ) -> None:
        """Copies the first ``used`` slots of ``count`` rows from row ``origin`` on to the rows from ``first`` on."""
        slot = HALF * self._shape[3]
        source, target = source + origin * self._row_bytes(had), target + first * self._row_bytes(self._shape)
        heads = count * self._shape[1]
        if heads and used:
            self._device.copy_rows(target, slot * self._shape[2], source, slot * had[2], slot * used, heads)


def _free_all(device: KernelDevice, addresses: list[int]) -> None:
    for address in addresses:
        device.free(address)
