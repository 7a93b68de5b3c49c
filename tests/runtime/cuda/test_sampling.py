"""Tokens that the kernels draw at random are those of the host, ``sampling.draw``, for the same random numbers."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.steps import (
    BEST_BYTES,
    CANDIDATES_BYTES,
    LISTED,
    WARPS,
    ChooseArguments,
    SampleArguments,
    sample_kernel,
    score_kernel,
)
from blip2edge.runtime.decoding.sampling import draw, penalize_repetition
from tests.runtime.cuda.shimmed import FORWARD, ORDERS, RANDOM, Memory, Shim

Array = np.ndarray[Any, Any]
SAMPLE = sample_kernel("FLOATS", 16, "__half")
KERNELS = (score_kernel(), SAMPLE)
BROKEN, LEFT_TO_HOST = -1, -2
SLOTS, WIDTH = 9, 32


@dataclass(frozen=True)
class Options:
    """How to draw, as the host's options say it."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


@pytest.fixture(scope="module")
def shim() -> Shim:
    return Shim(KERNELS)


def verify(shim: Shim) -> None:
    """All comparisons, for the mutants."""
    for cuts in (1, 3):
        for options in EVERY:
            compare(shim, 777, cuts, options)
    for options in EVERY:
        compare(shim, 5003, 20, options)
    test_equal_scores_are_kept_together(shim)
    test_a_greedy_row_beside_a_drawn_one_and_rules(shim)
    test_what_the_kernel_leaves_to_the_host(shim)
    test_the_ends_of_the_random_numbers(shim)
    test_a_number_at_the_border_of_two_tokens(shim)
    test_a_nucleus_of_any_size(shim)
    test_scores_of_any_size(shim)
    test_a_penalty_makes_negative_scores_lower(shim)


class Rows:
    """Rows of logits with the buffers of the two kernels."""

    def __init__(self, logits: Array, cuts: int, options: list[Options | None], uniforms: Array) -> None:
        self.memory = memory = Memory()
        rows, vocabulary = logits.shape
        random = np.random.default_rng(1)
        self.logits = memory.put(logits.astype(np.float32))
        self.seen, self.held = (memory.put(np.zeros(logits.shape, np.uint8)) for _ in range(2))
        self.penalty = memory.put(np.ones(rows, np.float32))
        self.held_steps = memory.put(np.zeros(rows, np.int32))
        self.before = memory.put(np.arange(rows, dtype=np.int32) + 2)
        self.tokens, self.logprobs = memory.empty((rows,), np.int32), memory.empty((rows,), np.float32)
        self.table = memory.put(random.normal(0, 1, (vocabulary, WIDTH)).astype(np.float16))
        self.x = memory.empty((rows, WIDTH), np.float32)
        self.parts = memory.empty((rows * cuts * BEST_BYTES,), np.uint8)
        self.arrived = memory.put(np.zeros(rows, np.uint32))
        arrays = (
            self.logits, self.seen, self.penalty, self.held, self.held_steps, self.before, self.tokens, self.logprobs,
            self.table, self.table, None, self.x, self.parts, self.arrived,
        )  # fmt: skip
        places = [None if array is None else array.ctypes.data for array in arrays]
        choose = ChooseArguments(*places, vocabulary, WIDTH, 0, 0, 0)
        given = [option or Options(0.0) for option in options]
        self.uniforms = memory.put(uniforms.astype(np.float64))
        self.scores = memory.empty(logits.shape, np.float32)
        more = (
            memory.put(np.array([1.0 if one.temperature is None else one.temperature for one in given], np.float32)),
            memory.put(np.array([one.top_k or 0 for one in given], np.int32)),
            memory.put(
                np.array([np.float32(1.0 - (1.0 if one.top_p is None else one.top_p)) for one in given], np.float32)
            ),
            self.uniforms,
            self.scores,
            memory.empty((rows, cuts, WARPS), np.float32),
            memory.empty((rows, cuts), np.float64),
        )
        arguments = SampleArguments(choose, *(array.ctypes.data for array in more), uniforms.shape[1])
        self.kept = more
        grid = (cuts, rows, 1)
        self.launches = [Launch(kernel, grid, arguments) for kernel in KERNELS]

    def run(self, shim: Shim, order: int = FORWARD) -> list[int]:
        for launch in self.launches:
            shim.run(launch, order)
        self.memory.check()
        assert not self.arrived.any()
        tokens: list[int] = self.tokens.tolist()
        return tokens


class Fixed:
    """A stream with one number."""

    def __init__(self, uniform: float) -> None:
        self.uniform = uniform

    def random(self) -> float:
        return self.uniform


def host(scores: Array, uniform: float, options: Options) -> int:
    stream: Any = Fixed(uniform)
    return draw(scores.astype(np.float32), stream, options.temperature, options.top_k, options.top_p)


EVERY = (
    Options(),
    Options(0.7),
    Options(1.3, 5),
    Options(None, 50, 0.9),
    Options(0.8, None, 0.6),
    Options(0.5, 1),
    Options(0.9, None, 0.0),  # the likeliest token alone
)


def compare(shim: Shim, vocabulary: int, cuts: int, options: Options) -> None:
    """Several rows at once, each with a number of its own; three steps; the distribution has a few likely tokens."""
    random = np.random.default_rng(vocabulary + cuts)
    rows = 4
    logits = random.normal(0, 3, (rows, vocabulary)).astype(np.float32)
    logits[:, -3] += 6
    uniforms = random.random((rows, SLOTS))
    one = Rows(logits, cuts, [options] * rows, uniforms)
    for step in range(3):
        slots = np.arange(rows) + 2 + step
        assert one.before.tolist() == slots.tolist()
        wanted = [host(logits[row], uniforms[row, slots[row]], options) for row in range(rows)]
        assert one.run(shim, ORDERS[step]) == wanted
        exact = logits.astype(np.float64)
        exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
        assert np.abs(one.logprobs - exact[range(rows), wanted]).max() < 1e-5
        assert np.array_equal(one.x, one.table[wanted].astype(np.float32))
        assert one.held_steps.tolist() == [-step - 1] * rows
        assert one.seen[range(rows), wanted].all()


@pytest.mark.parametrize("options", EVERY, ids=str)
@pytest.mark.parametrize(("vocabulary", "cuts"), [(777, 1), (777, 3), (5003, 20)])
def test_the_hosts_tokens(shim: Shim, vocabulary: int, cuts: int, options: Options) -> None:
    compare(shim, vocabulary, cuts, options)


def test_equal_scores_are_kept_together(shim: Shim) -> None:
    """Four tokens share the third place of top-k, two of which are 0 and -0; top-p keeps the lower ids."""
    logits = np.random.default_rng(2).normal(-9, 1, (4, 1500))
    logits[:, [1400, 3]] = 0.5
    logits[:, [7, 900, 1200, 1499]] = 0.0, -0.0, 0.0, -0.0
    uniforms = np.tile(np.array([0.2, 0.45, 0.6, 0.98])[:, None], (1, SLOTS))
    for options in (Options(None, 3), Options(None, 3, 0.8), Options(None, 6, 0.8), Options(None, 2)):
        wanted = [host(row, at, options) for row, at in zip(logits, uniforms[:, 0], strict=True)]
        for order in ORDERS:
            assert Rows(logits, 3, [options] * 4, uniforms).run(shim, order) == wanted


def test_a_greedy_row_beside_a_drawn_one_and_rules(shim: Shim) -> None:
    """A penalty and a held end token act before the temperature; a row of temperature 0 gets its likeliest token."""
    random = np.random.default_rng(4)
    logits = random.normal(0, 2, (3, 600)).astype(np.float32)
    logits[:, 500], logits[:, 41] = 9.0, 7.0
    uniforms = random.random((3, SLOTS))
    drawn = Options(0.6, 20, 0.9)
    for order in ORDERS:
        one = Rows(logits, 2, [None, drawn, drawn], uniforms)
        one.held[:, 500], one.held_steps[:] = 1, [1, 1, 0]
        one.seen[1:, [41, 5]], one.penalty[1:] = 1, 1.7
        scores = logits.copy()
        for row in (1, 2):
            penalize_repetition(scores[row], np.array([41, 5]), 1.7)
        scores[:2, 500] = -np.inf
        wanted = [41, host(scores[1], uniforms[1, 3], drawn), host(scores[2], uniforms[2, 4], drawn)]
        assert one.run(shim, order) == wanted
        assert wanted[2] == 500


def test_a_penalty_makes_negative_scores_lower(shim: Shim) -> None:
    """The likeliest token, -1, becomes -1.7: below -1.5."""
    logits = np.full((2, 300), -9.0)
    logits[:, [5, 6]] = -1.0, -1.5
    one = Rows(logits, 1, [None, Options(None, 1)], np.zeros((2, SLOTS)))
    one.seen[:, 5], one.penalty[:] = 1, 1.7
    assert one.run(shim) == [6, 6]


def test_what_the_kernel_leaves_to_the_host(shim: Shim) -> None:
    """Too many candidates, an incomplete nucleus, no finite score, no number. NaN is an error."""
    flat, uniforms = np.zeros((1, 4 * LISTED)), np.full((1, SLOTS), 0.5)
    few = np.random.default_rng(0).normal(0, 3, (1, 4 * LISTED))
    cases = [
        (flat, 2, Options(None, 3), LEFT_TO_HOST),  # all tokens share the third place
        (flat[:, :LISTED], 2, Options(None, 3), host(flat[0, :LISTED], 0.5, Options(None, 3))),
        (np.arange(4.0 * LISTED)[None] / 1e5, 8, Options(None, None, 0.99), LEFT_TO_HOST),
        (few / 100, 8, Options(None, None, 0.99), LEFT_TO_HOST),
        *((few, 2, Options(None, k), host(few[0], 0.5, Options(None, k))) for k in (12, 13, 200, LISTED)),
        (few, 2, Options(None, LISTED + 1), LEFT_TO_HOST),
        (np.where(np.arange(600)[None] == 7, np.inf, 0.0), 2, Options(), BROKEN),
        (np.full((1, 600), -np.inf), 2, Options(None, 5), LEFT_TO_HOST),
        (np.where(np.arange(600)[None] == 599, np.nan, 0.0), 2, Options(None, 5), BROKEN),
    ]
    for logits, cuts, options, wanted in cases:
        for order in (FORWARD, RANDOM):
            with np.errstate(all="ignore"):
                assert Rows(logits, cuts, [options], uniforms).run(shim, order) == [wanted], (options, cuts)
    last = Rows(few, 2, [Options()], uniforms[:, :3])
    assert last.run(shim) == [host(few[0], 0.5, Options())]  # slot 2 has a number
    assert last.run(shim) == [LEFT_TO_HOST]  # slot 3 has none


def test_the_ends_of_the_random_numbers(shim: Shim) -> None:
    """The lowest number gives the first kept token, the highest one the last; tokens of weight 0 are never drawn."""
    logits = np.full((2, 900), -np.inf)
    logits[:, [13, 450, 451, 700]] = 1.0, 2.0, 3.0, 0.5
    uniforms = np.tile(np.array([[0.0], [1 - 2.0**-53]]), (1, SLOTS))
    for options in (Options(), Options(None, 4), Options(None, 900), Options(None, None, 0.999)):
        for cuts in (1, 3):
            assert Rows(logits, cuts, [options] * 2, uniforms).run(shim) == [13, 700], options
    for options in (Options(None, 2), Options(None, None, 0.8)):
        assert Rows(logits, 3, [options] * 2, uniforms).run(shim) == [450, 451], options


def test_a_number_at_the_border_of_two_tokens(shim: Shim) -> None:
    """Weights are powers of two, so that sums are exact: a number on a border gives the token after it."""
    logits = np.full((3, 700), -np.inf)
    logits[:, [600, 20, 300, 301]] = np.log(np.array([1.0, 1.0, 1.0, 1.0]))
    uniforms = np.tile(np.array([[0.25], [0.5 - 2.0**-40], [0.5], [0.75]]), (1, SLOTS))
    logits = np.repeat(logits[:1], 4, axis=0)
    for options in (Options(), Options(None, 4), Options(None, 3), Options(None, None, 0.9)):
        for cuts in (1, 2):
            assert Rows(logits, cuts, [options] * 4, uniforms).run(shim) == [300, 300, 301, 600], (options, cuts)
    for options in (Options(None, 4, 0.5), Options(None, None, 0.5)):  # the second token completes the nucleus
        assert Rows(logits, 2, [options] * 4, uniforms).run(shim) == [20, 20, 300, 300], options


def test_scores_of_any_size(shim: Shim) -> None:
    """Weights are relative to the largest score of the own row: exp(710) is infinite, exp(-750) is zero."""
    random = np.random.default_rng(9)
    logits = random.normal(0, 2, (4, 1400)) + np.array([[0.0], [1800.0], [-1800.0], [900.0]])
    logits[3, [1397, 1398]] += 800  # in the last group
    uniforms = random.random((4, SLOTS))
    for options in (Options(), Options(None, 30), Options(None, None, 0.4)):
        wanted = [host(row, uniforms[at, at + 2], options) for at, row in enumerate(logits)]
        assert Rows(logits, 3, [options] * 4, uniforms).run(shim) == wanted, options


def test_a_nucleus_of_any_size(shim: Shim) -> None:
    """Every size from one token on, with and without top-k: the last token that is kept is drawn by a high number."""
    logits = np.random.default_rng(8).normal(0, 2, (6, 1800)).astype(np.float32)
    uniforms = np.full((6, SLOTS), 1 - 2.0**-30)
    for options in (Options(None, 40, 0.01), Options(None, 40, 0.3), Options(None, 40, 0.97), Options(None, None, 0.3)):
        wanted = [host(row, uniforms[0, 0], options) for row in logits]
        assert Rows(logits, 7, [options] * 6, uniforms).run(shim) == wanted, options


def test_the_structure_of_the_candidates_has_this_size() -> None:
    class Candidates(ctypes.Structure):
        _fields_ = [
            ("weights", ctypes.c_double * LISTED), ("order", ctypes.c_ulonglong * LISTED),
            ("sums", ctypes.c_double * 256), ("scratch", ctypes.c_double * WARPS), ("total", ctypes.c_double),
            ("count", ctypes.c_uint), ("flag", ctypes.c_uint), ("place", ctypes.c_int),
        ]  # fmt: skip

    assert ctypes.sizeof(Candidates) == CANDIDATES_BYTES
