"""The table of rows: a memory that only it reorders has the texts of a memory whose rows are copied."""

from __future__ import annotations

import numpy as np
import pytest

from blip2edge.runtime.cuda.decoding.origins import Origins

SLOTS = 40


class Texts:
    """Rows of numbered tokens, in memory that is copied (``texts``), and in memory with a table."""

    def __init__(self, lengths: list[int], most: int) -> None:
        self.memory = np.zeros((most, SLOTS), np.int64)
        self.origins = Origins()
        self.texts: list[list[int]] = [[] for _ in lengths]
        self.next = 1
        self.moves = 0
        for row, length in enumerate(lengths):
            for _ in range(length):
                self.write(row)

    @property
    def lengths(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.array([len(text) for text in self.texts], np.int64)

    def write(self, row: int) -> None:
        self.memory[row, len(self.texts[row])] = self.next
        self.texts[row].append(self.next)
        self.next += 1

    def step(self) -> None:
        for row in range(len(self.texts)):
            self.write(row)

    def select(self, rows: list[int]) -> None:
        before = self.lengths
        self.texts = [list(self.texts[row]) for row in rows]
        self.settle(self.origins.select(np.array(rows), before))

    def truncate(self, lengths: list[int]) -> None:
        self.texts = [text[:length] for text, length in zip(self.texts, lengths, strict=True)]
        self.settle(self.origins.shorten(self.lengths))

    def settle(self, safe: bool) -> None:
        if not safe:
            table = self.origins.table(int(self.lengths.max()), len(self.memory))
            self.memory[:, : len(table)] = self.memory[table, np.arange(len(table))[:, None]].T
            self.origins.reset()
            self.moves += 1

    def check(self) -> None:
        table = self.origins.table(SLOTS, len(self.memory))
        for row, text in enumerate(self.texts):
            assert [int(self.memory[table[slot, row], slot]) for slot in range(len(text))] == text


def test_beams_are_never_moved() -> None:
    """Two pictures with prompts of one length; their beams are exchanged, and one picture leaves."""
    one = Texts([5, 5], 6)
    random = np.random.default_rng(0)
    one.select([0, 0, 0, 1, 1, 1])
    for _ in range(12):
        one.step()
        one.check()
        one.select([*random.integers(0, 3, 3).tolist(), *random.integers(3, 6, 3).tolist()])
        one.check()
    one.select([3, 4, 5])
    for _ in range(5):
        one.step()
        one.select(random.integers(0, 3, 3).tolist())
        one.check()
    assert one.moves == 0


def test_prompts_of_different_lengths_are_moved_once() -> None:
    """The first beams of the longer prompt would be overwritten by the second beam of the shorter one."""
    one = Texts([3, 6], 4)
    random = np.random.default_rng(1)
    one.select([0, 0, 1, 1])
    one.check()
    for _ in range(8):
        one.step()
        one.select([*random.integers(0, 2, 2).tolist(), *random.integers(2, 4, 2).tolist()])
        one.check()
    assert one.moves == 1


def test_a_shorter_row_does_not_overwrite_what_others_read() -> None:
    one = Texts([6], 2)
    one.select([0, 0])
    one.step()
    one.truncate([3, 7])
    assert one.moves == 1
    one.step()
    one.check()
    two = Texts([6], 2)
    two.select([0, 0])
    two.step()
    two.truncate([7, 4])  # row 1 has no slots that another row reads
    assert two.moves == 0
    two.step()
    two.check()


def test_a_plain_table_stays_plain() -> None:
    one = Texts([4, 4, 4], 3)
    one.truncate([3, 3, 3])
    one.select([0, 1, 2])
    found = [one.origins.plain]
    one.select([1, 2])
    assert [*found, one.origins.plain] == [True, False]
    one.truncate([1, 1])
    one.check()
    assert one.moves == 0


@pytest.mark.parametrize("seed", range(30))
def test_random_selections(seed: int) -> None:
    random = np.random.default_rng(seed)
    one = Texts(random.integers(1, 6, 3).tolist(), 5)
    for _ in range(25):
        what = random.integers(0, 4)
        if what < 2 and one.lengths.max() < SLOTS:
            one.step()
        elif what == 2:
            one.select(random.integers(0, len(one.texts), int(random.integers(1, 6))).tolist())
        else:
            one.truncate([int(random.integers(max(1, length - 3), length + 1)) for length in one.lengths.tolist()])
        one.check()
