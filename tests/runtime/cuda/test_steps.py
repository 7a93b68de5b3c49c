"""Norms, first input and the choice of tokens against float64 and the rules of greedy decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from blip2edge.calibration.weights.blocks import packed
from blip2edge.runtime.cuda.kernel import Launch
from blip2edge.runtime.cuda.steps import (
    BEST_BYTES,
    NORMS,
    ChooseArguments,
    EmbedArguments,
    MoveArguments,
    NormArguments,
    choose_kernel,
    embed_kernel,
    move_kernel,
    norm_kernel,
)
from tests.runtime.cuda.shimmed import ORDERS, Memory, Shim, ulps

TABLES = (
    choose_kernel("FLOATS", 16, "__half"),
    choose_kernel("FLOATS", 32, "float"),
    choose_kernel("ROWS_OF_INTEGERS", 8, "__half"),
    choose_kernel("ROWS_OF_INTEGERS", 4, "float"),
    choose_kernel("COLUMNS_OF_INTEGERS", 8, "float"),
    choose_kernel("COLUMNS_OF_INTEGERS", 4, "__half"),
)
KERNELS = (*map(norm_kernel, NORMS), embed_kernel("float"), embed_kernel("__half"), *TABLES, move_kernel())


@pytest.fixture(scope="module")
def shim() -> Shim:
    return Shim(KERNELS)


def verify(shim: Shim) -> None:
    """All comparisons, for the mutants."""
    for kind in NORMS:
        for rows in (None, (4, 1)):
            compare_norm(shim, kind, rows)
    for value in ("float", "__half"):
        for learned in (False, True):
            compare_embed(shim, value, learned)
    for index in range(len(TABLES)):
        for cuts in (1, 3):
            compare_choice(shim, index, cuts)
    test_equal_scores_give_the_lowest_token_and_nan_gives_none(shim)
    test_rows_of_a_cache_are_moved(shim)


@pytest.mark.parametrize("rows", [None, (4, 1)], ids=["all", "chosen"])
@pytest.mark.parametrize("kind", NORMS)
def test_norms(shim: Shim, kind: str, rows: tuple[int, ...] | None) -> None:
    compare_norm(shim, kind, rows)


def compare_norm(shim: Shim, kind: str, rows: tuple[int, ...] | None) -> None:
    """One rounding to fp16, although the mean is ten times the deviation."""
    random = np.random.default_rng(3)
    width, epsilon = 300, 1e-2
    memory = Memory()
    x = memory.put(random.normal(0, 0.2, (5, width)).astype(np.float32) + np.float32(2 * (kind == "LAYER_NORM")))
    weight, bias = (memory.put(random.normal(1, 0.3, width).astype(np.float32)) for _ in range(2))
    chosen = memory.put(np.array(rows or (0,), np.int32))
    picked = x.astype(np.float64) if rows is None else x[list(rows)].astype(np.float64)
    centred = picked - picked.mean(axis=1, keepdims=True) if kind == "LAYER_NORM" else picked
    exact = centred / np.sqrt(np.square(centred).mean(axis=1, keepdims=True) + epsilon) * weight
    for shifts in (False, True):
        out = memory.empty(exact.shape, np.float16)
        arguments = NormArguments(
            x.ctypes.data, weight.ctypes.data, bias.ctypes.data if shifts else None,
            None if rows is None else chosen.ctypes.data, out.ctypes.data, width, epsilon,
        )  # fmt: skip
        for order in ORDERS:
            shim.run(Launch(norm_kernel(kind), (len(exact), 1, 1), arguments), order)
            assert ulps(out, exact + bias * shifts, np.float16, 0.1) <= 0.52
    memory.check()


@pytest.mark.parametrize("learned", [False, True], ids=["rotary", "learned"])
@pytest.mark.parametrize("value", ["float", "__half"])
def test_first_input(shim: Shim, value: str, learned: bool) -> None:
    compare_embed(shim, value, learned)


def compare_embed(shim: Shim, value: str, learned: bool) -> None:
    """Rows begin at different positions; the last one is repeated behind the table."""
    random = np.random.default_rng(5)
    steps, width, offset = 3, 270, 2
    memory = Memory()
    given = memory.put(random.normal(0, 1, (2, steps, width)).astype(np.float32 if value == "float" else np.float16))
    table = memory.put(random.normal(0, 1, (8, width)).astype(np.float32))
    before = memory.put(np.array([0, 4], np.int32))
    out = memory.empty((2, steps, width), np.float32)
    arguments = EmbedArguments(
        given.ctypes.data, table.ctypes.data if learned else None, before.ctypes.data, out.ctypes.data,
        steps, width, offset, len(table),
    )  # fmt: skip
    exact = given.astype(np.float32)
    if learned:
        exact = exact + table[[[2, 3, 4], [6, 7, 7]]]
    for order in ORDERS:
        shim.run(Launch(embed_kernel(value), (2 * steps, 1, 1), arguments), order)
        assert np.array_equal(out, exact)
    memory.check()


class Choice:
    """Two rows of logits, with the buffers that the kernel changes."""

    def __init__(self, index: int, logits: np.ndarray[Any, Any], cuts: int) -> None:
        kernel = TABLES[index]
        form, bits, value = kernel.values
        self.memory = memory = Memory()
        random = np.random.default_rng(index)
        rows, vocabulary = logits.shape
        width, block, dtype = 32, 16, np.float16 if value == "__half" else np.float32
        self.logits = memory.put(logits)
        self.seen, self.held = (memory.put(np.zeros(logits.shape, np.uint8)) for _ in range(2))
        self.penalty = memory.put(np.array([1.0, 3.0], np.float32)[:rows])
        self.held_steps = memory.put(np.array([0, 2], np.int32)[:rows])
        self.before = memory.put(np.array([7, 3], np.int32)[:rows])
        self.tokens, self.logprobs = memory.empty((rows,), np.int32), memory.empty((rows,), np.float32)
        self.positions = memory.put(random.normal(0, 1, (11, width)).astype(np.float32))
        self.x = memory.empty((rows, width), np.float32)
        if form == "FLOATS":
            stored: np.ndarray[Any, Any] = random.normal(0, 1, (vocabulary, width)).astype(dtype)
            scales: np.ndarray[Any, Any] = np.zeros(1, dtype)
            self.table = stored.astype(np.float64)
        else:
            integers: np.ndarray[Any, Any] = random.integers(-7, 8, (vocabulary, width)).astype(np.int8)
            scales = random.uniform(0.1, 1, (vocabulary, width // block)).astype(dtype)
            self.table = integers * np.repeat(scales.astype(np.float64), block, axis=1)
            if form == "COLUMNS_OF_INTEGERS":
                integers, scales = integers.T, scales.T
            stored = packed(integers, int(bits)).view(np.uint8)
        arrived = memory.put(np.zeros(rows, np.uint32))
        arrays = (
            self.logits, self.seen, self.penalty, self.held, self.held_steps, self.before, self.tokens, self.logprobs,
            memory.put(stored), memory.put(scales), self.positions, self.x,
            memory.empty((rows * cuts * BEST_BYTES,), np.uint8), arrived,
        )  # fmt: skip
        arguments = ChooseArguments(*(array.ctypes.data for array in arrays), vocabulary, width, block, 2, 11)
        self.launch = Launch(kernel, (cuts, rows, 1), arguments)


@pytest.mark.parametrize("cuts", [1, 3])
@pytest.mark.parametrize("index", range(len(TABLES)), ids=[kernel.name for kernel in TABLES])
def test_choice(shim: Shim, index: int, cuts: int) -> None:
    compare_choice(shim, index, cuts)


def compare_choice(shim: Shim, index: int, cuts: int) -> None:
    """Three steps: penalties change the choice, end tokens are held for two, and everything advances."""
    random = np.random.default_rng(11)
    logits = random.normal(0, 3, (2, 777)).astype(np.float32)
    logits[1, 500] = 20.0  # the end token that is held
    logits[1, 640] = 13.0  # chosen first, then penalised: 4.33
    logits[1, 3], logits[1, 4] = 12.0, -np.inf
    one = Choice(index, logits, cuts)
    one.held[1, 500] = 1
    wanted = [[int(logits[0].argmax()), 640], [int(logits[0].argmax()), 3], [int(logits[0].argmax()), 500]]
    exact = logits.astype(np.float64)
    logprobs = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for step, tokens in enumerate(wanted):
        shim.run(one.launch, ORDERS[step])
        assert one.tokens.tolist() == tokens
        assert np.abs(one.logprobs - logprobs[[0, 1], tokens]).max() < 1e-5
        assert one.held_steps.tolist() == [-step - 1, 1 - step]
        assert one.before.tolist() == [8 + step, 4 + step]
        chosen = {(row, earlier[row]) for earlier in wanted[: step + 1] for row in (0, 1)}
        assert [tuple(pair) for pair in np.argwhere(one.seen).tolist()] == sorted(chosen)
        places = np.minimum(one.before + 2, 10)
        assert ulps(one.x, one.table[tokens] + one.positions[places], np.float32, 8.0) <= 1
    one.memory.check()


def test_equal_scores_give_the_lowest_token_and_nan_gives_none(shim: Shim) -> None:
    for cuts in (1, 2):
        for order in ORDERS:
            logits = np.full((2, 600), -1.0, np.float32)
            logits[0, [301, 45, 599]] = 2.0
            logits[1, 77] = np.nan
            one = Choice(0, logits, cuts)
            shim.run(one.launch, order)
            assert one.tokens.tolist() == [45, -1]


def test_rows_of_a_cache_are_moved(shim: Shim) -> None:
    """Two layers of keys and values, three rows, two heads; each slot has a row of its own, as beams have."""
    random = np.random.default_rng(6)
    shape, used = (4, 3, 2, 170, 16), 160
    slots = np.arange(used)
    memory = Memory()
    source = memory.put(random.normal(0, 1, shape).astype(np.float16))
    origins = memory.put(random.integers(0, 3, (used, 3)).astype(np.int32))
    for order in ORDERS:
        target = memory.empty(shape, np.float16)
        arguments = MoveArguments(source.ctypes.data, target.ctypes.data, origins.ctypes.data, 3, 2, 170 * 2, 2, used)
        shim.run(Launch(move_kernel(), (3 * 2, 4, 1), arguments), order)
        memory.check()
        for row in range(3):
            wanted = source[:, origins[:, row], :, slots]  # [slots, layers, heads, d]
            assert np.array_equal(target[:, row, :, :used], wanted.transpose(1, 2, 0, 3))
        assert np.isnan(target[:, :, :, used:]).all()
