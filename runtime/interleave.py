"""Pictures between texts, for decoders that look at them from between their layers (Flamingo).

A picture takes no slots there: a marker stands for it in the text, and every token looks at the last picture before
it. Few-shot prompts are such texts: ``<image>A cat.<image>A dog.<image>A``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from blip2edge.contract import MARKERS, PromptSpec
from blip2edge.errors import UsageError
from blip2edge.runtime.frames import ItemSource
from blip2edge.runtime.preprocess import ImageSource
from blip2edge.runtime.session import Array

NONE = -1
"""What a token looks at before the first picture."""


def separate(items: Sequence[ItemSource]) -> list[list[ImageSource]]:
    """The pictures of each item, one or several.

    Raises:
        UsageError: An item has none.
    """
    groups = [list(item) if isinstance(item, (list, tuple)) else [item] for item in items]
    if not all(groups):
        raise UsageError("expected at least one picture for every prompt, got none")
    return groups  # type: ignore[return-value]  # preprocessing refuses what is no picture


def weave(spec: PromptSpec, text: str, pictures: int) -> str:
    """The text with a marker a picture, as transformers' IdeficsProcessor writes it.

    Args:
        spec: The template, and the tokens that stand for a picture.
        text: With a marker of :data:`MARKERS` a picture; with none it goes into the template, and all pictures
            stand where that has one. Spaces around a picture are dropped.
        pictures: How many there are.

    Raises:
        UsageError: There are more or fewer markers than pictures.
    """
    parts = _split(text)
    if len(parts) == 1:
        before, _, after = spec.template.partition(MARKERS[0])
        parts = _split(before + MARKERS[0] * pictures + after)
        parts = [part.replace("{prompt}", text) for part in parts]
    if len(parts) - 1 != pictures:
        raise UsageError(
            f"the prompt has {len(parts) - 1} places for pictures, but there are {pictures}",
            f"write {MARKERS[1]} where each picture stands, or give a prompt without it",
        )
    woven = parts[0].strip(" ")
    after_picture = False
    for part in parts[1:]:
        begin = "" if after_picture else spec.around_picture
        woven += begin + spec.picture_token + spec.around_picture + part.strip(" ")
        after_picture = not part.strip(" ")
    return woven


def _split(text: str) -> list[str]:
    for marker in MARKERS:
        text = text.replace(marker, MARKERS[0])
    return text.split(MARKERS[0])


def looks_at(ids: Sequence[int], picture_id: int, end_id: int | None) -> tuple[int, ...]:
    """Which picture each token looks at: the last one, its own marker's included; behind an end token none."""
    looks: list[int] = []
    count, at = 0, NONE
    for token in ids:
        if token == picture_id:
            at, count = count, count + 1
        looks.append(at)
        if token == end_id:
            at = NONE
    return tuple(looks)


def pack(array: Array, counts: Sequence[int]) -> Array:
    """What was made of all pictures, side by side for each item.

    Args:
        array: ``[N, Q, D]``, one item's pictures after the other's.
        counts: How many each of the B items has; together N.

    Returns:
        ``[B, max(counts) * Q, D]``, zeros behind those of an item with fewer.
    """
    _, slots, width = array.shape
    packed = np.zeros((len(counts), max(counts), slots, width), array.dtype)
    start = 0
    for row, count in enumerate(counts):
        packed[row, :count] = array[start : start + count]
        start += count
    return packed.reshape(len(counts), -1, width)


def look_mask(looks: Sequence[Sequence[int]], pictures: int, keys: int) -> NDArray[np.int64]:
    """The decoder's ``cross_attention_mask``.

    Args:
        looks: From :func:`looks_at`, a row each.
        pictures: The largest number of pictures of a row.
        keys: E, their slots.

    Returns:
        ``[B, S, E]``, padded on the left as the prompts are.
    """
    longest = max(map(len, looks))
    owner = np.arange(keys) // (keys // pictures)  # which picture a key is of
    mask = np.zeros((len(looks), longest, keys), np.int64)
    for row, chosen in enumerate(looks):
        mask[row, longest - len(chosen) :] = np.array(chosen, np.int64)[:, None] == owner
    return mask
