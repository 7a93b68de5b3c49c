"""Protocols of decoders and of their states, and the code that all kinds of KV cache in ``kv/`` share."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import NUMPY_DTYPES, Array
from blip2edge.bundle.schema import CROSS_MASK, GraphSpec
from blip2edge.bundle.token_table import TokenTable
from blip2edge.runtime.decoding.sampling import StepScores


class DecodeState(Protocol):
    """The decoding state of a batch: each row is one text, whose keys and values are in the KV cache.

    A step appends one token to every row.
    """

    @property
    def batch_size(self) -> int:
        """Returns the number of rows B."""

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token ``[B]`` to each row; returns the logits ``[B, V]`` of the next position."""

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]`` (``[B']``): rows can be repeated, reordered or dropped."""

    def join(self, other: Any) -> None:
        """Adds the rows of ``other``, a state of the same decoder; ``other`` must not be used afterwards."""


ChosenStep = tuple[NDArray[np.int64], NDArray[np.float32]]
"""The tokens that the GPU chose in one step, int64 ``[B]``, and their log-probabilities, float32 ``[B]``."""


@runtime_checkable
class ChoosingState(Protocol):
    """A state in which the GPU chooses tokens (the likeliest, or at random), so that no step waits for the host."""

    @property
    def gives_logprobs(self) -> bool:
        """Returns whether :meth:`choose` can be used; engines of older versions return no log-probabilities."""

    @property
    def draws(self) -> bool:
        """Returns whether :meth:`choose` can also draw tokens at random (:attr:`StepScores.draws`)."""

    def choose(self, token_ids: NDArray[np.int64], rules: Sequence[StepScores]) -> Generator[ChosenStep, None, None]:
        """Appends tokens ``[B]``, then yields the next tokens ``[B]`` step by step, and appends them.

        The generator ends if the GPU cannot choose the next token of a row; then the host must choose. When the
        generator has ended or is closed, the state contains all tokens except the last token of each row.

        Args:
            token_ids: The last token of each row.
            rules: How each row's logits are changed before its token is chosen, and how it is chosen.

        Raises:
            BackendError: The logits of a row contain NaN.
        """


@runtime_checkable
class RowState(DecodeState, Protocol):
    """A decoding state to which several tokens can be appended in one pass, and from which tokens can be removed."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Returns the number of tokens of each row in the KV cache, prompt included, int64 ``[B]``."""

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends k tokens ``[B, k]`` to each row; returns the logits ``[B, k, V]`` after each of them."""

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Keeps the first ``lengths[i]`` tokens of each row i, and removes the rest; ``lengths`` is ``[B]``.

        Raises:
            ValueError: A row has fewer tokens than ``lengths[i]``, or would keep no token.
        """


class Decoder:
    """A decoder graph and its token embedding table: the base class of the decoders with each kind of KV cache.

    Args:
        spec: The graph's inputs and outputs.
        table: The token embedding table.

    Attributes:
        dtypes: dtypes of the graph's inputs, by name.
        embeds_dtype: dtype of the graph's input embeddings.
        max_rows: The largest number of rows in a batch; None for no limit.
    """

    max_rows: int | None = None

    def __init__(self, spec: GraphSpec, table: TokenTable) -> None:
        self.table = table
        self.dtypes = {tensor.name: NUMPY_DTYPES[tensor.dtype] for tensor in spec.inputs}
        self.embeds_dtype = self.dtypes["inputs_embeds"]

    def embed(self, token_ids: NDArray[np.int64]) -> Array:
        """Returns the embeddings ``[B, k, D]`` of k tokens of each row ``[B, k]``, from the token embedding table."""
        return self.table.rows(token_ids).astype(self.embeds_dtype, copy=False)

    def prefill(
        self, prompts: Sequence[Array], context: Mapping[str, Array] | None = None
    ) -> tuple[NDArray[np.float32], RowState]:
        """Runs whole prompts and fills the KV cache.

        Args:
            prompts: One embedded prompt ``[S_i, D]`` for each row i; its length S_i may differ.
            context: Inputs that stay the same from step to step: cross-attention keys and values and their mask.
                If the mask is ``[B, S, E]`` (one row for each of S prompt tokens), later steps use its last row.

        Returns:
            The logits ``[B, V]`` after each prompt, and the decoder's state.
        """
        raise NotImplementedError


class SlotState(RowState):
    """A state in which all rows write the next token to the same slot; shorter rows have masked slots on the left.

    Attributes:
        mask: int64 ``[B, T]`` for T slots, 1 if a slot has a token.
        positions: int64 ``[B]``, the position of each row's last token.
        cross_mask: int64 ``[B, S, E]`` for S new tokens and E cross-attention keys, 1 if the token attends to the key;
            None if all tokens attend to the same keys.
    """

    def __init__(
        self,
        decoder: Decoder,
        mask: NDArray[np.int64],
        positions: NDArray[np.int64],
        cross_mask: NDArray[np.int64] | None,
    ) -> None:
        self.decoder, self.mask, self.positions, self.cross_mask = decoder, mask, positions, cross_mask

    @property
    def batch_size(self) -> int:
        """Returns the number of rows B; see :class:`DecodeState`."""
        return len(self.positions)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Returns the number of tokens of each row in the KV cache, int64 ``[B]``; see :class:`RowState`."""
        return self.positions + 1

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends one token ``[B]`` to each row; returns logits ``[B, V]``; see :class:`DecodeState`."""
        return self.extend(token_ids[:, None])[:, 0]

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Appends tokens ``[B, k]`` to all rows in one pass; returns logits ``[B, k, V]``; see :class:`RowState`."""
        steps = token_ids.shape[1]
        self.make_room(steps)
        positions = self.positions[:, None] + np.arange(1, steps + 1)
        self.positions = positions[:, -1]
        return self.run(self.decoder.embed(token_ids), positions, steps)

    def select(self, rows: NDArray[np.int64]) -> None:
        """Makes row i a copy of old row ``rows[i]``; see :class:`DecodeState`."""
        if len(rows) == self.batch_size and np.array_equal(rows, np.arange(len(rows))):
            return
        self.select_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cross_mask = None if self.cross_mask is None else self.cross_mask[rows]

    def run(self, embeds: Array, positions: NDArray[np.int64], wanted: int) -> NDArray[np.float32]:
        """Runs the graph on S new tokens of every row; returns logits ``[B, wanted, V]`` of the last tokens."""
        return self.run_graph(self.inputs(embeds, positions, wanted))

    def inputs(self, embeds: Array, positions: NDArray[np.int64], wanted: int) -> dict[str, Array]:
        """Makes the graph's inputs for S new tokens of every row, except the KV cache.

        Args:
            embeds: Embeddings of the new tokens, ``[B, S, D]``.
            positions: Positions of the new tokens, int64 ``[B, S]``.
            wanted: K: logits are computed for the last K of the S tokens.
        """
        batch, steps = positions.shape
        inputs = {
            "inputs_embeds": embeds,
            "attention_mask": self.mask,
            "position_ids": positions,
            "logits_indices": np.tile(np.arange(steps - wanted, steps), (batch, 1)),
        }
        if self.cross_mask is not None:
            mask, self.cross_mask = self.cross_mask, self.cross_mask[:, -1:]  # later tokens attend as the last one did
            inputs[CROSS_MASK] = mask if mask.shape[1] == steps else np.repeat(mask[:, -1:], steps, axis=1)
        return inputs

    def join_rows(self, other: SlotState) -> None:
        """Adds masks and positions of another state's rows; the masks of both states must have the same length."""
        self.mask = np.concatenate([self.mask, other.mask])
        self.positions = np.concatenate([self.positions, other.positions])
        if self.cross_mask is not None and other.cross_mask is not None:
            self.cross_mask = stacked(CROSS_MASK, self.cross_mask[:, -1:], other.cross_mask[:, -1:])

    def make_room(self, steps: int) -> None:
        """Makes room for ``steps`` new slots in the mask and in the KV cache."""
        raise NotImplementedError

    def select_cache(self, rows: NDArray[np.int64]) -> None:
        """Makes row i of the cache a copy of old row ``rows[i]``."""
        raise NotImplementedError

    def run_graph(self, inputs: dict[str, Array]) -> NDArray[np.float32]:
        """Runs the graph on ``inputs`` and the KV cache, and keeps the new cache.

        Returns:
            Logits ``[B, K, V]``, where K is the number of columns of ``logits_indices`` in ``inputs``.
        """
        raise NotImplementedError


def split_context(context: Mapping[str, Array] | None) -> tuple[dict[str, Array], NDArray[np.int64] | None]:
    """Divides the cross-attention inputs into those that are equal in all steps, and a mask that depends on the token.

    Returns:
        The inputs that are equal in all steps, by name; and the mask ``[B, S, E]``, which says for each of S tokens to
        which of E keys it attends, or None if all tokens have the same mask.
    """
    shared = dict(context or {})
    own = CROSS_MASK in shared and shared[CROSS_MASK].ndim == 3
    return shared, shared.pop(CROSS_MASK) if own else None


def tokens_to_drop(lengths: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how many tokens each row drops ``[B]``, if row i keeps ``kept[i]`` of its ``lengths[i]`` tokens.

    Raises:
        ValueError: A row has fewer tokens than ``kept[i]``, or would keep no token.
    """
    if np.any(lengths < kept) or np.any(kept < 1):
        raise ValueError(f"rows have {lengths.tolist()} tokens: cannot keep {kept.tolist()}")
    return lengths - kept


def padded(array: Array, axis: int, length: int, *, left: bool = False) -> Array:
    """Pads an array with zeros to ``length`` along ``axis``, at the end or (``left``) at the beginning."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (missing, 0) if left else (0, missing)
    return np.pad(array, widths)


def stacked(name: str, first: Array, second: Array) -> Array:
    """Concatenates the rows of a cross-attention input of two batches; the shorter input is padded with masked keys.

    Args:
        name: Name of the input: E keys or values ``[B, H, E, d]``, or their mask ``[B, E]`` or ``[B, S, E]``.
        first: Values for the first rows.
        second: Values for the rows after them.
    """
    axis = -1 if name == CROSS_MASK else 2
    longest = max(first.shape[axis], second.shape[axis])
    return np.concatenate([padded(part, axis, longest) for part in (first, second)])
