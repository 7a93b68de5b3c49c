"""The portable KV cache: keys and values are inputs and outputs of the graph, and grow with every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import CROSS_MASK, CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.state import padded, stacked, tokens_to_drop
from blip2edge.runtime.text.prompt import left_padded


class GrowingDecoder:
    """A decoder graph and its token table.

    Args:
        session: The loaded graph.
        spec: Its tensors.
        cache: Its keys and values.
        table: The token table.
    """

    max_rows: int | None = None

    def __init__(self, session: Session, spec: GraphSpec, cache: CacheSpec, table: TokenTable) -> None:
        self.session = session
        self.cache = cache
        self.table = table
        dtypes = {tensor.name: tensor.dtype for tensor in spec.inputs}
        self.embeds_dtype = NUMPY_DTYPES[dtypes["inputs_embeds"]]
        self.past_names = cache.past_names()
        self.present_of = dict(zip(self.past_names, cache.present_names(), strict=True))
        self.cache_dtype = NUMPY_DTYPES[dtypes[self.past_names[0]]]

    def embed(self, token_ids: NDArray[np.int64]) -> Array:
        """Rows of the token table for tokens ``[B, k]``: ``[B, k, D]``."""
        return self.table.rows(token_ids).astype(self.embeds_dtype, copy=False)

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], GrowingState]:
        """Runs whole prompts.

        Args:
            prompts: One ``[S_i, D]`` a row; lengths may differ.
            context: Inputs that stay the same from step to step: cross-attention keys and values and their mask.
                Of a mask ``[B, S, E]`` later steps use the last slot's row.

        Returns:
            The logits ``[B, V]`` after each prompt, and the state.
        """
        embeds, mask, positions = left_padded(prompts, self.embeds_dtype)
        empty = np.zeros((len(prompts), self.cache.num_heads, 0, self.cache.head_dim), self.cache_dtype)
        past = dict.fromkeys(self.past_names, empty)
        state = GrowingState(self, past, mask[:, :0], positions[:, -1], dict(context or {}))
        return state.advance(embeds, mask, positions)[:, 0], state


class GrowingState:
    """The rows of a batch: KV cache, valid slots and the position of each row's last token. A ``RowState``."""

    def __init__(
        self,
        decoder: GrowingDecoder,
        past: dict[str, Array],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        context: dict[str, Array],
    ) -> None:
        self._decoder = decoder
        self._context = context
        self._origin = np.arange(len(positions))  # the row of the first batch that each row's context belongs to
        self._past = past
        self._mask = mask
        self._positions = positions

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return len(self._positions)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row in the cache, prompt included, ``[B]``."""
        return self._positions + 1

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends a token ``[B]`` to each row; the logits ``[B, V]`` of the next."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends k tokens ``[B, k]`` to each row in one pass; the logits ``[B, k, V]`` after each of them."""
        batch, steps = token_ids.shape
        positions = self._positions[:, None] + np.arange(1, steps + 1)
        self._positions = positions[:, -1]
        embeds = self._decoder.embed(token_ids)
        return self.advance(embeds, np.ones((batch, steps), np.int64), positions, steps)

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Drops the tokens of row i after its first ``lengths[i]`` (``[B]``).

        Raises:
            ValueError: A row has fewer tokens, or would keep none.
        """
        cut = tokens_to_drop(self.lengths, lengths)
        if not cut.any():
            return
        least, kept = int(cut.min()), self._mask.shape[1] - int(cut.min())
        self._mask = self._mask[:, :kept].copy()
        self._past = {name: array[:, :, :kept] for name, array in self._past.items()}
        shifts = {row: int(by) - least for row, by in enumerate(cut) if by > least}
        if shifts:  # all rows continue in the same slot: shorter rows move to the right
            self._past = {name: array.copy() for name, array in self._past.items()}
        for row, by in shifts.items():
            self._mask[row, by:], self._mask[row, :by] = self._mask[row, : kept - by].copy(), 0
            for array in self._past.values():
                array[row, :, by:] = array[row, :, : kept - by].copy()
        self._positions = np.asarray(lengths, np.int64) - 1
        self._trim()

    def select(self, rows: NDArray[np.int64]) -> None:
        """Row i continues old row ``rows[i]``."""
        if len(rows) == self.batch_size and np.array_equal(rows, np.arange(len(rows))):
            return
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._past = {name: array[rows] for name, array in self._past.items()}
        origin = self._origin[rows]
        if not np.array_equal(origin, self._origin):  # beams of one picture share its context
            self._context = {name: array[rows] for name, array in self._context.items()}
        self._origin = origin
        self._trim()

    def join(self, other: GrowingState) -> None:
        """Adds the rows of another state of the same decoder; the other state is used up."""
        longest = max(self._mask.shape[1], other._mask.shape[1])
        self._mask = np.concatenate([padded(one._mask, 1, longest, left=True) for one in (self, other)])
        self._past = {
            name: np.concatenate([padded(one._past[name], 2, longest, left=True) for one in (self, other)])
            for name in self._past
        }
        self._context = {name: stacked(name, array, other._context[name]) for name, array in self._context.items()}
        self._origin = np.concatenate([self._origin, other._origin + self._origin.max() + 1])
        self._positions = np.concatenate([self._positions, other._positions])

    def _trim(self) -> None:
        """Drops slots that no row uses."""
        unused = int(self._mask.any(axis=0).argmax())
        if unused:
            self._mask = self._mask[:, unused:]
            self._past = {name: array[:, :, unused:] for name, array in self._past.items()}

    def advance(
        self, embeds: Array, mask: NDArray[np.int64], positions: NDArray[np.int64], wanted: int = 1
    ) -> NDArray[np.float32]:
        """Runs the graph on S new slots of every row.

        Args:
            embeds: ``[B, S, D]``.
            mask: ``[B, S]``, 1 where a new slot is valid.
            positions: ``[B, S]``.
            wanted: K, how many of the last slots need logits.

        Returns:
            Logits ``[B, K, V]``.
        """
        batch, steps = mask.shape
        self._mask = np.concatenate([self._mask, mask], axis=1)
        outputs = self._decoder.session.run(
            {
                "inputs_embeds": embeds,
                "attention_mask": self._mask,
                "position_ids": positions,
                "logits_indices": np.tile(np.arange(steps - wanted, steps), (batch, 1)),
                **self._past,
                **self._cross_inputs(steps),
            }
        )
        self._past = {past: outputs[present] for past, present in self._decoder.present_of.items()}
        logits: NDArray[np.float32] = outputs["logits"]
        return logits

    def _cross_inputs(self, steps: int) -> dict[str, Array]:
        """The cross-attention inputs of S new slots; later slots attend as the last one did."""
        mask = self._context.get(CROSS_MASK)
        if mask is None or mask.ndim != 3:
            return self._context
        self._context[CROSS_MASK] = mask[:, -1:]
        if mask.shape[1] == steps:
            return {**self._context, CROSS_MASK: mask}
        return {**self._context, CROSS_MASK: np.repeat(mask, steps, axis=1)}
