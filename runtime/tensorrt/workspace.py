"""Buffers of a batch of B rows on a GPU, at addresses that never change, and the contexts that use them."""

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
"""Largest number of tokens that are copied from the GPU to the host at the same time."""

MOST_IDLE = 4
"""Largest number of idle workspaces: each has a KV cache, so a workspace for every batch size needs too much memory."""

LARGE = ("logits", "seen", "held")
"""Tensors with an element for each token of the vocabulary, which stay in the GPU's own memory."""

WIDE = 2
"""Used in place of the number of a half (0 or 1): the buffers for prompts and for several tokens at once."""


@dataclass
class Engines:
    """The two engines that decode, and their idle workspaces.

    Attributes:
        device: The device that both engines run on.
        decoder: The deserialised decoder.
        decoder_record: The decoder's record in ``engine.json``.
        step: The deserialised engine that chooses the next token.
        step_record: Record of the ``step`` engine.
        cache: The KV cache's tensors.
        capacity: C, positions of the KV cache.
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
        """Returns the lane in which both engines run."""
        return self.device.decoding

    def tensors(self) -> dict[str, TensorSpec]:
        """Returns inputs and outputs of both engines by name; the same name in both engines means the same tensor."""
        records = (self.decoder_record.spec, self.step_record.spec)
        return {tensor.name: tensor for spec in records for tensor in (*spec.inputs, *spec.outputs)}

    def take(self, rows: int, cross: tuple[int, ...]) -> Workspace:
        """Returns an idle or new workspace for ``rows`` rows with cross-attention inputs of these lengths."""
        with self.lane.lock:
            for place, workspace in enumerate(self.idle):
                if workspace.key == (rows, cross):
                    return self.idle.pop(place)
            return Workspace(self, rows, cross)

    def give(self, workspace: Workspace) -> None:
        """Keeps an idle workspace for the next batch of its size; frees the oldest above :data:`MOST_IDLE`."""
        with self.lane.lock:
            self.idle.append(workspace)
            while len(self.idle) > MOST_IDLE:
                self.idle.pop(0).free()

    def close(self) -> None:
        """Frees all idle workspaces, after the work in the lane is done."""
        with self.lane.lock:
            while self.idle:
                self.idle.pop().free()


class Workspace:
    """Buffers and execution contexts for a batch of B rows.

    Args:
        engines: The engines that use the workspace.
        rows: B, the number of rows.
        cross: Lengths E of the decoder's cross-attention inputs, tensor by tensor.
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
        """Frees buffers, events and CUDA graphs, after the work in the lane is done."""
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
        """Returns the half that a step writes if it reads ``half``: the other half; ``half`` if there is no other."""
        return (half + 1) % len(self.halves)

    def mirror(self, name: str, half: int, shape: tuple[int, ...]) -> Mirror:
        """Returns the buffer of the small tensor ``name``; replaces it by a larger buffer if ``shape`` does not fit.

        ``half`` is one of the two halves, whose addresses never change, or :data:`WIDE`.
        """
        known = self.mirrors.get((name, half))
        if known is not None and known.holds(shape):
            return known
        if known is not None:
            self._engines.lane.synchronize()
            known.free()
        made = Mirror(self._device.cuda, shape, NUMPY_DTYPES[self.tensors[name].dtype], on_device=name in LARGE)
        self.mirrors[name, half] = made
        return made

    def bind_cache(self, context: Context, half: int) -> None:
        """Binds the KV cache to a context: ``half`` (0 or 1) as input, and :meth:`after` of ``half`` as output."""
        cache = self._engines.cache
        for index, (past, present) in enumerate(zip(cache.past_names(), cache.present_names(), strict=True)):
            offset = index * self.layer_bytes
            shape = (self.rows, cache.num_heads, self._engines.capacity, cache.head_dim)
            context.bind(past, self.halves[half].address + offset, shape)
            context.bind(present, self.halves[self.after(half)].address + offset)
        for name, mirror in self.cross.items():
            context.bind(name, mirror.address, self.cross_shape(name))

    def cross_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the cross-attention input ``name`` for this batch."""
        names = [tensor.name for tensor in self._engines.decoder_record.spec.inputs if is_cross(tensor.name)]
        length = self.key[1][names.index(name)]
        dims = self.tensors[name].dims
        fixed = [dim for dim in dims if isinstance(dim, int)]
        return (self.rows, length) if len(dims) == 2 else (self.rows, fixed[0], length, fixed[-1])


def is_cross(name: str) -> bool:
    """Returns whether the decoder's input ``name`` belongs to its cross-attention."""
    return name.startswith("cross")
