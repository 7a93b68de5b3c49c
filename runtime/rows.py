"""Rows of a batch, side by side: what every decoding state does to them, wherever its cache lies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.contract import CROSS_MASK
from blip2edge.runtime.embeddings import TokenTable
from blip2edge.runtime.session import Array


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
