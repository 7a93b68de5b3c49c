"""Makes the kernel launches of one run of a decoder: B rows of S new tokens, with logits at K positions of a row.

The sizes of a run determine the addresses of its buffers and so the list of launches. The list can be replayed, or
captured as a CUDA graph. Values that change from run to run are in the buffers (embeddings, lengths, positions that get
logits). The last functions count what a decode step costs: the bytes that it reads, and its kernel launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from blip2edge.runtime.cuda.device.interface import KernelDevice, freed_on_error
from blip2edge.runtime.cuda.kernel import Kernel, Launch
from blip2edge.runtime.cuda.layout import NUMPY, DecoderLayout, Stored
from blip2edge.runtime.cuda.products import Matrix
from blip2edge.runtime.cuda.steps import (
    AttentionArguments,
    EmbedArguments,
    NormArguments,
    attention_kernel,
    embed_kernel,
    heads_of_block,
    move_kernel,
    norm_kernel,
    part_bytes,
)
from blip2edge.runtime.cuda.weights import DecoderWeights, LayerOnDevice, MatrixWeights, NormWeights

SLOTS_OF_A_CUT = 64
"""Attention divides the slots of the cache among thread blocks; a block gets at least this number of slots."""

HALF, FLOAT, INT = 2, 4, 4  # bytes

NO_SCRATCH = -1, -1
"""Sizes of scratch memory that was not allocated: too small for all launches."""


@dataclass(frozen=True)
class RunSizes:
    """Sizes of one run of a decoder.

    Attributes:
        rows: B, the number of rows.
        steps: S, new tokens of each row.
        asked: K, the number of positions of each row that get logits.
        capacity: C, slots of a row of the cache.
    """

    rows: int
    steps: int
    asked: int
    capacity: int

    @property
    def tokens(self) -> int:
        """Returns B * S, the number of new slots."""
        return self.rows * self.steps


@dataclass
class RunBuffers:
    """Addresses of the GPU buffers that all runs of one size use; D is the width of the residual stream.

    Attributes:
        embeddings: fp32 ``[B, S, D]``, written by the host.
        before: int32 ``[B]``, number of tokens that each row has in the cache.
        origins: int32 ``[C, B]``: for each slot and row, the row of the cache that has the slot, counted from the first
            row of the run; used if :attr:`CacheAddresses.reordered`.
        fresh: int32 ``[B]``, number of valid new tokens of each row.
        chosen: int32 ``[B * K]``, positions that get logits, as row numbers of ``x``.
        logits: fp32 ``[B * K, V]``.
        x: The residual stream, fp32 ``[B * S, D]``.
        parts, arrived: Scratch memory and counters of the launches; see :class:`blip2edge.runtime.cuda.kernel.Launch`.
        scratch: Sizes of ``parts`` and ``arrived`` in bytes.
    """

    embeddings: int
    before: int
    origins: int
    fresh: int
    chosen: int
    logits: int
    x: int
    normed: int
    heads: dict[str, int]
    attended: int
    hidden: tuple[int, int]
    parts: int = 0
    arrived: int = 0
    scratch: tuple[int, int] = NO_SCRATCH
    addresses: list[int] = field(default_factory=list)

    def holds(self, launches: Sequence[Launch]) -> bool:
        """Returns whether the scratch memory is large enough for these launches."""
        return all(have >= need for have, need in zip(self.scratch, scratch_bytes(launches), strict=True))

    def enlarge(self, device: KernelDevice, launches: Sequence[Launch]) -> None:
        """Replaces the scratch memory by memory that is large enough; the launches must be planned again.

        If memory runs out, there is no scratch memory any more, and the next run must call this method again.
        """
        needed = scratch_bytes(launches)
        parts, arrived = (max(pair) for pair in zip(self.scratch, needed, strict=True))
        freed = self.parts, self.arrived
        self.parts, self.arrived, self.scratch = 0, 0, NO_SCRATCH
        for address in freed:
            if address:
                self.addresses.remove(address)
                device.free(address)
        self.parts = self._new(device, parts)
        self.arrived = self._new(device, arrived)
        self.scratch = parts, arrived

    def _new(self, device: KernelDevice, size: int) -> int:
        self.addresses.append(device.allocate(max(size, 1)))
        return self.addresses[-1]


def scratch_bytes(launches: Sequence[Launch]) -> tuple[int, int]:
    """Returns the bytes of scratch memory and of counters that launches of one stream share."""
    return max(launch.parts for launch in launches), INT * max(launch.counters for launch in launches)


def new_buffers(device: KernelDevice, weights: DecoderWeights, sizes: RunSizes) -> RunBuffers:
    """Allocates the buffers of the runs of these sizes; if memory runs out, none of them stays allocated."""
    addresses: list[int] = []
    with freed_on_error(device, addresses):
        return _allocated(device, weights, sizes, addresses)


def _allocated(device: KernelDevice, weights: DecoderWeights, sizes: RunSizes, addresses: list[int]) -> RunBuffers:
    """Allocates the buffers of :func:`new_buffers`, and adds their addresses to the list as they are made."""
    layout, tokens, picked = weights.layout, sizes.tokens, sizes.rows * sizes.asked

    def take(size: int) -> int:
        addresses.append(device.allocate(max(size, 1)))
        return addresses[-1]

    query, key = (count * layout.head_dim for count in (layout.heads, layout.kv_heads))
    buffers = RunBuffers(
        embeddings=take(FLOAT * tokens * layout.width),
        before=take(INT * sizes.rows),
        origins=take(INT * sizes.rows * sizes.capacity),
        fresh=take(INT * sizes.rows),
        chosen=take(INT * picked),
        logits=take(FLOAT * picked * layout.vocabulary),
        x=take(FLOAT * tokens * layout.width),
        normed=take(HALF * max(tokens, picked) * layout.width),
        heads={"query": take(HALF * tokens * query), **{k: take(HALF * tokens * key) for k in ("key", "value")}},
        attended=take(HALF * tokens * query),
        hidden=(take(HALF * tokens * layout.inner), take(HALF * tokens * layout.inner)),
        addresses=addresses,
    )
    nowhere = CacheAddresses((0,) * len(weights.layers), (0,) * len(weights.layers))
    buffers.enlarge(device, plan_run(weights, sizes, buffers, nowhere, device.multiprocessors))
    return buffers


@dataclass(frozen=True)
class CacheAddresses:
    """Addresses of each layer's keys and values, fp16 ``[B, G, C, d]``, from the first row of a run on."""

    keys: tuple[int, ...]
    values: tuple[int, ...]
    reordered: bool = False


def plan_run(
    weights: DecoderWeights, sizes: RunSizes, buffers: RunBuffers, cache: CacheAddresses, multiprocessors: int
) -> list[Launch]:
    """Makes the launches of a run, in their order.

    Args:
        weights: The decoder's weights.
        sizes: Sizes of the run.
        buffers: Buffers of the run.
        cache: Addresses of keys and values.
        multiprocessors: Number of the GPU's multiprocessors.
    """
    return list(_Planner(weights, sizes, buffers, cache, multiprocessors).launches())


def needed_kernels(weights: DecoderWeights, rows: Sequence[int] = (1, 2, 3, 4, 5)) -> list[Kernel]:
    """Returns the kernels of all runs of a decoder.

    Args:
        weights: The decoder's weights.
        rows: Numbers of input rows of the matrix multiplications. Each number up to four has its own kernels; all
            larger numbers share the same kernels.
    """
    nowhere = CacheAddresses((0,) * len(weights.layers), (0,) * len(weights.layers))
    buffers = RunBuffers(0, 0, 0, 0, 0, 0, 0, 0, dict.fromkeys(("query", "key", "value"), 0), 0, (0, 0))
    plans = [plan_run(weights, RunSizes(count, 1, 1, 1), buffers, nowhere, 1) for count in rows]
    found = {launch.kernel.name: launch.kernel for plan in plans for launch in plan}
    return [*found.values(), move_kernel()]


@dataclass(frozen=True)
class _Planner:
    weights: DecoderWeights
    sizes: RunSizes
    buffers: RunBuffers
    cache: CacheAddresses
    multiprocessors: int

    def launches(self) -> Iterator[Launch]:
        weights, buffers, sizes = self.weights, self.buffers, self.sizes
        yield self._embed()
        for index, layer in enumerate(weights.layers):
            yield from self._attention(index, layer)
            yield from self._feed_forward(layer)
        yield self._norm(weights.final_norm, sizes.rows * sizes.asked, buffers.chosen)
        picked = sizes.rows * sizes.asked
        yield from self._products(picked, buffers.normed, [(weights.head, buffers.logits)], out="float")

    def _embed(self) -> Launch:
        layout, buffers, sizes = self.weights.layout, self.buffers, self.sizes
        longest = layout.positions.shape[0] if layout.positions is not None else 0
        arguments = EmbedArguments(
            buffers.embeddings, self.weights.positions, buffers.before, buffers.x,
            sizes.steps, layout.width, layout.position_offset, longest,
        )  # fmt: skip
        return Launch(embed_kernel("float"), (sizes.tokens, 1, 1), arguments)

    def _norm(self, norm: NormWeights, rows: int, chosen: int = 0) -> Launch:
        buffers = self.buffers
        arguments = NormArguments(
            buffers.x, norm.weight, norm.bias, chosen, buffers.normed, self.weights.layout.width, norm.epsilon
        )
        return Launch(norm_kernel(norm.kind), (rows, 1, 1), arguments)

    def _attention(self, index: int, layer: LayerOnDevice) -> Iterator[Launch]:
        layout, buffers, sizes = self.weights.layout, self.buffers, self.sizes
        yield self._norm(layer.attention_norm, sizes.tokens)
        parts = [(matrix, buffers.heads[name]) for name, matrix in
                 (("query", layer.query), ("key", layer.key), ("value", layer.value))]  # fmt: skip
        yield from self._products(sizes.tokens, buffers.normed, parts)
        group = heads_of_block(layout.head_dim, layout.group)
        shares = layout.group // group
        arguments = AttentionArguments(
            *buffers.heads.values(), self.cache.keys[index], self.cache.values[index], self.weights.rotation,
            buffers.before, buffers.fresh, buffers.origins if self.cache.reordered else 0,
            buffers.attended, buffers.parts, buffers.arrived, sizes.rows,
            sizes.steps, layout.kv_heads, shares, sizes.capacity, layout.window, layout.scale,
        )  # fmt: skip
        blocks = sizes.tokens * layout.kv_heads * shares
        cuts = max(1, min(-(-sizes.capacity // SLOTS_OF_A_CUT), -(-2 * self.multiprocessors // blocks)))
        kernel: Kernel = attention_kernel(layout.head_dim, group)
        scratch = blocks * cuts * part_bytes(layout.head_dim, group)
        yield Launch(kernel, (sizes.tokens, layout.kv_heads * shares, cuts), arguments, scratch, blocks)
        yield from self._products(sizes.tokens, buffers.attended, [(layer.out, buffers.x)], residual=True, out="float")

    def _feed_forward(self, layer: LayerOnDevice) -> Iterator[Launch]:
        tokens, buffers = self.sizes.tokens, self.buffers
        first, second = buffers.hidden
        yield self._norm(layer.feed_forward_norm, tokens)
        if layer.gate is None:
            yield from self._products(tokens, buffers.normed, [(layer.up, first)], relu=True)
            yield from self._products(tokens, first, [(layer.down, buffers.x)], residual=True, out="float")
            return
        yield from self._products(tokens, buffers.normed, [(layer.gate, first), (layer.up, second)])
        yield from self._products(
            tokens, first, [(layer.down, buffers.x)], residual=True, out="float", swiglu=True, gated=second
        )

    def _products(
        self,
        rows: int,
        source: int,
        parts: Sequence[tuple[MatrixWeights, int]],
        *,
        residual: bool = False,
        gated: int = 0,
        **given: object,
    ) -> Iterator[Launch]:
        """Multiplies one input by several matrices; neighbouring matrices of the same format share a launch."""
        for _, same in groupby(parts, key=lambda part: part[0].form):
            group = list(same)
            product = group[0][0].product(rows, [matrix.width for matrix, _ in group], **given)
            matrices = [
                Matrix(matrix.weight, matrix.scales, matrix.bias, out if residual else 0, out) for matrix, out in group
            ]
            splits = product.splits(self.multiprocessors)
            buffers = self.buffers
            yield product.launch(matrices, source, buffers.parts, buffers.arrived, splits, gated)


LAYER_LAUNCHES = 7
"""Launches of a layer: norm; query, key and value; attention; output; norm; up (and gate); down."""

OTHER_LAUNCHES = 3
"""Other launches of a step: the last norm, the head, the choice of the token."""


def step_launches(layers: int) -> int:
    """Returns the number of kernel launches in a greedy step.

    Query, key and value must have the same format, and so must gate and up; else there are more launches.
    """
    return LAYER_LAUNCHES * layers + OTHER_LAUNCHES


def step_bytes(layout: DecoderLayout, context: int) -> int:
    """Returns the bytes of weights, keys and values that a step of one row reads.

    Args:
        layout: The decoder.
        context: Number of tokens in the cache.
    """
    weights = sum(
        _on_device(part)
        for matrix, _, _ in layout.matrices()
        for part in (matrix.weight, matrix.scales, matrix.bias)
        if part is not None
    )
    cache = 2 * HALF * len(layout.layers) * layout.kv_heads * layout.head_dim * context
    return weights + cache


def _on_device(stored: Stored) -> int:
    """Returns the bytes of a tensor on the GPU, where fp32 matrices are stored in fp16, and all vectors in fp32."""
    if len(stored.shape) == 1:
        return FLOAT * stored.shape[0]
    return stored.bytes // 2 if NUMPY[stored.dtype] is NUMPY["float32"] else stored.bytes
