"""A KV cache of constant capacity, for graphs whose shapes may not change (CUDA graphs).

``constant_shape.py`` and ``in_place.py`` in ``engine/decoder`` describe the graph's inputs. All rows write their next
token to the same slot; shorter rows have masked slots on their left. The keys and values are in a :class:`FixedCache`.
The runtime has such a cache on the GPU, and the tests have one of NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import Axis, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BackendError, option
from blip2edge.runtime.decoding.state import Decoder, SlotState, split_context, tokens_to_drop
from blip2edge.runtime.text.prompt import left_padded

CACHE_POSITION = "cache_position"


class FixedCache(Protocol):
    """The KV cache of a batch, and the graph that reads and writes it.

    For each layer, keys and values are ``[B, H, C, d]``: H heads of width d, and a fixed number C of slots. The cache
    also contains the cross-attention keys and values.
    """

    def run(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """Runs the graph on the cache and on its other ``inputs`` (by name).

        Returns:
            Logits ``[B, K, V]``, where K is the number of columns of ``logits_indices`` in ``inputs``.
        """
        ...

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``."""
        ...

    def shift(self, row: int, by: int, length: int) -> None:
        """Moves the first ``length`` slots of a row ``by`` slots to the right, or to the left if ``by`` is negative."""
        ...

    def append(self, other: Any) -> None:
        """Adds the rows of ``other``, a cache of the same decoder, after the rows of this cache."""
        ...


OpenCache = Callable[[int, Mapping[str, Array]], FixedCache]
"""Type of a function that makes an empty cache, given the number of rows, and cross-attention keys and values by name.
"""


class FixedState(SlotState):
    """The decoding state of a batch whose KV cache has a fixed number of slots.

    Attributes:
        slot: The slot that the next token is written to.
    """

    decoder: FixedDecoder

    def __init__(
        self,
        decoder: FixedDecoder,
        cache: FixedCache,
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        cross_mask: NDArray[np.int64] | None,
    ) -> None:
        super().__init__(decoder, mask, positions, cross_mask)
        self.cache = cache
        self.slot = 0

    def make_room(self, steps: int) -> None:
        """If ``steps`` more slots do not fit, moves all rows to the left, over slots that no row uses.

        Raises:
            BackendError: The cache has too few slots, even after the rows were moved.
        """
        if self.slot + steps <= self.decoder.capacity:
            return
        unused = int(self.mask[:, : self.slot].any(axis=0).argmax())
        if unused:
            for row in range(self.batch_size):
                self._shift(row, -unused)
            self.slot -= unused
        self.decoder.check(self.batch_size, self.slot + steps)

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Keeps the first ``lengths[i]`` tokens of each row i; see :class:`RowState`."""
        cut = tokens_to_drop(self.lengths, lengths)
        least = int(cut.min())
        self.slot -= least
        for row, by in enumerate(cut.tolist()):
            if by > least:  # all rows continue in the same slot: shorter rows move to the right
                self._shift(row, by - least)
        self.positions = np.asarray(lengths, np.int64) - 1

    def select_cache(self, rows: NDArray[np.int64]) -> None:
        """Makes row i of the cache a copy of old row ``rows[i]``; see :class:`SlotState`."""
        self.decoder.check(len(rows), self.slot)
        self.cache.select(rows)

    def join(self, other: FixedState) -> None:
        """Adds the rows of ``other`` after the own rows; see :class:`DecodeState`."""
        self.decoder.check(self.batch_size + other.batch_size, self.slot)
        last = max(self.slot, other.slot)
        for state in (self, other):
            by = last - state.slot
            state.slot = last
            for row in range(state.batch_size if by else 0):
                state._shift(row, by)
        self.join_rows(other)
        self.cache.append(other.cache)

    def run_graph(self, inputs: dict[str, Array]) -> NDArray[np.float32]:
        """Runs the graph and keeps the new keys and values; see :class:`SlotState`.

        Returns:
            Logits ``[B, K, V]``, where K is the number of columns of ``logits_indices`` in ``inputs``.
        """
        inputs[CACHE_POSITION] = self.decoder.cache_position(self.slot, self.batch_size)
        self.slot += inputs["position_ids"].shape[1]
        return self.cache.run(inputs)

    def _shift(self, row: int, by: int) -> None:
        """Moves a row's keys, values and mask ``by`` slots to the right (to the left if negative).

        For a move to the right, ``self.slot`` must already be the slot after the row's last token in its new place. For
        a move to the left, it must still be the slot after the last token in its old place.
        """
        length = self.slot - max(by, 0)
        self.cache.shift(row, by, length)
        if by > 0:
            self.mask[row, by : self.slot], self.mask[row, :by] = self.mask[row, :length].copy(), 0
        else:
            self.mask[row, : length + by] = self.mask[row, -by:length].copy()
            self.mask[row, length + by :] = 1


class FixedDecoder(Decoder):
    """The decoder of a graph with constant shapes, whose KV cache has a fixed number of slots.

    Args:
        open_cache: Makes the KV cache of a batch.
        spec: Inputs and outputs of the graph.
        capacity: C, number of slots of each row in the KV cache.
        max_rows: The largest number of rows in a run of the graph.
        table: The token embedding table.
    """

    state_class: type[FixedState] = FixedState
    max_rows: int

    def __init__(self, open_cache: OpenCache, spec: GraphSpec, capacity: int, max_rows: int, table: TokenTable) -> None:
        super().__init__(spec, table)
        self.open_cache = open_cache
        self.capacity = capacity
        self.max_rows = max_rows
        dims = next((tensor.dims for tensor in spec.inputs if tensor.name == CACHE_POSITION), (1,))
        self._per_row = isinstance(dims[0], Axis)

    def cache_position(self, slot: int, rows: int) -> NDArray[np.int64]:
        """Returns the input ``cache_position`` for B rows: ``[1]``, or ``[B]`` if the graph takes one for each row."""
        return np.full(rows if self._per_row else 1, slot, np.int64)

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], FixedState]:
        """Runs whole prompts; returns logits ``[B, V]`` and the decoder's state; see :class:`Decoder`.

        Raises:
            BackendError: There are more rows or longer prompts than the graph was built for.
        """
        self.check(len(prompts), max(len(prompt) for prompt in prompts))
        embeds, valid, positions = left_padded(prompts, self.embeds_dtype)
        batch, longest = valid.shape
        mask = np.ones((batch, self.capacity), np.int64)
        mask[:, :longest] = valid
        shared, cross_mask = split_context(context)
        state = self.state_class(self, self.open_cache(batch, shared), mask, positions[:, -1], cross_mask)
        return state.run(embeds, positions, 1)[:, 0], state

    def check(self, rows: int, slots: int) -> None:
        """Raises BackendError if the graph was built for fewer than ``rows`` rows or ``slots`` slots."""
        if rows > self.max_rows:
            raise BackendError(
                f"{rows} rows (pictures times beams) are more than the {self.max_rows} rows that the engine was "
                "built for",
                f"lower {option('batch_size')} or {option('num_beams')}, or build the engines again with a larger "
                f"{option('max_batch')}",
            )
        if slots > self.capacity:
            raise BackendError(
                f"{slots} tokens are more than the capacity of {self.capacity} tokens that the engine was built for",
                f"shorten the prompt, lower {option('max_new_tokens')}, or build the engines again with a larger "
                f"{option('capacity')}",
            )
