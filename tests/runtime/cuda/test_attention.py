"""Attention over the cache against float64: ragged rows, several new tokens, grouped heads, rotation, windows, cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from blip2edge.runtime.cuda.kernel import Kernel, Launch
from blip2edge.runtime.cuda.steps import AttentionArguments, attention_kernel, heads_of_block, part_bytes
from tests.runtime.cuda.shimmed import ORDERS, Memory, Shim, ulps

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Case:
    """Sizes of a run: head width, query heads of a group, groups, filled slots of each row, new tokens.

    ``shared``: the slots of the rows are in rows of the cache that a table names (beams).
    """

    width: int
    group: int
    heads: int
    before: tuple[int, ...]
    steps: int
    rotary: bool = False
    window: int = 0
    fresh: tuple[int, ...] | None = None
    cuts: int = 1
    shared: bool = False

    @property
    def block(self) -> int:
        return heads_of_block(self.width, self.group)

    @property
    def shares(self) -> int:
        return self.group // self.block

    @property
    def kernel(self) -> Kernel:
        return attention_kernel(self.width, self.block)

    @property
    def grid(self) -> tuple[int, int, int]:
        return (len(self.before) * self.steps, self.heads * self.shares, self.cuts)


CASES = (
    Case(64, 1, 2, (70, 0), 1),
    Case(64, 3, 2, (70, 33), 1, rotary=True, cuts=3),
    Case(80, 2, 1, (45, 3), 1, rotary=True, cuts=4),  # six of sixteen lanes have no channels; empty cuts
    Case(128, 4, 1, (20,), 3, rotary=True, window=6),
    Case(8, 2, 3, (0, 0), 4, rotary=True, fresh=(4, 2)),  # prefill of two prompts
    Case(16, 1, 2, (9, 300), 2, cuts=2),
    Case(256, 8, 1, (5,), 1, rotary=True, cuts=2),  # two blocks of four heads: eight need more shared memory
    Case(8, 10, 2, (3, 0), 2, fresh=(2, 1)),  # two blocks of five heads
    Case(8, 1, 1, (12,), 1, window=1),  # a token that attends to itself alone
    Case(64, 2, 2, (41, 41, 20), 1, rotary=True, cuts=2, shared=True),  # three beams
    Case(16, 1, 3, (37, 9), 3, window=12, fresh=(3, 2), shared=True),
)
KERNELS = tuple(case.kernel for case in CASES)


@pytest.fixture(scope="module")
def shim() -> Shim:
    return Shim(KERNELS)


def verify(shim: Shim) -> None:
    """All comparisons, for the mutants."""
    for case in CASES:
        for order in ORDERS:
            compare(shim, case, order)


def turned(x: Array, rotation: Array, dtype: Any) -> Array:
    """Rotates ``[..., d]`` by cosines and sines ``[d]``. In float32, a key rounds to the same fp16 as the kernel's."""
    half = x.shape[-1] // 2
    real, imaginary = x[..., :half].astype(dtype), x[..., half:].astype(dtype)
    cosine, sine = rotation[:half].astype(dtype), rotation[half:].astype(dtype)
    return np.concatenate([real * cosine - imaginary * sine, imaginary * cosine + real * sine], axis=-1)


def wanted(case: Case, new: list[Array], cache: list[Array], rotation: Array) -> tuple[Array, list[Array]]:
    """The output in float64, and the cache after the run."""
    query, key, value = new
    keys, values = (array.copy() for array in cache)
    out = np.zeros(query.shape)
    for row, before in enumerate(case.before):
        for step in range(case.steps if case.fresh is None else case.fresh[row]):
            slot = before + step
            k, q = key[row, step], query[row, step].astype(np.float64)
            if case.rotary:
                k = turned(k, rotation[slot], np.float32).astype(np.float16)
                q = turned(q, rotation[slot], np.float64)
            keys[row, :, slot], values[row, :, slot] = k, value[row, step]
            first = max(0, slot + 1 - case.window) if case.window else 0
            for head in range(case.heads * case.group):
                seen = np.s_[row, head // case.group, first : slot + 1]
                scores = keys[seen].astype(np.float64) @ q[head] / np.sqrt(case.width)
                weights = np.exp(scores - scores.max())
                out[row, step, head] = weights @ values[seen].astype(np.float64) / weights.sum()
    return out, [keys, values]


def seen_by(cache: Array, case: Case, origins: Array) -> Array:
    """The cache as each row sees it."""
    seen = cache.copy()
    for row, used in enumerate(case.before):
        for slot in range(used):
            seen[row, :, slot] = cache[origins[slot, row], :, slot]
    return seen


def turned_keys(case: Case, new: list[Array], rotation: Array) -> list[Array]:
    """The keys and values that the rows write, ``[B, S, G, d]``."""
    keys = new[1].copy()
    for row, used in enumerate(case.before):
        for step in range(case.steps if case.rotary else 0):
            keys[row, step] = turned(keys[row, step], rotation[used + step], np.float32).astype(np.float16)
    return [keys, new[2]]


def written(cache: Array, case: Case, values: Array) -> Array:
    """The cache after the rows wrote these values to their own rows."""
    after = cache.copy()
    for row, used in enumerate(case.before):
        for step in range(case.steps if case.fresh is None else case.fresh[row]):
            after[row, :, used + step] = values[row, step]
    return after


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.width}x{case.group}x{case.heads}")
def test_attention(shim: Shim, case: Case) -> None:
    for order in ORDERS:
        compare(shim, case, order)


def compare(shim: Shim, case: Case, order: int) -> None:
    """The output has one rounding to fp16 and little more; the cache is equal, and NaN where nothing was written."""
    random = np.random.default_rng(23)
    memory = Memory()
    rows, longest = len(case.before), max(case.before) + case.steps + 2
    sizes = (case.heads * case.group, case.heads, case.heads)
    new = [memory.put(random.normal(0, 1.5, (rows, case.steps, size, case.width)).astype(np.float16)) for size in sizes]
    cache = [memory.empty((rows, case.heads, longest, case.width), np.float16) for _ in range(2)]
    for row, used in enumerate(case.before):  # what lies behind is NaN
        for array in cache:
            array[row, :, :used] = random.normal(0, 1.5, (case.heads, used, case.width))
    angles = np.outer(np.arange(longest), 10.0 ** -np.linspace(0, 2, case.width // 2))
    rotation = memory.put(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    before = memory.put(np.array(case.before, np.int32))
    fresh = memory.put(np.array(case.fresh or case.before, np.int32))
    origins = memory.put(random.permuted(np.tile(np.arange(rows), (longest, 1)), axis=1).astype(np.int32))
    if case.shared:  # every slot of every row is filled, so that a wrong row is not NaN
        for array in cache:
            array[:, :, : min(case.before)] = random.normal(0, 1.5, (rows, case.heads, min(case.before), case.width))
        for row, used in enumerate(case.before):
            origins[min(case.before) : used, row] = row
        exact, _ = wanted(case, new, [seen_by(array, case, origins) for array in cache], rotation)
        filled = [
            written(array, case, values) for array, values in zip(cache, turned_keys(case, new, rotation), strict=True)
        ]
    else:
        exact, filled = wanted(case, new, cache, rotation)
    out = memory.empty(exact.shape, np.float16)
    parts = memory.empty((case.grid[0] * case.grid[1] * case.cuts * part_bytes(case.width, case.block),), np.uint8)
    arrived = memory.put(np.zeros(case.grid[0] * case.grid[1], np.uint32))
    arguments = AttentionArguments(
        *(array.ctypes.data for array in (*new, *cache)), rotation.ctypes.data if case.rotary else None,
        before.ctypes.data, fresh.ctypes.data if case.fresh else None, origins.ctypes.data if case.shared else None,
        out.ctypes.data, parts.ctypes.data, arrived.ctypes.data, rows, case.steps,
        case.heads, case.shares, longest, case.window, case.width**-0.5,
    )  # fmt: skip
    shim.run(Launch(case.kernel, case.grid, arguments), order)
    memory.check()
    assert not arrived.any()
    assert ulps(out, exact, np.float16, 0.1) <= 0.6
    for array, full in zip(cache, filled, strict=True):
        assert np.array_equal(array, full, equal_nan=True)


def test_sizes_without_a_kernel_are_refused() -> None:
    for width, group in ((12, 1), (264, 1), (64, 9), (0, 1), (256, 8)):
        with pytest.raises(ValueError, match=f"no kernel for heads {width} wide"):
            attention_kernel(width, group)


def test_a_block_takes_as_many_heads_as_fit() -> None:
    assert [heads_of_block(64, group) for group in (1, 3, 8, 11, 12, 16, 71)] == [1, 3, 8, 1, 6, 8, 1]
    assert [heads_of_block(256, group) for group in (1, 5, 6, 8)] == [1, 5, 3, 4]
