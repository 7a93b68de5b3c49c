"""The state of a decoder between two steps: its protocols, and what every form of the KV cache does to rows."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CROSS_MASK
from blip2edge.bundle.token_table import TokenTable


class DecodeState(Protocol):
    """A decoder and its cache, for some rows that all advance by one token a step."""

    @property
    def batch_size(self) -> int:
        """Number of rows B."""

    def step(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append one token [B] to each row; returns the logits [B,V] of the next position."""

    def select(self, rows: NDArray[np.int64]) -> None:
        """Let row i continue old row `rows[i]`; rows may repeat, change places or be dropped."""

    def join(self, other: Any) -> None:
        """Take in the rows of another state of the same decoder, behind its own; the other is used up."""


@runtime_checkable
class GreedyState(Protocol):
    """A state that can choose the likeliest tokens by itself, where the next step need not wait for the last token."""

    def greedy(self, token_ids: NDArray[np.int64]) -> Generator[NDArray[np.int64], None, None]:
        """Appends tokens [B] and gives the likeliest next ones, again and again.

        When it is closed, the state has read all tokens but those that were given last.
        """


@runtime_checkable
class RowState(DecodeState, Protocol):
    """A state that can also read several tokens at once, and forget them."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that each row has read, prompt included, [B]."""

    def extend(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append k tokens [B,k] to each row; returns the logits [B,k,V] behind each of them."""

    def truncate(self, lengths: NDArray[np.int64]) -> None:
        """Let row i forget what it has read behind its first `lengths[i]` tokens."""


def left_padded(
    prompts: Sequence[Array], dtype: np.dtype[np.generic]
) -> tuple[Array, NDArray[np.int64], NDArray[np.int64]]:
    """Prompts as one batch, padded on the left, so that all rows go on in the same slot.

    Args:
        prompts: A ``[S_i, D]`` a row.
        dtype: Of the batch.

    Returns:
        ``[B, S, D]``; ``[B, S]``, 1 where a slot is valid; and the slots' positions ``[B, S]``.
    """
    longest = max(len(prompt) for prompt in prompts)
    embeds = np.zeros((len(prompts), longest, prompts[0].shape[1]), dtype)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        embeds[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return embeds, mask, np.maximum(mask.cumsum(axis=1) - 1, 0)


def embedded(table: TokenTable, token_ids: NDArray[np.int64], dtype: np.dtype[np.generic]) -> Array:
    """The embeddings of tokens ``[B, k]``: ``[B, k, D]``."""
    return table.rows(token_ids.reshape(-1)).reshape(*token_ids.shape, -1).astype(dtype, copy=False)


def forgotten(read: NDArray[np.int64], kept: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many tokens each row forgets where it keeps its first ``kept[i]`` of ``read[i]``, ``[B]``.

    Raises:
        ValueError: A row has read less than that, or would be left with nothing.
    """
    if np.any(read < kept) or np.any(kept < 1):
        raise ValueError(f"rows have read {read.tolist()} tokens: cannot keep {kept.tolist()}")
    return read - kept


def padded(array: Array, axis: int, length: int, *, left: bool = False) -> Array:
    """Zeros behind an array (or before it), so that the axis has that length."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (missing, 0) if left else (0, missing)
    return np.pad(array, widths)


def stacked(name: str, first: Array, second: Array) -> Array:
    """Rows of two contexts one below the other; a shorter one gets keys that the mask hides.

    Args:
        name: Of the decoder's input: keys or values ``[B, H, E, d]``, or their mask ``[B, E]`` or ``[B, S, E]``.
        first: Of the first rows.
        second: Of those behind them.
    """
    axis = -1 if name == CROSS_MASK else 2
    longest = max(first.shape[axis], second.shape[axis])
    return np.concatenate([padded(part, axis, longest) for part in (first, second)])


def check_rows(
    first_logits: NDArray[np.float32], state: DecodeState, prompt_ids: Sequence[Sequence[int]]
) -> None:
    """Raise ValueError where logits, state and prompts are not for the same number of rows, at least one."""
    sizes = (len(first_logits), state.batch_size, len(prompt_ids))
    if first_logits.ndim != 2 or len(set(sizes)) != 1 or sizes[0] < 1:
        raise ValueError(
            f"expected logits [B,V], a state of B rows and B prompts, got logits {list(first_logits.shape)}, "
            f"{sizes[1]} rows and {sizes[2]} prompts"
        )
