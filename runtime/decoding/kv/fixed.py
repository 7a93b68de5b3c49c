"""A KV cache of constant capacity, for graphs whose shapes may not change (CUDA graphs).

``engine/constant_shape.py`` describes the graph's inputs. The next token of all rows goes to the same slot; shorter
rows have masked slots on their left. A :class:`FixedCache` stores and moves the keys and values, so that the same state
works with a cache on a GPU and with one of NumPy arrays, which the tests use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import CROSS_MASK, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.errors import BackendError, option
from blip2edge.runtime.decoding.state import stacked, tokens_to_drop
from blip2edge.runtime.text.prompt import left_padded

CACHE_POSITION = "cache_position"


class FixedCache(Protocol):
    """The keys and values of some rows, and the graph that reads and writes them.

    ``[B, H, C, d]`` for each layer and kind. The cross-attention keys and values are kept here as well.
    """

    def run(self, inputs: Mapping[str, Array]) -> NDArray[np.float32]:
        """Runs the graph on the cache; ``inputs`` are its other inputs by name. Logits ``[B, K, V]``."""
        ...

    def select(self, rows: NDArray[np.int64]) -> None:
        """Row i continues old row ``rows[i]``."""
        ...

    def shift(self, row: int, by: int, length: int) -> None:
        """The first ``length`` slots of a row move ``by`` slots to the right, or to the left where it is negative."""
        ...

    def append(self, other: Any) -> None:
        """Adds the rows of another cache of the same decoder after its own."""
        ...


OpenCache = Callable[[int, Mapping[str, Array]], FixedCache]
"""Makes an empty cache for B rows, given their cross-attention keys and values by name."""


class FixedDecoder:
    """A constant-shape decoder and its token table.

    Args:
        open_cache: Makes the cache of a batch.
        spec: The graph's tensors.
        capacity: C, slots of a row.
        max_rows: The most rows that the graph takes at once.
        table: The token table.
    """

    state_class: type[FixedState]

    def __init__(self, open_cache: OpenCache, spec: GraphSpec, capacity: int, max_rows: int, table: TokenTable) -> None:
        self.open_cache = open_cache
        self.capacity = capacity
        self.max_rows = max_rows
        self.table = table
        dtypes = {tensor.name: tensor.dtype for tensor in spec.inputs}
        self.embeds_dtype = NUMPY_DTYPES[dtypes["inputs_embeds"]]

    def embed(self, token_ids: NDArray[np.int64]) -> Array:
        """Rows of the token table for tokens ``[B, k]``: ``[B, k, D]``."""
        return self.table.rows(token_ids).astype(self.embeds_dtype, copy=False)

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], FixedState]:
        """Runs whole prompts; arguments and result as :meth:`.GrowingDecoder.prefill`.

        Raises:
            BackendError: More rows or longer prompts than the graph was built for.
        """
        self.check(len(prompts), max(len(prompt) for prompt in prompts))
        embeds, valid, positions = left_padded(prompts, self.embeds_dtype)
        batch, longest = valid.shape
        mask = np.ones((batch, self.capacity), np.int64)
        mask[:, :longest] = valid
        cross = dict(context or {})
        per_token = cross.pop(CROSS_MASK) if _is_per_token(cross) else None
        state = self.state_class(self, self.open_cache(batch, cross), mask, positions[:, -1], per_token)
        return state.advance(embeds, positions, 1)[:, 0], state

    def check(self, rows: int, slots: int) -> None:
        """Raises BackendError where the graph was built for fewer rows or slots."""
        if rows > self.max_rows:
            raise BackendError(
                f"{rows} rows (pictures times beams) are more than the {self.max_rows} that the engine was built for",
                f"lower {option('batch_size')} or {option('num_beams')}, or build again with {option('max_batch')}",
            )
        if slots > self.capacity:
            raise BackendError(
                f"{slots} tokens are more than the capacity of {self.capacity} tokens that the engine was built for",
                f"shorten the prompt, lower {option('max_new_tokens')}, or build again with {option('capacity')}",
            )


class FixedState:
    """The rows of a batch. A ``RowState``.

    Attributes:
        slot: The slot that the next token is written to.
    """

    def __init__(
        self,
        decoder: FixedDecoder,
        cache: FixedCache,
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        cross_mask: NDArray[np.int64] | None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.slot = 0
        self.mask = mask
        self.positions = positions
        self._cross_mask = cross_mask

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return len(self.positions)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row in the cache, prompt included, ``[B]``."""
        return self.positions + 1

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends a token ``[B]`` to each row; the logits ``[B, V]`` of the next."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends k tokens ``[B, k]`` to each row in one pass; the logits ``[B, k, V]`` after each of them."""
        steps = token_ids.shape[1]
        self.make_room(steps)
        positions = self.positions[:, None] + np.arange(1, steps + 1)
        self.positions = positions[:, -1]
        embeds = self.decoder.embed(token_ids)
        return self.advance(embeds, positions, steps)

    def make_room(self, steps: int) -> None:
        """Drops slots that no row uses, where ``steps`` more would not fit.

        Raises:
            BackendError: They still do not fit.
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
        """Drops the tokens of row i after its first ``lengths[i]`` (``[B]``).

        Raises:
            ValueError: A row has fewer tokens, or would keep none.
        """
        cut = tokens_to_drop(self.lengths, lengths)
        least = int(cut.min())
        self.slot -= least
        for row, by in enumerate(cut.tolist()):
            if by > least:  # all rows continue in the same slot: shorter rows move to the right
                self._shift(row, by - least)
        self.positions = np.asarray(lengths, np.int64) - 1

    def select(self, rows: NDArray[np.int64]) -> None:
        """Row i continues old row ``rows[i]``."""
        if len(rows) == self.batch_size and np.array_equal(rows, np.arange(len(rows))):
            return
        self.decoder.check(len(rows), self.slot)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self._cross_mask = None if self._cross_mask is None else self._cross_mask[rows]
        self.cache.select(rows)

    def join(self, other: FixedState) -> None:
        """Adds the rows of another state of the same decoder; the other state is used up."""
        self.decoder.check(self.batch_size + other.batch_size, self.slot)
        last = max(self.slot, other.slot)
        for state in (self, other):
            by = last - state.slot
            state.slot = last
            for row in range(state.batch_size if by else 0):
                state._shift(row, by)
        self.mask = np.concatenate([self.mask, other.mask])
        self.positions = np.concatenate([self.positions, other.positions])
        if self._cross_mask is not None and other._cross_mask is not None:
            self._cross_mask = stacked(CROSS_MASK, self._cross_mask[:, -1:], other._cross_mask[:, -1:])
        self.cache.append(other.cache)

    def advance(self, embeds: Array, positions: NDArray[np.int64], asked: int) -> NDArray[np.float32]:
        """Runs the graph on S new slots of every row.

        Args:
            embeds: ``[B, S, D]``.
            positions: ``[B, S]``.
            asked: K, how many of the last slots need logits.

        Returns:
            Logits ``[B, K, V]``.
        """
        batch, steps = positions.shape
        inputs: dict[str, Array] = {
            "inputs_embeds": embeds,
            "attention_mask": self.mask,
            "position_ids": positions,
            "logits_indices": np.tile(np.arange(steps - asked, steps), (batch, 1)),
            CACHE_POSITION: np.array([self.slot], np.int64),
        }
        if self._cross_mask is not None:
            cross = self._cross_mask
            inputs[CROSS_MASK] = cross if cross.shape[1] == steps else np.repeat(cross[:, -1:], steps, axis=1)
            self._cross_mask = cross[:, -1:]  # later tokens attend as the last one did
        self.slot += steps
        return self.cache.run(inputs)

    def _shift(self, row: int, by: int) -> None:
        """Moves a row's tokens by some slots. ``self.slot`` is where the old or the new place ends, the larger one."""
        length = self.slot - max(by, 0)
        if by > 0:
            self.cache.shift(row, by, length)
            self.mask[row, by : self.slot], self.mask[row, :by] = self.mask[row, :length].copy(), 0
        else:
            self.cache.shift(row, by, length)
            self.mask[row, : length + by] = self.mask[row, -by:length].copy()
            self.mask[row, length + by :] = 1


FixedDecoder.state_class = FixedState


def _is_per_token(context: Mapping[str, Array]) -> bool:
    """Whether each token attends to keys of its own: a mask ``[B, S, E]``."""
    return CROSS_MASK in context and context[CROSS_MASK].ndim == 3
