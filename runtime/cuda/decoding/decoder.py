"""Decoding on the GPU: each step chooses or draws a token and copies the token's embedding for the next step.

So the kernel launches have the same parameters in every step, and a step is one CUDA graph. No kernel waits for the
host: a step is launched before the host has read the token of the previous step.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BackendError
from blip2edge.runtime.backends.base import closed_graph
from blip2edge.runtime.cuda.decoding.choice import LEFT_TO_HOST, TokenChoice
from blip2edge.runtime.cuda.decoding.session import KEPT_RUNS, KernelBuffers, KernelSession
from blip2edge.runtime.cuda.device.interface import Run, freed_on_error
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.plan import CacheAddresses, RunBuffers, RunSizes, new_buffers, plan_run
from blip2edge.runtime.cuda.token_table import TableOnDevice
from blip2edge.runtime.decoding.kv.in_place import InPlaceDecoder, InPlaceState
from blip2edge.runtime.decoding.sampling import StepScores, broken_logits
from blip2edge.runtime.decoding.state import ChosenStep

BROKEN = -1
"""Value in place of a token if the row's logits contain NaN."""

AHEAD = 2
"""Largest number of launched steps whose tokens the host has not read yet: the GPU runs one step while the host reads
the tokens of the step before it."""

KEPT_STEPS = 4
"""Largest number of unused :class:`ChoosingRun` objects that are kept for later texts."""


class KernelDecoder(InPlaceDecoder):
    """A decoder that runs as CUDA kernels and can choose tokens on the GPU: the likeliest, or at random.

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
        self._free: deque[ChoosingRun] = deque()
        self._lock = threading.Lock()

    def take(self, rows: int) -> ChoosingRun:
        """Returns buffers to choose the tokens of this many rows on the GPU: unused buffers, or else new buffers."""
        with self._lock:
            for run in tuple(self._free):
                if run.rows == rows:
                    self._free.remove(run)
                    return run
            while len(self._free) >= KEPT_STEPS:
                self._free.popleft().close()
        return ChoosingRun(self.kernels, self.stored, rows)

    def give(self, run: ChoosingRun) -> None:
        """Stores unused buffers for later texts. Acquires no lock, because finalizers call this method.

        Buffers whose preparation failed are freed instead: some of them may be missing.
        """
        if run.ready:
            self._free.append(run)
            return
        with suppress(BackendError):  # the first error says what is wrong
            run.close()

    def _new_state(self, rows: int, slots: int) -> KernelState:
        return KernelState(self, rows, slots)


class KernelState(InPlaceState):
    """The decoding state of a batch on a GPU; see :class:`blip2edge.runtime.decoding.state.ChoosingState`."""

    _decoder: KernelDecoder
    _buffers: KernelBuffers

    @property
    def gives_logprobs(self) -> bool:
        """Returns True: these kernels always output log-probabilities; see :class:`ChoosingState`."""
        return True

    @property
    def draws(self) -> bool:
        """Returns True: these kernels can also draw tokens at random; see :class:`ChoosingState`."""
        return True

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``; a table is reordered, not the cache; see :class:`DecodeState`."""
        self._make_room(len(rows), int(self.lengths.max()))
        self._buffers.reorder(rows, self.lengths)
        self.lengths = self.lengths[rows]

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Keeps the first ``lengths[i]`` tokens of each row i; see :class:`RowState`."""
        super().truncate(lengths)
        self._buffers.shorten(self.lengths)

    def join(self, other: InPlaceState) -> None:
        """Adds the rows of ``other`` after the own rows; see :class:`DecodeState`."""
        for state in (self, other):
            if isinstance(state, KernelState):
                state._buffers.settle(state.lengths)
        super().join(other)

    def choose(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[ChosenStep, None, None]:
        """Yields the next tokens ``[B]`` (likeliest or random) and their log-probabilities ``[B]`` step by step.

        Ends if the host must choose a token, because more than :data:`blip2edge.runtime.cuda.steps.LISTED` tokens
        would have to be sorted for top-k or top-p.

        While the caller uses a token, the next step already runs on the GPU. The keys and values of that
        step are in slots after the state's lengths; later tokens overwrite them.

        Args:
            token_ids: The last token of each row, ``[B]``.
            rules: How the logits of each row are changed before its token is chosen.

        Raises:
            BackendError: The logits of a row contain NaN.
        """
        self._buffers.settle(self.lengths)  # the steps have no table of rows
        run = self._decoder.take(self.batch_size)
        try:
            run.begin(rules, self.lengths)
            while True:
                self._make_room(self.batch_size, int(self.lengths.max()) + 1)
                for tokens, logprobs in self._until_full(token_ids, run):
                    if tokens.min() == LEFT_TO_HOST:
                        return
                    token_ids = tokens
                    yield tokens, logprobs
        finally:
            self._decoder.give(run)

    def _until_full(self, token_ids: NDArray[np.int64], run: ChoosingRun) -> Generator[ChosenStep, None, None]:
        """Yields tokens until the last slot of the cache is written, or a row has the token :data:`LEFT_TO_HOST`."""
        start, capacity = self.lengths.copy(), self._buffers.size[1]
        room = capacity - int(start.max())
        run.put(self._decoder.embed(token_ids[:, None]), start, self._buffers.addresses(0), capacity)
        launched: deque[Callable[[], ChosenStep]] = deque()
        try:
            for given in range(1, room + 1):
                while len(launched) < min(AHEAD, room - given + 1):
                    launched.append(run.step())
                tokens, logprobs = launched.popleft()()
                if (tokens == BROKEN).any():
                    raise broken_logits()
                if tokens.min() != LEFT_TO_HOST:  # else the host appends the token before once more
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


class ChoosingRun:
    """Buffers and CUDA graphs that choose the tokens of B rows on the GPU; used by one text or batch at a time.

    Args:
        session: The decoder on the GPU.
        table: The token embedding table on the GPU.
        rows: B, the number of rows.

    Attributes:
        ready: Whether all buffers exist: False while :meth:`begin` and :meth:`put` prepare a text, and after an error
            in one of them.
    """

    def __init__(self, session: KernelSession, table: TableOnDevice, rows: int) -> None:
        self._session, self._device, self.rows = session, session.device, rows
        self._longest = session.weights.layout.max_positions
        self._buffers = self._new_buffers()
        with freed_on_error(self._device, self._buffers.addresses):
            self._choice = TokenChoice(self._device, session.weights, table, rows)
        self.ready = True
        self._runs: dict[tuple[int, bool, CacheAddresses], tuple[Launch, Run]] = {}
        self._run: Run | None = None

    def begin(self, rules: Sequence[StepScores], lengths: NDArray[np.int64]) -> None:
        """Copies the rules of new texts to the GPU; see :meth:`TokenChoice.begin`."""
        self.ready = False
        self._choice.begin(rules, lengths)
        self.ready = True

    def put(self, embeds: Array, before: NDArray[np.int64], cache: CacheAddresses, capacity: int) -> None:
        """Prepares the first step on a KV cache.

        Args:
            embeds: Embeddings of the last tokens, ``[B, 1, D]``.
            before: Number of tokens that each row has in the cache, ``[B]``.
            cache: The cache's addresses.
            capacity: Number of slots of a row of the cache.
        """
        device = self._device
        self.ready = False
        first, self._run = self._prepared(cache, capacity)
        self.ready = True
        buffers = self._buffers
        device.write(buffers.embeddings, np.ascontiguousarray(embeds, np.float32))
        device.write(buffers.before, before.astype(np.int32))
        device.run(first)

    def step(self) -> Callable[[], ChosenStep]:
        """Launches a step.

        Returns:
            A function that waits for the step, and returns its tokens ``[B]`` and their log-probabilities ``[B]``; a
            token is :data:`BROKEN` if the row's logits contain NaN, :data:`LEFT_TO_HOST` if the host must choose.
        """
        if self._run is None:
            raise closed_graph()
        self._run.start()
        fetched = self._device.fetch(self._choice.chosen, (2, self.rows), np.int32)

        def read() -> ChosenStep:
            values = fetched()
            return values[0].astype(np.int64), values[1].view(np.float32)

        return read

    def close(self) -> None:
        """Frees the buffers and the CUDA graphs."""
        for _, run in self._runs.values():
            run.close()
        self._runs.clear()
        self._free_buffers()
        while self._choice.addresses:
            self._device.free(self._choice.addresses.pop())

    def _free_buffers(self) -> None:
        """Frees the buffers of the decode step; an address is forgotten before the memory is freed."""
        while self._buffers.addresses:
            self._device.free(self._buffers.addresses.pop())

    def _new_buffers(self) -> RunBuffers:
        device, rows = self._device, self.rows
        buffers = new_buffers(device, self._session.weights, RunSizes(rows, 1, 1, self._longest))
        device.write(buffers.fresh, np.ones(rows, np.int32))
        device.write(buffers.chosen, np.arange(rows, dtype=np.int32))
        return buffers

    def _prepared(self, cache: CacheAddresses, capacity: int) -> tuple[Launch, Run]:
        """Returns the launch that makes the first step's input, and the launches of each step."""
        key = capacity, self._choice.draws, cache
        found = self._runs.pop(key, None)
        if capacity > self._longest:  # scratch memory of attention depends on the capacity
            while self._runs:
                self._runs.popitem()[1][1].close()
            self._free_buffers()
            self._longest = capacity
            self._buffers = self._new_buffers()
        if found is None:
            while len(self._runs) >= KEPT_RUNS:
                self._runs.pop(next(iter(self._runs)))[1].close()
            weights, sizes = self._session.weights, RunSizes(self.rows, 1, 1, capacity)
            first, *launches = plan_run(weights, sizes, self._buffers, cache, self._device.multiprocessors)
            found = first, Run(self._device, [*launches, *self._choice.launches(self._buffers)])
        self._runs[key] = found
        return found
