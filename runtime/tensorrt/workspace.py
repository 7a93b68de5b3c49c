"""The buffers and execution contexts for decoding a batch on a GPU; addresses never change, as CUDA graphs need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blip2edge.bundle.dtypes import NUMPY_DTYPES
from blip2edge.bundle.schema import CacheSpec, TensorSpec
from blip2edge.runtime.backends.engine_files import IN_PLACE, TOKEN_LOGPROBS, EngineRecord
from blip2edge.runtime.tensorrt.cuda import DeviceBuffer, Mirror
from blip2edge.runtime.tensorrt.session import Context, Device, Lane

TOKENS_IN_FLIGHT = 4
"""Number of buffers into which chosen tokens are copied from the GPU to the host, used in turn, one for each step."""

MOST_IDLE = 4
"""Largest number of idle workspaces. A workspace contains a KV cache, so workspaces for all batch sizes would need too
much memory."""

LARGE = ("logits", "seen", "held")
"""Tensors that have an element for each token of the vocabulary; their buffers are in the GPU's own memory."""

WIDE = 2
"""Number of the third buffer (the first two are 0 and 1); it is for the inputs of prompts and of steps with several
tokens."""


@dataclass
class Engines:
    """The decoder's engine and the engine that chooses tokens, with their idle workspaces.

    Attributes:
        device: The device that both engines run on.
        decoder: The deserialised engine of the decoder.
        decoder_record: The decoder's record in ``engine.json``.
        step: The deserialised engine that chooses the next token.
        step_record: Record of the ``step`` engine.
        cache: Names and sizes of the KV cache's tensors.
        capacity: C, number of slots of the KV cache.
        idle: Idle workspaces, the least recently used workspace first; at most :data:`MOST_IDLE`.
    """

    device: Device
    decoder: Any
    decoder_record: EngineRecord
    step: Any
    step_record: EngineRecord
    cache: CacheSpec
    capacity: int
    idle: list[Workspace] = field(default_factory=list)

    @property
    def in_place(self) -> bool:
        """Returns whether the KV cache is updated in place: then ``past`` and ``present`` have the same address."""
        return self.decoder_record.cache == IN_PLACE

    @property
    def gives_logprobs(self) -> bool:
        """Returns whether the step engine outputs the log-probabilities of the chosen tokens."""
        return any(tensor.name == TOKEN_LOGPROBS for tensor in self.step_record.spec.outputs)

    @property
    def lane(self) -> Lane:
        """Returns the CUDA stream, with its scratch memory, in which the decoder and the step engine run."""
        return self.device.decoding

    def tensors(self) -> dict[str, TensorSpec]:
        """Returns inputs and outputs of both engines by name; a name in both engines is the same tensor."""
        records = (self.decoder_record.spec, self.step_record.spec)
        return {tensor.name: tensor for spec in records for tensor in (*spec.inputs, *spec.outputs)}

    def take(self, rows: int, cross: tuple[int, ...]) -> Workspace:
        """Returns an idle or new workspace for ``rows`` rows; ``cross``: lengths of the cross-attention inputs."""
        with self.lane.lock:
            for place, workspace in enumerate(self.idle):
                if workspace.key == (rows, cross):
                    return self.idle.pop(place)
            return Workspace(self, rows, cross)

    def give(self, workspace: Workspace) -> None:
        """Stores an idle workspace for the next batch of its size; frees the oldest workspaces above the limit."""
        with self.lane.lock:
            self.idle.append(workspace)
            while len(self.idle) > MOST_IDLE:
                self.idle.pop(0).free()

    def close(self) -> None:
        """Waits until the work in the lane is done, then frees all idle workspaces."""
        with self.lane.lock:
            while self.idle:
                self.idle.pop().free()


class Workspace:
    """Buffers and execution contexts for a batch of B rows.

    Args:
        engines: The engines that use the workspace.
        rows: B, the number of rows.
        cross: The length E of each of the decoder's cross-attention inputs.
    """

    def __init__(self, engines: Engines, rows: int, cross: tuple[int, ...]) -> None:
        self.key = (rows, cross)
        self.rows = rows
        self._engines, self._device = engines, engines.device
        cuda, cache = engines.device.cuda, engines.cache
        self.tensors = engines.tensors()
        dtype = NUMPY_DTYPES[self.tensors[cache.past_names()[0]].dtype]
        self.slot_bytes = cache.head_dim * dtype.itemsize
        self.head_bytes = engines.capacity * self.slot_bytes
        self.row_bytes = cache.num_heads * self.head_bytes
        self.layer_bytes = rows * self.row_bytes
        self.layers = 2 * cache.num_layers
        self.vocabulary = self.tensors["logits"].width
        count = 1 if engines.in_place else 2
        self.halves = [DeviceBuffer(cuda, self.layers * self.layer_bytes) for _ in range(count)]
        self.spare = DeviceBuffer(cuda, self.row_bytes)  # for moves within a row
        self.cross: dict[str, Mirror] = {}
        self.mirrors: dict[tuple[str, int], Mirror] = {}
        self.tokens = [Mirror(cuda, (rows, 1), np.dtype(np.int64)) for _ in range(2)]
        self.events = [cuda.event() for _ in range(TOKENS_IN_FLIGHT)]
        self.ring = [Mirror(cuda, (rows, 1), np.dtype(np.int64)) for _ in range(TOKENS_IN_FLIGHT)]
        self.logprobs = [Mirror(cuda, (rows, 1), np.dtype(np.float32)) for _ in range(2)]
        self.logprobs_ring = [Mirror(cuda, (rows, 1), np.dtype(np.float32)) for _ in range(TOKENS_IN_FLIGHT)]
        self.graphs: dict[int, int] = {}
        self.warm: set[int] = set()
        self.contexts = {
            profile: Context(engines.device, engines.lane, engines.decoder, engines.decoder_record, profile)
            for profile in engines.decoder_record.profiles
        }
        step = engines.step_record
        self.choice = Context(engines.device, engines.lane, engines.step, step, step.profiles[0])

    def free(self) -> None:
        """Waits until the work in the lane is done, then frees buffers, events and CUDA graphs."""
        cuda = self._device.cuda
        self._engines.lane.synchronize()
        for graph in self.graphs.values():
            cuda.destroy_graph(graph)
        for event in self.events:
            cuda.destroy_event(event)
        for buffer in (*self.halves, self.spare):
            buffer.free()
        small = (*self.tokens, *self.ring, *self.logprobs, *self.logprobs_ring)
        for mirror in (*self.cross.values(), *self.mirrors.values(), *small):
            mirror.free()
        self.graphs.clear()
        self.contexts.clear()

    @property
    def can_be_captured(self) -> bool:
        """Returns whether a decode step can be captured as a CUDA graph."""
        return self.contexts["decode"].can_be_captured and self.choice.can_be_captured

    def after(self, half: int) -> int:
        """Returns the number of the KV cache's buffer that a step writes if it reads buffer ``half``.

        That is the other of two buffers; if the cache is updated in place, there is only one buffer.
        """
        return (half + 1) % len(self.halves)

    def mirror(self, name: str, half: int, shape: tuple[int, ...]) -> Mirror:
        """Returns the host and device buffers of a small tensor; makes larger buffers if ``shape`` does not fit.

        Args:
            name: The tensor.
            half: 0 or 1 in decode steps, which use two sets of buffers in turn; :data:`WIDE` in passes of several
                tokens.
            shape: The tensor's shape in the next run.
        """
        known = self.mirrors.get((name, half))
        if known is not None and known.holds(shape):
            return known
        if known is not None:
            self._engines.lane.synchronize()
            self.mirrors.pop((name, half)).free()  # forgotten first: memory may run out
        made = Mirror(self._device.cuda, shape, NUMPY_DTYPES[self.tensors[name].dtype], on_device=name in LARGE)
        self.mirrors[name, half] = made
        return made

    def bind_cache(self, context: Context, half: int) -> None:
        """Binds the KV cache to an execution context: buffer ``half`` as input, buffer ``after(half)`` as output."""
        cache = self._engines.cache
        for index, (past, present) in enumerate(zip(cache.past_names(), cache.present_names(), strict=True)):
            offset = index * self.layer_bytes
            shape = (self.rows, cache.num_heads, self._engines.capacity, cache.head_dim)
            context.bind(past, self.halves[half].address + offset, shape)
            context.bind(present, self.halves[self.after(half)].address + offset)
        for name, mirror in self.cross.items():
            context.bind(name, mirror.address, self.cross_shape(name))

    def cross_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the decoder's cross-attention input ``name`` in this workspace."""
        names = [tensor.name for tensor in self._engines.decoder_record.spec.inputs if is_cross(tensor.name)]
        length = self.key[1][names.index(name)]
        dims = self.tensors[name].dims
        fixed = [dim for dim in dims if isinstance(dim, int)]
        return (self.rows, length) if len(dims) == 2 else (self.rows, fixed[0], length, fixed[-1])


def is_cross(name: str) -> bool:
    """Returns whether ``name`` is the name of one of the decoder's cross-attention inputs."""
    return name.startswith("cross")
