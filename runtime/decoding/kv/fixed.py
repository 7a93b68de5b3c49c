"""A KV cache of constant capacity, for graphs whose shapes may not change (CUDA graphs).

``engine/constant_shape.py`` describes the graph's inputs. All rows of a batch continue in the same slot; shorter rows
have masked slots on their left. :class:`SlotCache` moves keys and values, so that the same state serves a cache on a
GPU and one of NumPy arrays, which the tests use.
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


class SlotCache(Protocol):
    """The keys and values of some rows, and the graph that reads and writes them.

    ``[B, H, C, d]`` a layer and kind; what the decoder looks at beside its text is kept here as well.
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
        """The rows of another cache of the same decoder come behind these."""
        ...


OpenCache = Callable[[int, Mapping[str, Array]], SlotCache]
"""Makes an empty cache for B rows, with what they look at beside their text."""


class SlotDecoder:
    """A constant-shape decoder and its token table.

    Args:
        open_cache: Makes the cache of a batch.
        spec: The graph's tensors.
        capacity: C, slots of a row.
        max_rows: The most rows that the graph takes at once.
        table: The token table.
    """

    state_class: type[SlotState]

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
    ) -> tuple[NDArray[np.float32], SlotState]:
        """Runs whole prompts; arguments and result as :meth:`.GrowingDecoder.prefill`.

        Raises:
            BackendError: More rows or longer prompts than the graph was built for.
        """
        self.check(len(prompts), max(len(prompt) for prompt in prompts))
        embeds, valid, positions = left_padded(prompts, self.embeds_dtype)
        batch, longest = valid.shape
        mask = np.ones((batch, self.capacity), np.int64)
        mask[:, :longest] = valid
        looks = dict(context or {})
        per_slot = looks.pop(CROSS_MASK) if _is_per_slot(looks) else None
        state = self.state_class(self, self.open_cache(batch, looks), mask, positions[:, -1], per_slot)
        return state.advance(embeds, positions, 1)[:, 0], state

    def check(self, rows: int, slots: int) -> None:
        """Raises BackendError where the graph has not as many rows or slots."""
        if rows > self.max_rows:
            raise BackendError(
                f"{rows} rows (pictures times beams) are more than the {self.max_rows} that the engine was built for",
                f"lower {option('batch_size')} or {option('num_beams')}, or build again with {option('max_batch')}",
            )
        if slots > self.capacity:
            raise BackendError(
                f"{slots} tokens are more than the {self.capacity} slots that the engine was built for",
                f"shorten the prompt, lower {option('max_new_tokens')}, or build again with {option('capacity')}",
            )


class SlotState:
    """The rows of a batch on their way; it follows the ``DecodeState`` protocol of ``options.py``.

    Attributes:
        slot: The slot that the next token is written to.
    """

    def __init__(
        self,
        decoder: SlotDecoder,
        cache: SlotCache,
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        looks: NDArray[np.int64] | None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.slot = 0
        self.mask = mask
        self.positions = positions
        self._looks = looks

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return len(self.positions)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that each row has read, prompt included, ``[B]``."""
        return self.positions + 1

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends a token ``[B]`` to each row; the logits ``[B, V]`` of the next."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends k tokens ``[B, k]`` to each row in one pass; the logits ``[B, k, V]`` behind each of them."""
        steps = token_ids.shape[1]
        self.make_room(steps)
        positions = self.positions[:, None] + np.arange(1, steps + 1)
        self.positions = positions[:, -1]
        embeds = self.decoder.embed(token_ids)
        return self.advance(embeds, positions, steps)

    def make_room(self, steps: int) -> None:
        """Drops slots that no row uses, where S more would not fit.

        Raises:
            BackendError: They do not fit then either.
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
            if by > least:  # all rows go on in the same slot: what keeps less moves to the right
                self._shift(row, by - least)
        self.positions = np.asarray(lengths, np.int64) - 1

    def select(self, rows: NDArray[np.int64]) -> None:
        """Row i continues old row ``rows[i]``."""
        if len(rows) == self.batch_size and np.array_equal(rows, np.arange(len(rows))):
            return
        self.decoder.check(len(rows), self.slot)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self._looks = None if self._looks is None else self._looks[rows]
        self.cache.select(rows)

    def join(self, other: SlotState) -> None:
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
        if self._looks is not None and other._looks is not None:
            self._looks = stacked(CROSS_MASK, self._looks[:, -1:], other._looks[:, -1:])
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
        if self._looks is not None:
            looks = self._looks
            inputs[CROSS_MASK] = looks if looks.shape[1] == steps else np.repeat(looks[:, -1:], steps, axis=1)
            self._looks = looks[:, -1:]  # what comes looks where the last slot did
        self.slot += steps
        return self.cache.run(inputs)

    def _shift(self, row: int, by: int) -> None:
        """Moves what a row has read; ``self.slot`` is where it ends on the right of both places."""
        length = self.slot - max(by, 0)
        if by > 0:
            self.cache.shift(row, by, length)
            self.mask[row, by : self.slot], self.mask[row, :by] = self.mask[row, :length].copy(), 0
        else:
            self.cache.shift(row, by, length)
            self.mask[row, : length + by] = self.mask[row, -by:length].copy()
            self.mask[row, length + by :] = 1


SlotDecoder.state_class = SlotState


def _is_per_slot(context: Mapping[str, Array]) -> bool:
    """Whether each slot looks at keys of its own: a mask ``[B, S, E]``."""
    return CROSS_MASK in context and context[CROSS_MASK].ndim == 3
