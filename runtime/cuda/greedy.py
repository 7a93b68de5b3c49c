"""Greedy decoding on the GPU: each step chooses a token and copies the token's embedding for the next step.

So the kernel launches have the same parameters in every step, and a step is one CUDA graph. No kernel waits for the
host: a step is launched before the host has read the token of the previous step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BackendError
from blip2edge.runtime.backends.base import closed_graph
from blip2edge.runtime.cuda.device.interface import Run
from blip2edge.runtime.cuda.kernel import THREADS, Launch
from blip2edge.runtime.cuda.plan import FLOAT, INT, CacheAddresses, RunBuffers, RunSizes, new_buffers, plan_run
from blip2edge.runtime.cuda.session import KEPT_RUNS, KernelBuffers, KernelSession
from blip2edge.runtime.cuda.steps import BEST_BYTES, ChooseArguments
from blip2edge.runtime.cuda.token_table import TableOnDevice
from blip2edge.runtime.cuda.weights import DecoderWeights
from blip2edge.runtime.decoding.kv.in_place import InPlaceDecoder, InPlaceState
from blip2edge.runtime.decoding.sampling import StepScores, broken_logits
from blip2edge.runtime.decoding.state import GreedyStep

LOGITS_OF_A_THREAD = 4

AHEAD = 2
"""Largest number of launched steps whose tokens the host has not read yet: the GPU runs one step while the host reads
the tokens of the step before it."""

KEPT_STEPS = 4
"""Largest number of unused :class:`GreedyRun` objects that are kept for later texts."""


class KernelDecoder(InPlaceDecoder):
    """A decoder that runs as CUDA kernels and can choose greedy tokens on the GPU.

    Args:
        session: The decoder on the GPU.
        spec: Inputs and outputs of the exported (not optimized) decoder graph.
        cache: Names and sizes of the key and value tensors of the exported graph.
        table: The token embedding table on the host.
        max_positions: The longest context, in tokens.
        stored: The token embedding table on the GPU.
    """

    def __init__(
        self,
        session: KernelSession,
        spec: GraphSpec,
        cache: CacheSpec,
        table: TokenTable,
        max_positions: int,
        stored: TableOnDevice,
    ) -> None:
        super().__init__(session, spec, cache, table, max_positions)
        self.kernels, self.stored = session, stored
        self._free: deque[GreedyRun] = deque()
        self._lock = threading.Lock()

    def take(self, rows: int) -> GreedyRun:
        """Returns buffers for greedy decoding of this many rows: unused buffers, or else new buffers."""
        with self._lock:
            for run in tuple(self._free):
                if run.rows == rows:
                    self._free.remove(run)
                    return run
            while len(self._free) >= KEPT_STEPS:
                self._free.popleft().close()
        return GreedyRun(self.kernels, self.stored, rows)

    def give(self, run: GreedyRun) -> None:
        """Stores unused buffers for later texts. Acquires no lock, because finalizers call this method."""
        self._free.append(run)

    def _new_state(self, rows: int, slots: int) -> KernelState:
        return KernelState(self, rows, slots)


class KernelState(InPlaceState):
    """The decoding state of a batch on a GPU; see :class:`blip2edge.runtime.decoding.state.GreedyState`."""

    _decoder: KernelDecoder
    _buffers: KernelBuffers

    @property
    def gives_logprobs(self) -> bool:
        """Returns True: these kernels always output log-probabilities; see :class:`GreedyState`."""
        return True

    def greedy(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[GreedyStep, None, None]:
        """Yields the likeliest next tokens ``[B]`` and their log-probabilities ``[B]`` step by step.

        While the caller uses a token, the next step already runs on the GPU. The keys and values of that
        step are in slots after the state's lengths; later tokens overwrite them.

        Args:
            token_ids: The last token of each row, ``[B]``.
            rules: How the logits of each row are changed before its token is chosen.

        Raises:
            BackendError: The logits of a row contain NaN.
        """
        run = self._decoder.take(self.batch_size)
        try:
            run.begin(rules)
            while True:
                self._make_room(self.batch_size, int(self.lengths.max()) + 1)
                for tokens, logprobs in self._until_full(token_ids, run):
                    token_ids = tokens
                    yield tokens, logprobs
        finally:
            self._decoder.give(run)

    def _until_full(self, token_ids: NDArray[np.int64], run: GreedyRun) -> Generator[GreedyStep, None, None]:
        """Yields tokens until the last slot of the cache is written."""
        start, capacity = self.lengths.copy(), self._buffers.size[1]
        room = capacity - int(start.max())
        run.put(self._decoder.embed(token_ids[:, None]), start, self._buffers.addresses(0), capacity)
        launched: deque[Callable[[], GreedyStep]] = deque()
        try:
            for given in range(1, room + 1):
                while len(launched) < min(AHEAD, room - given + 1):
                    launched.append(run.step())
                tokens, logprobs = launched.popleft()()
                if tokens.min() < 0:
                    raise broken_logits()
                self.lengths = start + given
                yield tokens, logprobs
        except Exception:
            while launched:
                with suppress(BackendError):  # the first error says what is wrong
                    launched.popleft()()
            raise
        finally:
            while launched:  # the buffers and the cache are free when all steps are done
                launched.popleft()()


@dataclass(frozen=True)
class _Marks:
    """Addresses of the buffers for choosing tokens, in the order of ``ChooseArguments``.

    ``tokens`` and ``logprobs`` are neighbours, so that one copy reads both.
    """

    seen: int
    penalty: int
    held: int
    held_steps: int
    tokens: int
    logprobs: int
    parts: int
    arrived: int


class GreedyRun:
    """Buffers and CUDA graphs of greedy decoding of B rows; used by one text or batch at a time.

    Args:
        session: The decoder on the GPU.
        table: The token embedding table on the GPU.
        rows: B, the number of rows.
    """

    def __init__(self, session: KernelSession, table: TableOnDevice, rows: int) -> None:
        self._session, self._device, self._table, self.rows = session, session.device, table, rows
        layout = session.weights.layout
        self._cuts = choice_cuts(layout.vocabulary, self._device.multiprocessors)
        self._longest = layout.max_positions
        self._addresses: list[int] = []
        self._buffers = self._new_buffers()
        vocabulary = layout.vocabulary
        sizes = (rows * vocabulary, FLOAT * rows, rows * vocabulary, INT * rows, (INT + FLOAT) * rows)
        seen, penalty, held, held_steps, tokens = (self._new(size) for size in sizes)
        parts, arrived = self._new(BEST_BYTES * rows * self._cuts), self._new(INT * rows)
        self._marks = _Marks(seen, penalty, held, held_steps, tokens, tokens + INT * rows, parts, arrived)
        self._runs: dict[tuple[int, CacheAddresses], tuple[Launch, Run]] = {}
        self._run: Run | None = None

    def begin(self, rules: Sequence[StepScores]) -> None:
        """Copies the rules of a new batch to the GPU; each step then keeps them up to date."""
        vocabulary, device, marks = self._session.weights.layout.vocabulary, self._device, self._marks
        held = [rule.held if rule.held_steps > 0 else rule.held[:0] for rule in rules]
        device.write(marks.seen, _marked([rule.seen for rule in rules], vocabulary))
        device.write(marks.held, _marked(held, vocabulary))
        device.write(marks.penalty, np.array([rule.penalty for rule in rules], np.float32))
        device.write(marks.held_steps, np.array([rule.held_steps for rule in rules], np.int32))

    def put(self, embeds: Array, before: NDArray[np.int64], cache: CacheAddresses, capacity: int) -> None:
        """Prepares the first step on a KV cache.

        Args:
            embeds: Embeddings of the last tokens, ``[B, 1, D]``.
            before: Number of tokens that each row has in the cache, ``[B]``.
            cache: The cache's addresses.
            capacity: Number of slots of a row of the cache.
        """
        device = self._device
        first, self._run = self._prepared(cache, capacity)
        buffers = self._buffers
        device.write(buffers.embeddings, np.ascontiguousarray(embeds, np.float32))
        device.write(buffers.before, before.astype(np.int32))
        device.run(first)

    def step(self) -> Callable[[], GreedyStep]:
        """Launches a step.

        Returns:
            A function that waits for the step, and returns its tokens ``[B]`` and their log-probabilities ``[B]``; a
            token is -1 if the row's logits contain NaN.
        """
        if self._run is None:
            raise closed_graph()
        self._run.start()
        fetched = self._device.fetch(self._marks.tokens, (2, self.rows), np.int32)

        def read() -> GreedyStep:
            values = fetched()
            return values[0].astype(np.int64), values[1].view(np.float32)

        return read

    def close(self) -> None:
        """Frees the buffers and the CUDA graphs."""
        for _, run in self._runs.values():
            run.close()
        self._runs.clear()
        for address in (*self._addresses, *self._buffers.addresses):
            self._device.free(address)

    def _new(self, size: int) -> int:
        self._addresses.append(self._device.allocate(size))
        return self._addresses[-1]

    def _new_buffers(self) -> RunBuffers:
        device, rows = self._device, self.rows
        buffers = new_buffers(device, self._session.weights, RunSizes(rows, 1, 1, self._longest))
        device.write(buffers.fresh, np.ones(rows, np.int32))
        device.write(buffers.chosen, np.arange(rows, dtype=np.int32))
        return buffers

    def _prepared(self, cache: CacheAddresses, capacity: int) -> tuple[Launch, Run]:
        """Returns the launch that makes the first step's input, and the launches of each step."""
        key = capacity, cache
        found = self._runs.pop(key, None)
        if capacity > self._longest:  # scratch memory of attention depends on the capacity
            self._longest = capacity
            for address in self._buffers.addresses:
                self._device.free(address)
            while self._runs:
                self._runs.popitem()[1][1].close()
            self._buffers = self._new_buffers()
        if found is None:
            while len(self._runs) >= KEPT_RUNS:
                self._runs.pop(next(iter(self._runs)))[1].close()
            weights, sizes = self._session.weights, RunSizes(self.rows, 1, 1, capacity)
            first, *launches = plan_run(weights, sizes, self._buffers, cache, self._device.multiprocessors)
            launches.append(choice_launch(weights, self._table, self._buffers, self._marks, self.rows, self._cuts))
            found = first, Run(self._device, launches)
        self._runs[key] = found
        return found


def choice_cuts(vocabulary: int, multiprocessors: int) -> int:
    """Returns the number of thread blocks among which a row's vocabulary is divided to choose the row's token."""
    return max(1, min(-(-vocabulary // (THREADS * LOGITS_OF_A_THREAD)), 2 * multiprocessors))


def choice_launch(
    weights: DecoderWeights, table: TableOnDevice, buffers: RunBuffers, marks: _Marks, rows: int, cuts: int
) -> Launch:
    """Makes the launch that chooses the tokens of B rows and copies their embeddings.

    Args:
        weights: The decoder's weights.
        table: The token embedding table.
        buffers: Buffers of the step.
        marks: Buffers for choosing tokens.
        rows: B, the number of rows.
        cuts: Number of thread blocks for each row, from :func:`choice_cuts`.
    """
    layout = weights.layout
    arguments = ChooseArguments(
        buffers.logits, marks.seen, marks.penalty, marks.held, marks.held_steps, buffers.before,
        marks.tokens, marks.logprobs, table.address, table.scales, weights.positions, buffers.x,
        marks.parts, marks.arrived, layout.vocabulary, layout.width, table.format.block, layout.position_offset,
        layout.positions.shape[0] if layout.positions is not None else 0,
    )  # fmt: skip
    return Launch(table.format.kernel, (cuts, rows, 1), arguments)


def _marked(ids: Sequence[NDArray[np.int64]], vocabulary: int) -> NDArray[np.uint8]:
    """Makes an array ``[B, V]``: 1 for the ids of each row, else 0."""
    marks = np.zeros((len(ids), vocabulary), np.uint8)
    for row, chosen in zip(marks, ids, strict=True):
        row[chosen] = 1
    return marks
