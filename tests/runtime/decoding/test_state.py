"""Operations on the rows of a batch that every decoding state supports."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import CROSS_MASK
from blip2edge.runtime.decoding.state import SlotState, padded, stacked, tokens_to_drop
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


class Rows(SlotState):
    """A state without a cache; `run` returns the last position of each row and token as the logit of token 0."""

    def make_room(self, steps: int) -> None:
        self.mask = np.pad(self.mask, ((0, 0), (0, steps)), constant_values=1)

    def select_cache(self, rows: NDArray[np.int64]) -> None:
        pass

    def join(self, other: Any) -> None:
        raise NotImplementedError

    def truncate(self, kept: NDArray[np.int64]) -> None:
        raise NotImplementedError

    def run(self, embeds: Array, positions: NDArray[np.int64], wanted: int) -> NDArray[np.float32]:
        self.fed = self.inputs(embeds, positions, wanted)
        return positions[:, :, None].astype(np.float32)


def rows(lengths: list[int], cross: NDArray[np.int64] | None = None) -> Rows:
    longest = max(lengths)
    mask = np.array([[0] * (longest - length) + [1] * length for length in lengths])
    return Rows(SimpleNamespace(embed=lambda ids: ids[:, :, None]), mask, np.array(lengths) - 1, cross)  # type: ignore[arg-type]


def test_positions_and_lengths_grow_with_the_tokens() -> None:
    state = rows([2, 3])
    assert state.lengths.tolist() == [2, 3]
    assert state.step(np.array([7, 8])).tolist() == [[2], [3]]
    assert state.extend(np.array([[1, 2], [3, 4]])).tolist() == [[[3], [4]], [[4], [5]]]
    assert state.lengths.tolist() == [5, 6]
    assert state.fed["position_ids"].tolist() == [[3, 4], [4, 5]]
    assert state.fed["logits_indices"].tolist() == [[0, 1], [0, 1]]
    assert CROSS_MASK not in state.fed


def test_later_tokens_attend_to_the_keys_of_the_last_one() -> None:
    cross = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0, 0, 1]]])
    state = rows([2, 2], cross)
    state.extend(np.array([[1, 2], [3, 4]]))
    assert state.fed[CROSS_MASK].tolist() == cross.tolist()
    state.extend(np.array([[1, 2, 3], [3, 4, 5]]))
    assert state.fed[CROSS_MASK].tolist() == np.repeat(cross[:, -1:], 3, axis=1).tolist()
    state.select(np.array([1, 1]))
    assert state.cross_mask is not None
    assert state.cross_mask.tolist() == [[[0, 0, 1]], [[0, 0, 1]]]


def test_joined_rows_keep_their_keys() -> None:
    first, second = rows([2], np.array([[[1, 0], [0, 1]]])), rows([2], np.array([[[1, 0, 1], [1, 1, 1]]]))
    first.join_rows(second)
    assert first.lengths.tolist() == [2, 2]
    assert first.cross_mask is not None
    assert first.cross_mask.tolist() == [[[0, 1, 0]], [[1, 1, 1]]]
    plain = rows([1])
    plain.join_rows(rows([1]))
    assert plain.cross_mask is None
