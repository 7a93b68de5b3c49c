"""The KV cache of exported (not optimized) graphs: inputs and outputs of the graph that grow by a slot in each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CacheSpec, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.backends.base import Session
from blip2edge.runtime.decoding.state import Decoder, SlotState, padded, split_context, stacked, tokens_to_drop
from blip2edge.runtime.text.prompt import left_padded


class GrowingDecoder(Decoder):
    """The decoder of an exported (not optimized) graph, whose KV cache grows by one slot in each step.

    Args:
        session: The loaded graph.
        spec: The graph's inputs and outputs.
        cache: Names and sizes of the graph's key and value tensors.
        table: The token embedding table.
    """

    def __init__(self, session: Session, spec: GraphSpec, cache: CacheSpec, table: TokenTable) -> None:
        super().__init__(spec, table)
        self.session = session
        self.cache = cache
        self.present_of = dict(zip(cache.past_names(), cache.present_names(), strict=True))
        self.cache_dtype = self.dtypes[cache.past_names()[0]]

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], GrowingState]:
        """Runs whole prompts; returns logits ``[B, V]`` and the decoder's state; see :class:`Decoder`."""
        embeds, mask, positions = left_padded(prompts, self.embeds_dtype)
        empty = np.zeros((len(prompts), self.cache.num_heads, 0, self.cache.head_dim), self.cache_dtype)
        state = GrowingState(self, dict.fromkeys(self.present_of, empty), mask, positions[:, -1], context)
        return state.run(embeds, positions, 1)[:, 0], state


class GrowingState(SlotState):
    """The decoding state of a batch; each step makes keys and values that have one slot more than before."""

    decoder: GrowingDecoder

    def __init__(
        self,
        decoder: GrowingDecoder,
        past: dict[str, Array],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        context: Mapping[str, Array] | None,
    ) -> None:
        self._context, cross_mask = split_context(context)
        super().__init__(decoder, mask, positions, cross_mask)
        self._origin = np.arange(len(positions))  # the row of the first batch that each row's context belongs to
        self._past = past

    def make_room(self, steps: int) -> None:
        """Extends the mask by ``steps`` new slots; see :class:`SlotState`."""
        self.mask = np.concatenate([self.mask, np.ones((self.batch_size, steps), np.int64)], axis=1)

    def run_graph(self, inputs: dict[str, Array]) -> NDArray[np.float32]:
        """Runs the graph and keeps the new keys and values; see :class:`SlotState`.

        Returns:
            Logits ``[B, K, V]``, where K is the number of columns of ``logits_indices`` in ``inputs``.
        """
        outputs = self.decoder.session.run({**inputs, **self._past, **self._context})
        self._past = {past: outputs[present] for past, present in self.decoder.present_of.items()}
        logits: NDArray[np.float32] = outputs["logits"]
        return logits

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Keeps the first ``lengths[i]`` tokens of each row i; see :class:`RowState`."""
        cut = tokens_to_drop(self.lengths, lengths)
        if not cut.any():
            return
        least, kept = int(cut.min()), self.mask.shape[1] - int(cut.min())
        self.mask = self.mask[:, :kept].copy()
        self._past = {name: array[:, :, :kept] for name, array in self._past.items()}
        shifts = {row: int(by) - least for row, by in enumerate(cut) if by > least}
        if shifts:  # all rows continue in the same slot: shorter rows move to the right
            self._past = {name: array.copy() for name, array in self._past.items()}
        for row, by in shifts.items():
            self.mask[row, by:], self.mask[row, :by] = self.mask[row, : kept - by].copy(), 0
            for array in self._past.values():
                array[row, :, by:] = array[row, :, : kept - by].copy()
        self.positions = np.asarray(lengths, np.int64) - 1
        self._trim()

    def select_cache(self, rows: NDArray[np.int64]) -> None:
        """Makes row i of the cache a copy of old row ``rows[i]``; see :class:`SlotState`."""
        self._past = {name: array[rows] for name, array in self._past.items()}
        origin = self._origin[rows]
        if not np.array_equal(origin, self._origin):  # beams of one picture share its context
            self._context = {name: array[rows] for name, array in self._context.items()}
        self._origin = origin

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``; see :class:`DecodeState`."""
        super().select(rows)
        self._trim()

    def join(self, other: GrowingState) -> None:
        """Adds the rows of ``other`` after the own rows; see :class:`DecodeState`."""
        longest = max(self.mask.shape[1], other.mask.shape[1])
        self.mask, other.mask = (padded(one.mask, 1, longest, left=True) for one in (self, other))
        self._past = {
            name: np.concatenate([padded(one._past[name], 2, longest, left=True) for one in (self, other)])
            for name in self._past
        }
        self._context = {name: stacked(name, array, other._context[name]) for name, array in self._context.items()}
        self._origin = np.concatenate([self._origin, other._origin + self._origin.max() + 1])
        self.join_rows(other)

    def _trim(self) -> None:
        """Removes the slots that no row uses."""
        unused = int(self.mask.any(axis=0).argmax())
        if unused:
            self.mask = self.mask[:, unused:]
            self._past = {name: array[:, :, unused:] for name, array in self._past.items()}
