"""Runs a decoder's kernels; implements the interface of an in-place KV cache (``runtime/decoding/kv/in_place.py``).

So prompts of different lengths, batches, beam search, speculative decoding and continuous batching use the code of the
other in-place decoders.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.errors import BackendError
from blip2edge.runtime.backends.base import closed_graph
from blip2edge.runtime.cuda.decoding.origins import Origins
from blip2edge.runtime.cuda.device.interface import KernelDevice, Run
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.plan import HALF, CacheAddresses, RunBuffers, RunSizes, new_buffers, plan_run
from blip2edge.runtime.cuda.products import MOST_ROWS
from blip2edge.runtime.cuda.steps import CHANNELS, MoveArguments, move_kernel
from blip2edge.runtime.cuda.weights import DecoderWeights
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, TOTAL

KEPT_SIZES = 4
"""Largest number of run sizes whose buffers stay allocated for later runs."""

SHARED_STEPS = 32
"""Buffers of runs with more than :data:`MOST_ROWS` new tokens are made for a multiple of this number of tokens, so that
prompts of similar lengths share them."""

KEPT_RUNS = 16
"""Largest number of runs whose launches and CUDA graphs are stored for later runs."""

POOLED = 4
"""Number of unused KV caches that stay allocated; a CUDA graph is valid only for the KV cache of its capture."""


@dataclass(frozen=True)
class CacheBlock:
    """One allocation with the keys of all layers, then the values of all layers, fp16 ``[2 * layers, B, G, C, d]``.

    Attributes:
        address: The allocation's address.
        shape: ``(B, G, C, d)``: rows, heads, slots, and width of a head.
    """

    address: int
    shape: tuple[int, int, int, int]

    @property
    def row_bytes(self) -> int:
        """Returns the bytes of one row's keys in one layer."""
        return HALF * self.shape[1] * self.shape[2] * self.shape[3]

    @property
    def layer_bytes(self) -> int:
        """Returns the bytes of all rows' keys in one layer."""
        return self.shape[0] * self.row_bytes


class KernelSession:
    """A decoder on the GPU; see :class:`blip2edge.runtime.backends.base.InPlaceSession`.

    Args:
        weights: The decoder's weights.
        device: The GPU that the weights are on; closed with the session.

    Attributes:
        moves: How often a cache was copied because its rows were reordered.
    """

    input_names: tuple[str, ...] = ("inputs_embeds", "logits_indices", LENGTHS, TOTAL)

    def __init__(self, weights: DecoderWeights, device: KernelDevice) -> None:
        self.weights, self.device = weights, device
        self.lock = threading.Lock()  # of the buffers of runs
        self._buffers: dict[RunSizes, RunBuffers] = {}
        self._runs: dict[tuple[RunSizes, CacheAddresses], Run] = {}
        self._free: deque[CacheBlock] = deque()
        self.moves = 0
        self._origins = (0, 0)  # address and bytes of the table of the last move
        self._closed = False

    def in_place(self, pairs: Mapping[str, str]) -> KernelBuffers:  # noqa: ARG002 - the names of graphs
        """Makes empty buffers of keys and values; see :class:`InPlaceSession`."""
        return KernelBuffers(self)

    def run(self, sizes: RunSizes, cache: CacheAddresses) -> tuple[RunBuffers, Run]:
        """Returns the buffers and the launches of a run; both are kept for the next run of the same sizes.

        The caller must hold :attr:`lock` while it uses the buffers.

        Raises:
            BackendError: The session is closed.
        """
        if self._closed:
            raise closed_graph()
        room = self._room(sizes)
        buffers, key = self._sized(room), (sizes, cache)
        run = self._runs.pop(key, None)
        if run is None:
            while len(self._runs) >= KEPT_RUNS:
                self._runs.pop(next(iter(self._runs))).close()
            given = self.weights, sizes, buffers, cache, self.device.multiprocessors
            launches = plan_run(*given)
            if not buffers.holds(launches):
                self._forget(room)
                buffers.enlarge(self.device, launches)
                launches = plan_run(*given)
            run = Run(self.device, launches)
        self._runs[key] = run  # the newest is the last
        return buffers, run

    def take(self, shape: tuple[int, int, int, int]) -> CacheBlock:
        """Returns a free KV cache of this shape, or a new one.

        Raises:
            BackendError: The session is closed, or memory ran out.
        """
        if self._closed:
            raise closed_graph()
        with self.lock:
            for block in tuple(self._free):
                if block.shape == shape:
                    self._free.remove(block)
                    return block
            while len(self._free) > POOLED:
                self.device.free(self._free.popleft().address)
        size = 2 * len(self.weights.layers) * CacheBlock(0, shape).layer_bytes
        try:
            return CacheBlock(self.device.allocate(size), shape)
        except BackendError:
            if not self._free:
                raise
            with self.lock:  # memory is short: the free caches of other sizes go
                while self._free:
                    self.device.free(self._free.popleft().address)
            return CacheBlock(self.device.allocate(size), shape)

    def move(self, source: CacheBlock, target: CacheBlock, origins: NDArray[np.int32]) -> None:
        """Copies the slots of a KV cache to their own rows of another KV cache of the same shape.

        The caller must hold :attr:`lock`, because all calls copy ``origins`` to the same GPU memory.

        Args:
            source: The cache that is read.
            target: The cache that is written.
            origins: For each slot and row of ``target``, the row of ``source`` that has the slot, ``[slots, B]``.
        """
        if origins.nbytes > self._origins[1]:
            old, self._origins = self._origins[0], (0, 0)  # forgotten first: memory may run out
            if old:
                self.device.free(old)
            self._origins = self.device.allocate(origins.nbytes), origins.nbytes
        self.moves += 1
        self.device.write(self._origins[0], origins)
        rows, heads, capacity, width = source.shape
        words = width // CHANNELS  # 16 bytes
        arguments = MoveArguments(
            source.address, target.address, self._origins[0], rows, heads, capacity * words, words, len(origins)
        )
        grid = (rows * heads, 2 * len(self.weights.layers), 1)
        self.device.run(Launch(move_kernel(), grid, arguments))

    def give(self, block: CacheBlock) -> None:
        """Stores a KV cache that no state uses any more. Acquires no lock, because finalizers call this method."""
        self._free.append(block)

    def close(self) -> None:
        """Frees the decoder's memory on the GPU. A second call does nothing."""
        self._closed = True
        with self.lock:
            self._runs.clear()
            self._buffers.clear()
            self._free.clear()
            self.device.close()

    def _room(self, sizes: RunSizes) -> RunSizes:
        """Returns the sizes of a run's buffers; runs with similar prompt lengths and any cache size share buffers."""
        steps = sizes.steps if sizes.steps <= MOST_ROWS else -(-sizes.steps // SHARED_STEPS) * SHARED_STEPS
        return replace(sizes, steps=steps, capacity=max(sizes.capacity, self.weights.layout.max_positions))

    def _forget(self, room: RunSizes) -> None:
        """Frees the CUDA graphs of the runs that use the buffers of these sizes."""
        for key in [key for key in self._runs if self._room(key[0]) == room]:
            self._runs.pop(key).close()

    def _sized(self, sizes: RunSizes) -> RunBuffers:
        """Returns the buffers of these sizes; if it must make new buffers, first frees the oldest buffers."""
        found = self._buffers.pop(sizes, None)
        if found is None:
            while len(self._buffers) >= KEPT_SIZES:
                old = next(iter(self._buffers))
                self._forget(old)
                for address in self._buffers.pop(old).addresses:
                    self.device.free(address)
            found = new_buffers(self.device, self.weights, sizes)
        self._buffers[sizes] = found
        return found


class KernelBuffers:
    """Keys and values of a batch on the GPU; see :class:`blip2edge.runtime.backends.base.CacheBuffers`.

    Args:
        session: The session that runs the decoder.
    """

    captures = False

    def __init__(self, session: KernelSession) -> None:
        self._session, self._device = session, session.device
        self._block = CacheBlock(0, (0, 0, 0, 0))
        self._back: Callable[[], object] = weakref.finalize(self, int)  # gives the memory back; nothing yet
        self._origins = Origins()

    @property
    def size(self) -> tuple[int, int]:
        """Returns the numbers of rows and slots; see :class:`CacheBuffers`."""
        return self._block.shape[0], self._block.shape[2]

    def resize(self, shape: Sequence[int], used: int) -> None:
        """Replaces the buffers by larger ones; see :class:`CacheBuffers`."""
        old, giving = self._block, self._back
        self._adopt(self._session.take((shape[0], shape[1], shape[2], shape[3])))
        self._copy(old, 0, 0, old.shape[0], used)
        giving()

    def select(self, rows: NDArray[np.int64], used: int) -> None:
        """Makes row i a copy of old row ``rows[i]``; all rows have ``used`` tokens; see :class:`CacheBuffers`."""
        self.reorder(rows, np.full(self.size[0], used))

    def reorder(self, rows: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``.

        Keys and values stay where they are, unless a row would write to a slot that another row reads.

        Args:
            rows: ``[B']``.
            lengths: Number of tokens of each old row, ``[B]``.
        """
        if not np.array_equal(rows, np.arange(len(rows))) and not self._origins.select(rows, lengths):
            self.settle(lengths[rows])

    def shorten(self, lengths: NDArray[np.int64]) -> None:
        """Takes over that the rows now have only ``lengths`` tokens, ``[B]``; see :meth:`reorder`."""
        if not self._origins.shorten(lengths):
            self.settle(lengths)

    def settle(self, lengths: NDArray[np.int64]) -> None:
        """Copies the slots of reordered rows to their own rows, if there are any; rows have ``lengths`` tokens."""
        if self._origins.plain:
            return
        old, giving, session = self._block, self._back, self._session
        moved = session.take(old.shape)
        try:
            with session.lock:
                session.move(old, moved, self._origins.table(int(lengths.max(initial=0)), old.shape[0]))
        except BackendError:  # the rows are still in the old cache
            session.give(moved)
            raise
        self._adopt(moved)
        self._origins.reset()
        giving()

    def append(self, other: KernelBuffers, first: int, count: int, used: int) -> None:
        """Copies rows of another state's buffers into these buffers; see :class:`CacheBuffers`."""
        self._copy(other._block, 0, first, count, used)

    def run(self, inputs: Mapping[str, Array], first: int, output: str, shape: Sequence[int]) -> Array:  # noqa: ARG002
        """Runs the decoder once and returns the logits, float32 ``[B, K, V]``; see :class:`CacheBuffers`."""
        embeds, indices = inputs["inputs_embeds"], inputs["logits_indices"]
        rows, steps, _ = embeds.shape
        after = inputs[LENGTHS].astype(np.int32) + 1
        is_prefill = int(inputs[TOTAL]) == steps  # else all rows have S valid new tokens
        fresh = after if is_prefill else np.full(rows, steps, np.int32)
        sizes = RunSizes(rows, steps, indices.shape[1], self._block.shape[2])
        session, device = self._session, self._device
        with session.lock:
            buffers, run = session.run(sizes, self.addresses(first))
            device.write(buffers.embeddings, np.ascontiguousarray(embeds, np.float32))
            device.write(buffers.before, after - fresh)
            if not self._origins.plain:
                table = self._origins.table(int((after - fresh).max()), self.size[0])
                device.write(buffers.origins, table[:, first : first + rows] - np.int32(first))
            device.write(buffers.fresh, fresh)
            device.write(buffers.chosen, (indices + np.arange(rows)[:, None] * steps).astype(np.int32))
            run.start()
            return device.read(buffers.logits, (rows, indices.shape[1], session.weights.layout.vocabulary), np.float32)

    def addresses(self, first: int) -> CacheAddresses:
        """Returns the addresses of each layer's keys and values, from row ``first`` on."""
        block, layers = self._block, len(self._session.weights.layers)
        start = block.address + first * block.row_bytes
        places = tuple(start + index * block.layer_bytes for index in range(2 * layers))
        return CacheAddresses(places[:layers], places[layers:], not self._origins.plain)

    def _adopt(self, block: CacheBlock) -> None:
        """Replaces the KV cache by another KV cache; the caller must give the old KV cache back."""
        self._block = block
        self._back = weakref.finalize(self, self._session.give, block)

    def _copy(self, source: CacheBlock, origin: int, first: int, count: int, used: int) -> None:
        """Copies the first ``used`` slots of ``count`` rows: row ``origin + i`` of ``source`` to row ``first + i``."""
        block = self._block
        slot, heads = HALF * block.shape[3], count * block.shape[1]
        if not heads or not used:
            return
        target, start = block.address + first * block.row_bytes, source.address + origin * source.row_bytes
        for index in range(2 * len(self._session.weights.layers)):
            self._device.copy_rows(
                target + index * block.layer_bytes, slot * block.shape[2],
                start + index * source.layer_bytes, slot * source.shape[2], slot * used, heads,
            )  # fmt: skip
