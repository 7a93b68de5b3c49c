"""Decoding over one buffer a layer that the graph writes in place, where a bundle's optimised copy has such a decoder.

Each row's text begins in slot 0 of its own row of the buffer, so that a step copies no keys and values, forgetting is
a smaller number, and reordering beams moves what has been written and no more.
``optimization/passes/shared_cache.py`` tells what the graph takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.decoding.state import embedded, forgotten

LENGTHS = "seqlens_k"
TOTAL = "total_sequence_length"
POSITIONS = "position_ids"
ROOM = 64
"""Slots that a cache is rounded up to, so that it is seldom enlarged."""


class SharedDecoder:
    """A decoder graph over shared buffers, and its token table.

    Args:
        session: The loaded graph.
        spec: The portable decoder's tensors.
        cache: Its keys and values.
        table: The token table.
        max_positions: The longest context.
    """

    most_rows: int | None = None

    def __init__(
        self,
        session: OnnxRuntimeSession,
        spec: GraphSpec,
        cache: CacheSpec,
        table: TokenTable,
        max_positions: int,
    ) -> None:
        self.session = session
        self.cache = cache
        self.table = table
        self.max_positions = max_positions
        dtypes = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
        self.embeds_dtype = NUMPY_DTYPES[dtypes["inputs_embeds"]]
        self.cache_dtype = NUMPY_DTYPES[dtypes[cache.past_names()[0]]]
        self.vocabulary = spec.outputs[0].width

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], SharedState]:
        """Reads whole prompts; arguments and result as :meth:`blip2edge.runtime.decoding.kv.growing.Decoder.prefill`.

        Raises:
            ValueError: There is a context: such a decoder looks at its text alone.
        """
        if context:
            raise ValueError(f"this decoder looks at nothing beside its text, not at {', '.join(context)}")
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        longest = int(lengths.max())
        embeds = np.zeros((len(prompts), longest, self.table.width), self.embeds_dtype)
        for row, prompt in enumerate(prompts):  # what is behind a shorter prompt is written over later
            embeds[row, : len(prompt)] = prompt
        state = SharedState(self, len(prompts), longest)
        return state.read(embeds, lengths), state


class SharedState:
    """The rows of a batch on their way; it follows the ``DecodeState`` protocol of ``options.py``.

    Attributes:
        lengths: Tokens that each row has read, prompt included, int64 ``[B]``.
    """

    def __init__(self, decoder: SharedDecoder, rows: int, slots: int) -> None:
        self._decoder = decoder
        self._run = decoder.session.in_place(
            dict(zip(decoder.cache.present_names(), decoder.cache.past_names(), strict=True))
        )
        self._takes_positions = POSITIONS in decoder.session.input_names
        self._held: tuple[int, int] | None = None  # the rows that the session reads and writes
        self._buffers: dict[str, Array] = {}
        self.lengths = np.zeros(rows, np.int64)
        self._make_room(rows, slots + 1)

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return len(self.lengths)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends a token ``[B]`` to each row; the logits ``[B, V]`` of the next."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends k tokens ``[B, k]`` to each row; the logits ``[B, k, V]`` behind each of them.

        In one pass, or in one a row where several rows get several tokens: the kernel takes no batches of those.
        """
        batch, steps = token_ids.shape
        embeds = embedded(self._decoder.table, token_ids, self._decoder.embeds_dtype)
        self._make_room(batch, int(self.lengths.max()) + steps)
        indices = np.arange(steps)[None]
        if steps == 1 or batch == 1:
            logits = self._pass(embeds, self.lengths, 0, np.repeat(indices, batch, axis=0))
        else:
            logits = np.concatenate(
                [
                    self._pass(embeds[row : row + 1], self.lengths[row : row + 1], row, indices)
                    for row in range(batch)
                ]
            )
        self.lengths = self.lengths + steps
        return logits

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Row i forgets what it has read behind its first ``lengths[i]`` tokens (``[B]``, of :attr:`lengths`).

        Raises:
            ValueError: A row has read less than that, or would be left with nothing.
        """
        self.lengths = self.lengths - forgotten(self.lengths, np.asarray(lengths, np.int64))

    def select(self, rows: NDArray[np.int64]) -> None:
        """Row i goes on as old row ``rows[i]``."""
        used = int(self.lengths.max())
        self._make_room(len(rows), used)
        moved = np.flatnonzero(rows != np.arange(len(rows)))
        if len(moved):
            for buffer in self._buffers.values():
                buffer[moved, :, :used] = buffer[rows[moved], :, :used]
        self.lengths = self.lengths[rows]

    def join(self, other: SharedState) -> None:
        """The rows of another state of the same decoder become further rows; that one is used up."""
        first, used = self.batch_size, int(other.lengths.max())
        self._make_room(first + other.batch_size, max(used, int(self.lengths.max())))
        for name, buffer in self._buffers.items():
            buffer[first : first + other.batch_size, :, :used] = other._buffers[name][
                : other.batch_size, :, :used
            ]
        self.lengths = np.concatenate([self.lengths, other.lengths])

    def read(self, embeds: Array, lengths: NDArray[np.int64]) -> NDArray[np.float32]:
        """Reads the first slots of every row.

        Args:
            embeds: ``[B, S, D]``.
            lengths: How many of the S are each row's, ``[B]``.

        Returns:
            Logits ``[B, V]`` behind each row's last.
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
            embeds: ``[B, S, D]``.
            before: Tokens that the rows have read.
            row: The first of them.
            indices: ``[B, K]``, which of the S need logits.
            new: How many of the S are each row's; None for all.
        """
        batch, steps, _ = embeds.shape
        after = before + (steps if new is None else new)
        inputs = {
            "inputs_embeds": embeds,
            "logits_indices": indices,
            LENGTHS: (after - 1).astype(np.int32),
            TOTAL: np.array(int(before.max()) + steps, np.int32),
        }
        if self._takes_positions:
            inputs[POSITIONS] = before[:, None] + np.arange(steps)
        if self._held != (row, batch):
            self._held = row, batch
            self._run.bind({name: array[row : row + batch] for name, array in self._buffers.items()})
        return self._run.run(inputs, "logits", (batch, indices.shape[1], self._decoder.vocabulary))

    def _make_room(self, rows: int, slots: int) -> None:
        """Enlarges the buffers where they have not as many rows or slots."""
        had = next(iter(self._buffers.values())).shape if self._buffers else (0, 0, 0, 0)
        if rows <= had[0] and slots <= had[2]:
            return
        wanted = max(slots, had[2] + had[2] // 2 if slots > had[2] else had[2])
        capacity = max(slots, min(-(-wanted // ROOM) * ROOM + ROOM, self._decoder.max_positions))
        cache, kept = self._decoder.cache, min(self.batch_size, had[0])
        used = min(int(self.lengths.max(initial=0)), had[2])
        for name in cache.past_names():
            buffer = np.empty(
                (max(rows, had[0]), cache.num_heads, capacity, cache.head_dim), self._decoder.cache_dtype
            )
            if kept:
                buffer[:kept, :, :used] = self._buffers[name][:kept, :, :used]
            self._buffers[name] = buffer
        self._held = None
