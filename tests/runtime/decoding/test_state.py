"""Operations on the rows of a batch that every decoding state supports."""

from __future__ import annotations

import numpy as np
import pytest

from blip2edge.bundle.schema import CROSS_MASK
from blip2edge.runtime.decoding.state import padded, stacked, tokens_to_drop
from blip2edge.runtime.text.prompt import left_padded


def test_prompts_end_in_the_same_slot() -> None:
    embeds, mask, positions = left_padded([np.ones((1, 2)), np.full((3, 2), 2.0)], np.dtype(np.float32))
    assert embeds.dtype == np.float32
    assert embeds[:, :, 0].tolist() == [[0, 0, 1], [2, 2, 2]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert positions.tolist() == [[0, 0, 0], [0, 1, 2]]


@pytest.mark.parametrize(
    ("name", "shapes", "axis"),
    [
        ("cross.0.key", ((1, 2, 3, 4), (2, 2, 5, 4)), 2),
        (CROSS_MASK, ((1, 3), (2, 5)), 1),
        (CROSS_MASK, ((1, 1, 3), (2, 1, 5)), 2),
    ],
    ids=["keys", "mask of keys", "mask of slots"],
)
def test_what_is_shorter_gets_keys_that_count_nothing(
    name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], axis: int
) -> None:
    first, second = (np.ones(shape) for shape in shapes)
    for one, other in ((first, second), (second, first)):
        rows = stacked(name, one, other)
        whole = (3, *second.shape[1:])
        assert rows.shape == whole
        short = rows[: len(one)] if one is first else rows[len(one) :]
        assert short.take(range(3), axis).all()
        assert not short.take(range(3, 5), axis).any()
    assert padded(first, axis, 4, left=True).take(0, axis).any() == np.False_


def test_no_row_keeps_more_than_it_has_read_or_nothing() -> None:
    read = np.array([4, 6])
    assert tokens_to_drop(read, np.array([4, 1])).tolist() == [0, 5]
    for kept in ([5, 6], [4, 0]):
        with pytest.raises(ValueError, match="cannot keep"):
            tokens_to_drop(read, np.array(kept))
