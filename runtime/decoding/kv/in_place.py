"""A KV cache that the graph writes in place, for the decoders of optimized copies.

Each layer has one buffer for keys and one for values. Each row's text begins in slot 0 of its row of the buffer: a step
copies no keys and values, dropping tokens only changes a length, and reordering beams copies only the used slots.
``optimization/passes/shared_cache.py`` describes the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.backends.base import InPlaceSession
from blip2edge.runtime.decoding.state import Decoder, tokens_to_drop

LENGTHS = "seqlens_k"
TOTAL = "total_sequence_length"
POSITIONS = "position_ids"
ROOM = 64
"""Capacities are multiples of this number of slots, so that the buffers seldom have to grow."""


class InPlaceDecoder(Decoder):
    """The decoder of a graph that writes its KV cache in place.

    Args:
        session: The loaded graph.
        spec: Inputs and outputs of the portable decoder graph.
        cache: Names and sizes of that graph's key and value tensors.
        table: The token table.
        max_positions: The longest context, in tokens.
    """

    def __init__(
        self,
        session: InPlaceSession,
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
        self.past_of = dict(zip(cache.present_names(), cache.past_names(), strict=True))

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
        state = InPlaceState(self, len(prompts), longest)
        return state.read(embeds, lengths), state


class InPlaceState:
    """The decoding state of a batch with its KV cache buffers; it follows :class:`RowState`.

    Attributes:
        lengths: Number of tokens of each row in the cache, prompt included, int64 ``[B]``.
    """

    def __init__(self, decoder: InPlaceDecoder, rows: int, slots: int) -> None:
        self._decoder = decoder
        self._buffers = decoder.session.in_place(decoder.past_of)
        self._takes_positions = POSITIONS in decoder.session.input_names
        self.lengths = np.zeros(rows, np.int64)
        self._make_room(rows, slots + 1)

    @property
    def batch_size(self) -> int:
        """Number of rows B; see :class:`DecodeState`."""
        return len(self.lengths)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token ``[B]`` to each row; returns logits ``[B, V]``; see :class:`DecodeState`."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends tokens ``[B, k]`` to each row; returns logits ``[B, k, V]``; see :class:`RowState`.

        Several tokens of several rows take one pass for each row, as the kernel requires.
        """
        batch, steps = token_ids.shape
        embeds = self._decoder.embed(token_ids)
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
            embeds: Embedded prompts ``[B, S, D]``.
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
            embeds: ``[B, S, D]``.
            before: Tokens of the rows in the cache.
            row: The first of these rows.
            indices: ``[B, K]``, the slots among the S that need logits.
            new: Valid new tokens of each row; None for S.
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
        return self._buffers.run(inputs, row, "logits", (batch, indices.shape[1], self._decoder.vocabulary))

    def _make_room(self, rows: int, slots: int) -> None:
        """Enlarges the buffers to at least this many rows and slots."""
        had_rows, had = self._buffers.size
        if rows <= had_rows and slots <= had:
            return
        wanted = max(slots, had + had // 2 if slots > had else had)
        capacity = max(slots, min(-(-wanted // ROOM) * ROOM + ROOM, self._decoder.max_positions))
        cache, used = self._decoder.cache, min(int(self.lengths.max(initial=0)), had)
        self._buffers.resize((max(rows, had_rows), cache.num_heads, max(capacity, had), cache.head_dim), used)
