"""Products with the bundle's weights against float64: each format, a few rows and more, widths of every alignment."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from blip2edge.calibration.weights.blocks import BlockFormat, packed, restored
from blip2edge.runtime.cuda.kernel import KERNELS as KERNELS_FOLDER
from blip2edge.runtime.cuda.products import Matrix, RowProduct
from tests.runtime.cuda.shimmed import FORWARD, ORDERS, RANDOM, REVERSED, Memory, Shim, ulps

WIDE = 160  # more than a tile of every format but one, and no multiple of it

ROWS = RowProduct(16, 70, 104, (72,), out="float")  # two blocks of rows; loads of 16 bytes
CASES = (
    RowProduct(16, 1, 72, (WIDE,), out="float"),
    RowProduct(16, 4, 33, (WIDE, 32, 40)),  # a chunk of one row; narrower matrices
    RowProduct(16, 3, 16, (6,), relu=True),
    RowProduct(16, 1, 300, (7,)),
    RowProduct(8, 1, 128, (WIDE,), 64),
    RowProduct(8, 2, 96, (WIDE, 48), 32, scale="float", out="float"),
    RowProduct(8, 4, 64, (20,), 16, swiglu=True),
    RowProduct(8, 1, 32, (9,), 16),
    RowProduct(4, 1, 256, (WIDE, WIDE), 128, scale="float"),
    RowProduct(4, 2, 64, (288,), 32, swiglu=True, relu=True),
    RowProduct(4, 3, 128, (48,), 64, out="float"),
    RowProduct(4, 4, 1088, (24,), 64),  # more chunks than threads along K
    RowProduct(4, 2, 16, (10,), 16),
    RowProduct(16, 5, 41, (70, 33), relu=True),
    RowProduct(16, 33, 16, (8,), out="float", swiglu=True),
    ROWS,
    RowProduct(8, 34, 64, (65,), 32),
    RowProduct(8, 17, 256, (136,), 64, out="float"),  # three parts of K end within blocks
    RowProduct(4, 6, 144, (96,), 16, scale="float", out="float"),
    RowProduct(4, 40, 48, (7, 66), 16, scale="float", out="float"),  # rows of weights that begin in half a byte
)

KERNELS = tuple(case.kernel for case in CASES)


@pytest.fixture(scope="module")
def shim() -> Shim:
    return Shim(KERNELS)


@dataclass
class Drawn:
    """One matrix: what the kernel gets, and the weights in float64."""

    stored: np.ndarray[Any, Any]
    scales: np.ndarray[Any, Any]
    exact: np.ndarray[Any, Any]
    bias: np.ndarray[Any, Any]
    residual: np.ndarray[Any, Any]


def draw(case: RowProduct, width: int, random: np.random.Generator) -> Drawn:
    bias = random.normal(0, 1, width).astype(np.float32)
    residual = random.normal(0, 1, (case.rows, width)).astype(np.float32)
    if case.bits == 16:
        weight = random.normal(0, 1, (case.depth, width)).astype(np.float16)
        return Drawn(weight, np.zeros(1, np.float16), weight.astype(np.float64), bias, residual)
    form = BlockFormat(case.bits, case.block)
    integers = random.integers(form.low, form.high + 1, (case.depth, width)).astype(np.int8)
    dtype = np.float16 if case.scale == "__half" else np.float32
    scales = random.uniform(0.01, 0.3, (case.depth // case.block, width)).astype(dtype)
    exact = integers.astype(np.float64) * np.repeat(scales.astype(np.float64), case.block, axis=0)
    assert np.allclose(restored(integers, scales.astype(np.float32), form), exact, rtol=1e-6)
    return Drawn(packed(integers, case.bits), scales, exact, bias, residual)


def wanted(case: RowProduct, one: Drawn, x: np.ndarray[Any, Any], gated: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    x = x.astype(np.float64)
    if case.swiglu:
        x = x / (1 + np.exp(-x)) * gated.astype(np.float64)
        x = x if case.few else x.astype(np.float16).astype(np.float64)
    out = x @ one.exact + one.bias
    if case.relu:
        out = np.maximum(out, 0)
    result: np.ndarray[Any, Any] = out + one.residual
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kernel.name)
def test_products(shim: Shim, case: RowProduct) -> None:
    for splits in (1, 3):
        for order in ORDERS:
            compare(shim, case, splits, order)


def verify(shim: Shim) -> None:
    """All comparisons, for the mutants."""
    for case in CASES:
        for splits, order in ((1, FORWARD), (3, REVERSED), (3, RANDOM)):
            compare(shim, case, splits, order)
    for case in (CASES[0], ROWS):
        replace_residual(shim, case)


def compare(shim: Shim, case: RowProduct, splits: int, order: int) -> None:
    """In fp32, 8 ulp of the largest result; in fp16, one rounding. Tensor cores get the product of SwiGLU in fp16."""
    random = np.random.default_rng(17)
    memory = Memory()
    x, gated = (memory.put(random.normal(0, 1, (case.rows, case.depth)).astype(np.float16)) for _ in range(2))
    drawn = [draw(case, width, random) for width in case.widths]
    dtype = np.float32 if case.out == "float" else np.float16
    outs = [memory.empty((case.rows, width), dtype) for width in case.widths]
    parts = memory.empty((case.parts_bytes(splits),), np.uint8)
    arrived = memory.put(np.zeros(case.counters, np.uint32))
    matrices = [
        Matrix(*(memory.put(array).ctypes.data for array in (one.stored, one.scales, one.bias, one.residual)))
        for one in drawn
    ]
    for matrix, out in zip(matrices, outs, strict=True):
        matrix.out = out.ctypes.data
    launch = case.launch(matrices, x.ctypes.data, parts.ctypes.data, arrived.ctypes.data, splits, gated.ctypes.data)
    for _ in range(2 if splits > 1 else 1):  # the counters are zero again after a launch
        shim.run(launch, order)
    memory.check()
    assert not arrived.any()
    for one, out in zip(drawn, outs, strict=True):
        exact = wanted(case, one, x, gated)
        largest = float(np.abs(exact).max())
        bound = 8 if dtype == np.float32 else 0.52
        if case.swiglu and not case.few:  # a product may be rounded to the other neighbour in fp16
            bound = 2.0**11 if dtype == np.float32 else 1.0
        assert ulps(out, exact, dtype, largest if dtype == np.float32 else 0.25) <= bound


@pytest.mark.parametrize("case", [CASES[0], ROWS], ids=["few", "more"])
def test_a_null_bias_and_residual_are_none_and_the_result_may_replace_the_residual(
    shim: Shim, case: RowProduct
) -> None:
    replace_residual(shim, case)


def replace_residual(shim: Shim, case: RowProduct) -> None:
    """Each value gets the residual once, in every order of the blocks, also where K is cut."""
    random = np.random.default_rng(2)
    (width,) = case.widths
    one = draw(case, width, random)
    memory = Memory()
    x = memory.put(random.normal(0, 1, (case.rows, case.depth)).astype(np.float16))
    arrived = memory.put(np.zeros(case.counters, np.uint32))
    weight, parts = memory.put(one.stored).ctypes.data, memory.empty((case.parts_bytes(3),), np.uint8).ctypes.data
    exact = x.astype(np.float64) @ one.exact
    largest = float(np.abs(exact).max())
    for order in ORDERS:
        out = memory.put(one.residual)
        matrix = Matrix(weight=weight, residual=out.ctypes.data, out=out.ctypes.data)
        shim.run(case.launch([matrix], x.ctypes.data, parts, arrived.ctypes.data, 3), order)
        assert ulps(out, exact + one.residual, np.float32, largest) <= 8
        matrix.residual = None
        shim.run(case.launch([matrix], x.ctypes.data, parts, arrived.ctypes.data, 1), order)
        assert ulps(out, exact, np.float32, largest) <= 8
    memory.check()


STREAMED = (RowProduct(4, 1, 256, (2 * WIDE, 64), 128, scale="float"), RowProduct(8, 1, 128, (WIDE,), 64),
            RowProduct(16, 1, 72, (WIDE,), out="float"))  # fmt: skip


@pytest.mark.parametrize("case", STREAMED, ids=lambda case: case.kernel.name)
@pytest.mark.parametrize("splits", [1, 2])
def test_each_weight_is_read_once_in_whole_sectors(shim: Shim, case: RowProduct, splits: int) -> None:
    """A GPU reads memory in sectors of 32 bytes: what a warp loads at once fills them, if rows are whole sectors."""
    random = np.random.default_rng(4)
    memory = Memory()
    drawn = [draw(case, width, random) for width in case.widths]
    x = memory.put(random.normal(0, 1, (1, case.depth)).astype(np.float16))
    outs = [memory.empty((1, width), np.float32 if case.out == "float" else np.float16) for width in case.widths]
    weights = [memory.put(one.stored) for one in drawn]
    matrices = [
        Matrix(weight.ctypes.data, memory.put(one.scales).ctypes.data, 0, 0, out.ctypes.data)
        for weight, one, out in zip(weights, drawn, outs, strict=True)
    ]
    parts = memory.empty((case.parts_bytes(splits),), np.uint8)
    arrived = memory.put(np.zeros(case.counters, np.uint32))
    loads = shim.loads(case.launch(matrices, x.ctypes.data, parts.ctypes.data, arrived.ctypes.data, splits))
    assert set(loads["size"].tolist()) == {case.load}
    wanted = np.concatenate([weight.ctypes.data + np.arange(0, weight.nbytes, case.load) for weight in weights])
    assert np.array_equal(np.sort(loads["address"]), np.sort(wanted).astype(np.uint64))
    together = np.stack([loads[name] for name in ("block", "warp", "number")], axis=1)
    groups, group = np.unique(together, axis=0, return_inverse=True)
    sectors = np.unique(np.stack([group.reshape(-1).astype(np.uint64), loads["address"] // 32], axis=1), axis=0)
    assert len(groups) < len(loads) / 2
    assert len(sectors) * 32 == loads["size"].sum()


def test_the_largest_load_that_fits_is_chosen_and_odd_widths_in_four_bits_are_refused() -> None:
    opt = RowProduct(4, 1, 2560, (2560, 2560, 2560), 128)
    assert (opt.load, opt.lanes, opt.tile, opt.tiles) == (16, 4, 128, 20)
    assert replace(opt, rows=3).load == 8
    assert RowProduct(16, 1, 2560, (50272,)).load == 16
    assert (opt.splits(16), opt.splits(132)) == (1, 3)  # three matrices of 20 tiles; K has 160 chunks for 64 threads
    prompt = replace(opt, rows=40, widths=(2560,))
    assert (prompt.splits(16), prompt.splits(132), replace(prompt, rows=400).splits(132)) == (1, 7, 1)
    with pytest.raises(ValueError, match="no kernel for 4-bit matrices of the widths"):
        _ = RowProduct(4, 1, 16, (9,), 16).kernel
    with pytest.raises(ValueError, match="blocks of 8 rows"):
        RowProduct(4, 1, 16, (8,), 8)


def test_the_operands_of_the_tensor_cores_are_in_order() -> None:
    """PTX does not run here: each operand is named once, in the order of the instruction."""
    text = (KERNELS_FOLDER / "mma.cuh").read_text()
    statements = re.findall(r'"(mma[^"]*)"\s*:([^:]*):([^;]*);', text)
    assert len(statements) == 3
    found = []
    for instruction, changed, given in statements:
        names = re.findall(r"\((\w\[\d\])\)", changed + given)
        numbers = [int(number) for number in re.findall(r"%(\d)", instruction)]
        assert numbers == [*range(len(names)), 0, 1, 2, 3]
        found.append(names)
    sums = [f"c[{i}]" for i in range(4)]
    assert found[0] == [*sums, "a[0]", "a[1]", "a[2]", "a[3]", "b[0]", "b[1]"]
    assert found[1:] == [[*sums, "a[0]", "a[1]", "b[0]"], [*sums, "a[2]", "a[3]", "b[1]"]]
