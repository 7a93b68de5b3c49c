"""A KV cache that the graph writes in place, for the decoders of optimized copies.

Each layer has one buffer for keys and one for values, in which each text begins in slot 0 of its row. A step copies no
keys and values, removing tokens only changes a length, and reordering beams copies only the used slots.
``optimization/passes/shared_cache.py`` describes the graph's inputs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.backends.base import NO_GRAPH, BindingSession, CacheBuffers, InPlaceSession
from blip2edge.runtime.backends.probe import gather_model, pad_model
from blip2edge.runtime.decoding.state import Decoder, tokens_to_drop

LENGTHS = "seqlens_k"
TOTAL = "total_sequence_length"
POSITIONS = "position_ids"
ROOM = 64
"""Number of free slots that new buffers have, if the context is long enough, so that they seldom have to grow."""


class InPlaceDecoder(Decoder):
    """The decoder of a graph that writes its KV cache in place.

    Args:
        session: The loaded graph.
        spec: Inputs and outputs of the exported (not optimized) decoder graph.
        cache: Names and sizes of the key and value tensors of the exported graph.
        table: The token embedding table.
        max_positions: The longest context, in tokens.
    """

    def __init__(
        self,
        session: InPlaceSession | BindingSession,
        spec: GraphSpec,
        cache: CacheSpec,
        table: TokenTable,
        max_positions: int,
    ) -> None:
        super().__init__(spec, table)
        self.session = session
        self.cache = cache
        self.max_positions = max_positions
        self.vocabulary = spec.outputs[0].width
        past_of = dict(zip(cache.present_names(), cache.past_names(), strict=True))
        self.new_buffers: Callable[[], CacheBuffers] = (
            partial(session.in_place, past_of)
            if isinstance(session, InPlaceSession)
            else partial(DeviceBuffers, DevicePool(session, past_of))
        )

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], InPlaceState]:
        """Runs whole prompts; returns logits ``[B, V]`` and the decoder's state; see :class:`Decoder`.

        Raises:
            ValueError: ``context`` is not empty: these decoders have no cross-attention.
        """
        if context:
            raise ValueError(f"this decoder has no cross-attention, but got {', '.join(context)}")
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        longest = int(lengths.max())
        embeds = np.zeros((len(prompts), longest, self.table.width), self.embeds_dtype)
        for row, prompt in enumerate(prompts):  # slots after a shorter prompt are overwritten later
            embeds[row, : len(prompt)] = prompt
        state = self._new_state(len(prompts), longest)
        return state.read(embeds, lengths), state

    def _new_state(self, rows: int, slots: int) -> InPlaceState:
        return InPlaceState(self, rows, slots)


class InPlaceState:
    """The decoding state of a batch with its KV cache buffers; implements :class:`RowState`.

    Attributes:
        lengths: Number of tokens of each row in the cache, prompt included, int64 ``[B]``.
    """

    def __init__(self, decoder: InPlaceDecoder, rows: int, slots: int) -> None:
        self._decoder = decoder
        self._buffers = decoder.new_buffers()
        self._takes_positions = POSITIONS in decoder.session.input_names
        self.lengths = np.zeros(rows, np.int64)
        self._make_room(rows, slots + 1)

    @property
    def batch_size(self) -> int:
        """Returns the number of rows B; see :class:`DecodeState`."""
        return len(self.lengths)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token ``[B]`` to each row; returns logits ``[B, V]``; see :class:`DecodeState`."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends tokens ``[B, k]`` to each row; returns logits ``[B, k, V]``; see :class:`RowState`.

        If both B and k are larger than 1, the graph runs once for each row (a limit of its attention kernel).
        """
        batch, steps = token_ids.shape
        embeds = self._decoder.table.rows(token_ids)
        self._make_room(batch, int(self.lengths.max()) + steps)
        indices = np.arange(steps)[None]
        if steps == 1 or batch == 1:
            logits = self._pass(embeds, self.lengths, 0, np.repeat(indices, batch, axis=0))
        else:
            logits = np.concatenate(
                [self._pass(embeds[row : row + 1], self.lengths[row : row + 1], row, indices) for row in range(batch)]
            )
        self.lengths = self.lengths + steps
        return logits

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Keeps the first ``lengths[i]`` tokens of each row i; see :class:`RowState`."""
        self.lengths = self.lengths - tokens_to_drop(self.lengths, np.asarray(lengths, np.int64))

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``; see :class:`DecodeState`."""
        used = int(self.lengths.max())
        self._make_room(len(rows), used)
        self._buffers.select(rows, used)
        self.lengths = self.lengths[rows]

    def join(self, other: InPlaceState) -> None:
        """Adds the rows of ``other`` after the own rows; see :class:`DecodeState`."""
        first, used = self.batch_size, int(other.lengths.max())
        self._make_room(first + other.batch_size, max(used, int(self.lengths.max())))
        self._buffers.append(other._buffers, first, other.batch_size, used)
        self.lengths = np.concatenate([self.lengths, other.lengths])

    def read(self, embeds: Array, lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Runs the prompts of all rows, and fills the KV cache.

        Args:
            embeds: Embedded prompts ``[B, S, D]``, padded to S slots.
            lengths: Number of valid tokens of each row, ``[B]``.

        Returns:
            Logits ``[B, V]`` after each row's last token.
        """
        logits = self._pass(embeds, self.lengths, 0, (lengths - 1)[:, None], lengths)
        self.lengths = np.array(lengths, np.int64)
        return logits[:, 0]

    def _pass(
        self,
        embeds: Array,
        before: NDArray[np.int64],
        row: int,
        indices: NDArray[np.int64],
        new: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float32]:
        """Runs the graph on S new slots of some rows.

        Args:
            embeds: Embeddings of the S new tokens of B rows, ``[B, S, D]``.
            before: Number of tokens that each row has in the cache.
            row: Index of the first row to run.
            indices: ``[B, K]``, the indices of the K new tokens of each row that need logits.
            new: Number of valid new tokens of each row; None if all S tokens are valid.
        """
        batch, steps, _ = embeds.shape
        after = before + (steps if new is None else new)
        inputs = {
            "inputs_embeds": embeds,
            "logits_indices": indices,
            LENGTHS: (after - 1).astype(np.int32),
            TOTAL: np.array(int(before.max()) + steps, np.int32),
        }
        if self._buffers.captures and before.any():  # one number for all steps; lengths limit what is read
            inputs[TOTAL] = np.array(self._buffers.size[1], np.int32)
        if self._takes_positions:
            inputs[POSITIONS] = before[:, None] + np.arange(steps)
        return self._buffers.run(inputs, row, "logits", (batch, indices.shape[1], self._decoder.vocabulary))

    def _make_room(self, rows: int, slots: int) -> None:
        """Enlarges the buffers if they have fewer than ``rows`` rows or ``slots`` slots."""
        had_rows, had = self._buffers.size
        if rows <= had_rows and slots <= had:
            return
        wanted = max(slots, had + had // 2 if slots > had else had)
        capacity = max(slots, min(-(-wanted // ROOM) * ROOM + ROOM, self._decoder.max_positions))
        cache, used = self._decoder.cache, min(int(self.lengths.max(initial=0)), had)
        self._buffers.resize((max(rows, had_rows), cache.num_heads, max(capacity, had), cache.head_dim), used)


POOLED = 4
"""Number of unused KV caches that are kept for later batches; a CUDA graph runs only on the KV cache of its capture."""

KEPT_RUNS = 8
"""Number of prepared runs (:class:`_BoundRun`) that are kept for a buffer; each shape of inputs needs its own run."""


@dataclass
class _BoundRun:
    """A prepared run of the decoder: the addresses of all inputs and outputs are fixed.

    Attributes:
        binding: ONNX Runtime's binding.
        inputs: The memory of the inputs, by name.
        output: The memory of the output.
        graph: Number of the CUDA graph, which the second run captures and later runs replay.
        runs: Number of runs so far.
    """

    binding: Any
    inputs: dict[str, Any]
    output: Any
    graph: int
    runs: int = 0


class _DeviceMemory:
    """Buffers of keys and values on the device, with the prepared runs that use them.

    Args:
        session: The decoder's session.
        names: Names of the inputs that are keys or values.
        shape: Shape of each buffer, ``(B, H, C, d)``.
    """

    def __init__(self, session: BindingSession, names: Sequence[str], shape: tuple[int, ...]) -> None:
        self.session, self.shape = session, shape
        # Zeros: kernels may read slots that no token was written to, and NaN would spread from there.
        self.values = {name: session.on_device(np.zeros(shape, session.dtypes[name])) for name in names}
        self.spare: dict[str, Any] = {}
        self.runs: dict[Any, _BoundRun] = {}

    def part(self, name: str, value: Any, first: int, rows: int) -> tuple[Any, ...]:
        """Returns ``bind_input``'s arguments for some rows: name and number of the device, dtype, shape, address."""
        dtype = self.session.dtypes[name]
        row = int(np.prod(self.shape[1:])) * dtype.itemsize
        return (*self.session.device, dtype.type, [rows, *self.shape[1:]], value.data_ptr() + first * row)

    def keep(self, key: Any, run: _BoundRun) -> None:
        """Stores a prepared run for later use; removes the oldest run if :data:`KEPT_RUNS` are stored."""
        while len(self.runs) >= KEPT_RUNS:
            self.session.release_graph(self.runs.pop(next(iter(self.runs))).graph)
        self.runs[key] = run


class DevicePool:
    """Keeps the KV caches of finished batches of one decoder, so that the next batch can use their memory again.

    Args:
        session: The decoder's session.
        pairs: For each ``present`` output, the name of the ``past`` input whose buffer the output is written to.
    """

    def __init__(self, session: BindingSession, pairs: Mapping[str, str]) -> None:
        self.session = session
        self.pairs = dict(pairs)
        self.numbers = count()
        self._free: list[_DeviceMemory] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> _DeviceMemory:
        """Returns free memory with buffers of this shape; allocates it if there is none."""
        with self._lock:
            for memory in self._free:
                if memory.shape == shape:
                    self._free.remove(memory)
                    return memory
        return _DeviceMemory(self.session, list(self.pairs.values()), shape)

    def give(self, memory: _DeviceMemory) -> None:
        """Stores memory that no batch uses any more; if more than :data:`POOLED` are stored, frees the oldest."""
        with self._lock:
            self._free.append(memory)
            old = self._free.pop(0) if len(self._free) > POOLED else None
        for run in old.runs.values() if old is not None else ():
            self.session.release_graph(run.graph)


class DeviceBuffers:
    """The KV cache of one batch on a device, in memory of ``pool``; implements :class:`CacheBuffers`."""

    def __init__(self, pool: DevicePool) -> None:
        self._pool, self._session = pool, pool.session
        self.captures = pool.session.captures
        self._memory: _DeviceMemory | None = None
        self._back: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """Returns the number of rows and the number of slots; see :class:`CacheBuffers`."""
        return (0, 0) if self._memory is None else (self._memory.shape[0], self._memory.shape[2])

    def resize(self, shape: Sequence[int], used: int) -> None:  # noqa: ARG002 - whole rows are copied
        """Replaces the buffers by larger ones; see :class:`CacheBuffers`."""
        old, giving = self._memory, self._back
        memory = self._memory = self._pool.take(tuple(shape))
        self._back = weakref.finalize(self, self._pool.give, memory)
        if old is not None:
            self._copy(old, old.shape[0], 0)
            giving()

    def select(self, rows: NDArray[np.int64], used: int) -> None:  # noqa: ARG002 - as above
        """Reorders the rows: row i gets the content of old row ``rows[i]``; see :class:`CacheBuffers`."""
        memory = self._memory
        if memory is None or np.array_equal(rows, np.arange(len(rows))):
            return
        whole = np.concatenate([rows, np.arange(len(rows), memory.shape[0])]).astype(np.int64)
        if not memory.spare:
            memory.spare = {
                name: self._session.empty(memory.shape, self._session.dtypes[name]) for name in memory.values
            }
        for name, value in memory.values.items():
            source = memory.part(name, value, 0, memory.shape[0])
            target = memory.part(name, memory.spare[name], 0, memory.shape[0])
            self._move(gather_model(self._session.dtypes[name].name), source, {"rows": whole}, target)
        memory.values, memory.spare = memory.spare, memory.values

    def append(self, other: DeviceBuffers, first: int, count: int, used: int) -> None:
        """Copies rows of another state's buffers into these buffers; see :class:`CacheBuffers`."""
        if self._memory is None or other._memory is None:
            return
        if other.size[1] > self.size[1]:
            shape = self._memory.shape
            self.resize((*shape[:2], other.size[1], shape[3]), used)
        self._copy(other._memory, count, first)

    def run(self, inputs: Mapping[str, Array], first: int, output: str, shape: Sequence[int]) -> Array:
        """Runs the graph once and returns one output; see :class:`CacheBuffers`.

        A run whose inputs have the shapes of an earlier run uses the binding of that run again. With CUDA graphs, the
        second such run is captured, and later ones replay the graph.
        """
        if self._memory is None:
            raise ValueError("the buffers have no size yet: call resize first")
        arrays = {name: np.asarray(array, self._session.dtypes.get(name)) for name, array in inputs.items()}
        address = next(iter(self._memory.values.values())).data_ptr()
        # A CUDA graph keeps the single numbers of its first run.
        numbers = [array.item() for array in arrays.values() if array.ndim == 0] if self.captures else []
        key = (address, first, *((name, array.shape) for name, array in arrays.items()), *numbers)
        bound = self._memory.runs.get(key)
        if bound is None:
            bound = self._bind(self._memory, arrays, first, output, shape)
            self._memory.keep(key, bound)
        else:
            for name, array in arrays.items():
                bound.inputs[name].update_inplace(np.ascontiguousarray(array))
        # The first run allocates what it needs, which is not allowed while a graph is captured.
        self._session.run_binding(bound.binding, graph=bound.graph if bound.runs else NO_GRAPH)
        bound.runs += 1
        return np.array(bound.output.numpy())

    def _bind(
        self, memory: _DeviceMemory, arrays: Mapping[str, Array], first: int, output: str, shape: Sequence[int]
    ) -> _BoundRun:
        binding = self._session.new_binding()
        values = {name: self._session.on_device(array) for name, array in arrays.items()}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in memory.values.items():
            binding.bind_input(name, *memory.part(name, value, first, shape[0]))
        for present, name in self._pool.pairs.items():
            binding.bind_output(present, *memory.part(name, memory.values[name], first, shape[0]))
        result = self._session.empty(shape, np.float32)
        binding.bind_ortvalue_output(output, result)
        return _BoundRun(binding, values, result, next(self._pool.numbers))

    def _copy(self, source: _DeviceMemory, rows: int, first: int) -> None:
        """Copies the first ``rows`` rows of ``source`` (at most as many slots) to the rows from ``first`` on."""
        memory = self._memory
        if memory is None:
            return
        pads = np.array([0, 0, 0, 0, 0, 0, memory.shape[2] - source.shape[2], 0], np.int64)
        for name, value in source.values.items():
            target = memory.part(name, memory.values[name], first, rows)
            self._move(
                pad_model(self._session.dtypes[name].name), source.part(name, value, 0, rows), {"pads": pads}, target
            )

    def _move(
        self, model: bytes, source: tuple[Any, ...], inputs: Mapping[str, Array], target: tuple[Any, ...]
    ) -> None:
        """Runs a small model that copies rows of one buffer into rows of another buffer."""
        binding = self._session.new_binding(model)
        binding.bind_input("x", *source)
        for name, array in inputs.items():
            binding.bind_ortvalue_input(name, self._session.on_device(array))
        binding.bind_output("y", *target)
        self._session.run_binding(binding, model)
