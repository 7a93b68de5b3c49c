"""The language model at work: prefill once, then a step a token, the cache carried along."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.contract import CROSS_MASK, CacheSpec, GraphSpec
from blip2edge.runtime.embeddings import TokenTable
from blip2edge.runtime.session import NUMPY_DTYPES, Array, Session


class Decoder:
    """A decoder graph and its token table.

    Args:
        session: The loaded graph.
        spec: Its tensors.
        cache: Its keys and values.
        table: The token table.
    """

    def __init__(self, session: Session, spec: GraphSpec, cache: CacheSpec, table: TokenTable) -> None:
        self.session = session
        self.cache = cache
        self.table = table
        dtypes = {tensor.name: tensor.dtype for tensor in spec.inputs}
        self.embeds_dtype = NUMPY_DTYPES[dtypes["inputs_embeds"]]
        self.cache_dtype = NUMPY_DTYPES[dtypes[cache.past_names()[0]]]

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], DecoderState]:
        """Reads whole prompts.

        Args:
            prompts: A ``[S_i, D]`` a row; lengths may differ.
            context: Further inputs that stay the same from step to step, row by row: keys and values of what
                the decoder looks at beside its text, and their mask; of a mask ``[B, S, E]`` the last slot's row
                goes on.

        Returns:
            The logits ``[B, V]`` behind each prompt, and the state to go on from.
        """
        batch, longest = len(prompts), max(len(prompt) for prompt in prompts)
        embeds = np.zeros((batch, longest, self.table.width), self.embeds_dtype)
        mask = np.zeros((batch, longest), np.int64)
        for row, prompt in enumerate(prompts):  # padded on the left, so that all rows go on in the same slot
            embeds[row, longest - len(prompt) :] = prompt
            mask[row, longest - len(prompt) :] = 1
        positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
        empty = np.zeros((batch, self.cache.num_heads, 0, self.cache.head_dim), self.cache_dtype)
        past = dict.fromkeys(self.cache.past_names(), empty)
        state = DecoderState(self, past, mask[:, :0], positions[:, -1], dict(context or {}))
        return state.advance(embeds, mask, positions), state


class DecoderState:
    """The rows of a batch on their way: cache, valid slots and the position of each row's last token.

    It follows the ``DecodeState`` protocol of ``options.py``.
    """

    def __init__(
        self,
        decoder: Decoder,
        past: dict[str, Array],
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        context: dict[str, Array],
    ) -> None:
        self._decoder = decoder
        self._context = context
        self._origin = np.arange(len(positions))  # the row of the first batch that each row's context is of
        self._past = past
        self._mask = mask
        self._positions = positions

    @property
    def batch_size(self) -> int:
        """Rows B."""
        return len(self._positions)

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends a token ``[B]`` to each row; the logits ``[B, V]`` of the next."""
        embeds = self._decoder.table.rows(token_ids)[:, None].astype(self._decoder.embeds_dtype, copy=False)
        self._positions = self._positions + 1
        return self.advance(embeds, np.ones((len(token_ids), 1), np.int64), self._positions[:, None])

    def select(self, rows: NDArray[np.int64]) -> None:
        """Row i goes on as old row ``rows[i]``."""
        if len(rows) == self.batch_size and np.array_equal(rows, np.arange(len(rows))):
            return
        self._mask, self._positions = self._mask[rows], self._positions[rows]
        self._past = {name: array[rows] for name, array in self._past.items()}
        origin = self._origin[rows]
        if not np.array_equal(origin, self._origin):  # beams of one picture share what they look at
            self._context = {name: array[rows] for name, array in self._context.items()}
        self._origin = origin

    def advance(
        self, embeds: Array, mask: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Runs the graph on S new slots of every row.

        Args:
            embeds: ``[B, S, D]``.
            mask: ``[B, S]``, 1 where a new slot is valid.
            positions: ``[B, S]``.

        Returns:
            Logits ``[B, V]`` behind the last slot.
        """
        batch, steps = mask.shape
        self._mask = np.concatenate([self._mask, mask], axis=1)
        outputs = self._decoder.session.run(
            {
                "inputs_embeds": embeds,
                "attention_mask": self._mask,
                "position_ids": positions,
                "logits_indices": np.full((batch, 1), steps - 1, np.int64),
                **self._past,
                **self._context,
            }
        )
        looks = self._context.get(CROSS_MASK)
        if looks is not None and looks.ndim == 3:  # what comes looks where the last slot did
            self._context[CROSS_MASK] = looks[:, -1:]
        cache = self._decoder.cache
        names = zip(cache.past_names(), cache.present_names(), strict=True)
        self._past = {past: outputs[present] for past, present in names}
        logits: NDArray[np.float32] = outputs["logits"][:, 0]
        return logits
