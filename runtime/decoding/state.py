"""The state of a decoder between two steps: its protocols, and the operations on rows that all KV caches share."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CROSS_MASK


class DecodeState(Protocol):
    """A decoder with the KV cache of some rows, which all advance by one token a step."""

    @property
    def batch_size(self) -> int:
        """Number of rows B."""

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token [B] to each row; returns the logits [B,V] of the next position."""

    def select(self, rows: NDArray[np.int64]) -> None:
        """Let row i continue old row `rows[i]`; rows may repeat, change places or be dropped."""

    def join(self, other: Any) -> None:
        """Add the rows of another state of the same decoder after its own; the other state is used up."""


@runtime_checkable
class GreedyState(Protocol):
    """A state that decodes greedily by itself, so that the next step does not wait for the host."""

    def greedy(self, token_ids: NDArray[np.int64]) -> Generator[NDArray[np.int64], None, None]:
        """Appends tokens [B] and yields the likeliest next ones, step by step.

        After closing, the state has processed all tokens but those that were yielded last.
        """


@runtime_checkable
class RowState(DecodeState, Protocol):
    """A state that can also append several tokens in one pass, and drop tokens."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row in the KV cache, prompt included, [B]."""

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append k tokens [B,k] to each row; returns the logits [B,k,V] after each of them."""

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Drop the tokens of row i after its first `lengths[i]`."""


def tokens_to_drop(lengths: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens each row drops where it keeps its first ``kept[i]`` of ``lengths[i]``, ``[B]``.

    Raises:
        ValueError: A row has fewer tokens, or would keep none.
    """
    if np.any(lengths < kept) or np.any(kept < 1):
        raise ValueError(f"rows have {lengths.tolist()} tokens: cannot keep {kept.tolist()}")
    return lengths - kept


def padded(array: Array, axis: int, length: int, *, left: bool = False) -> Array:
    """An array padded with zeros after (or before) its values, so that the axis has that length."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (missing, 0) if left else (0, missing)
    return np.pad(array, widths)


def stacked(name: str, first: Array, second: Array) -> Array:
    """Rows of two cross-attention contexts as one batch; the shorter one is padded with masked keys.

    Args:
        name: Of the decoder's input: keys or values ``[B, H, E, d]``, or their mask ``[B, E]`` or ``[B, S, E]``.
        first: Of the first rows.
        second: Of the rows after them.
    """
    axis = -1 if name == CROSS_MASK else 2
    longest = max(first.shape[axis], second.shape[axis])
    return np.concatenate([padded(part, axis, longest) for part in (first, second)])
