"""The launches of a decoder of OPT-2.7b's and Vicuna-7b's sizes: their number, kernels and scratch memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from blip2edge.runtime.cuda.layout import DecoderLayout, LayerLayout, Stored, StoredMatrix, StoredNorm
from blip2edge.runtime.cuda.plan import (
    CacheAddresses,
    RunBuffers,
    RunSizes,
    needed_kernels,
    new_buffers,
    plan_run,
    step_bytes,
    step_launches,
)
from blip2edge.runtime.cuda.weights import DecoderWeights, LayerOnDevice, MatrixWeights, NormWeights
from tests.runtime.cuda.shim_device import ShimDevice

ORIN, H200 = 16, 132  # multiprocessors


def decoder(kind: str, bits: Literal[4, 8, 16]) -> DecoderWeights:
    """Weights of a published size without values: all addresses are 0."""
    layers, width, inner, heads, vocabulary = {
        "opt": (32, 2560, 10240, 32, 50272),
        "llama": (32, 4096, 11008, 32, 32000),
    }[kind]
    table = Stored("", 0, "float16", (2050, width))
    square, vector = StoredMatrix(Stored("", 0, "int8", (width, inner))), Stored("", 0, "float16", (width,))
    norm = StoredNorm("LAYER_NORM" if kind == "opt" else "RMS_NORM", vector, None, 1e-5)
    layer = LayerLayout(norm, square, square, square, square, norm, square, square, square)
    head = StoredMatrix(Stored("", 0, "float16", (width, vocabulary)))
    rotation = None if kind == "opt" else np.zeros((2048, width // heads), np.float32)
    positions = table if kind == "opt" else None
    layout = DecoderLayout(
        width, heads, heads, width // heads, 1.0, 0, positions, 2, rotation, (layer,) * layers, norm, head
    )

    def matrix(depth: int, columns: int) -> MatrixWeights:
        return MatrixWeights(bits, depth, columns, 0 if bits == 16 else 64, "__half", 0, 0, 0)

    onto, up, down = matrix(width, width), matrix(width, inner), matrix(inner, width)
    normed = NormWeights(norm.kind, 0, 0, norm.epsilon)
    gate = up if kind == "llama" else None
    one = LayerOnDevice(normed, onto, onto, onto, onto, normed, gate, up, down)
    return DecoderWeights(layout, (one,) * layers, normed, matrix(width, vocabulary), 0, 0)


def nothing() -> RunBuffers:
    return RunBuffers(0, 0, 0, 0, 0, 0, 0, 0, dict.fromkeys(("query", "key", "value"), 0), 0, (0, 0))


NOWHERE = CacheAddresses((0,) * 32, (0,) * 32)


@pytest.mark.parametrize("multiprocessors", [ORIN, H200])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_a_decode_step_is_seven_launches_a_layer(kind: str, bits: Literal[4, 8, 16], multiprocessors: int) -> None:
    launches = plan_run(decoder(kind, bits), RunSizes(1, 1, 1, 128), nothing(), NOWHERE, multiprocessors)
    assert len(launches) == 1 + 32 * 7 + 2
    assert step_launches(32) == len(launches) - 1 + 1  # the first input is made once, and a token is chosen
    kinds = Counter(launch.kernel.template for launch in launches)
    assert kinds == {"embed": 1, "norm": 65, "gemv": 129, "attention": 32}
    assert max(launch.parts for launch in launches) < 1 << 20
    products = [launch for launch in launches if launch.kernel.template == "gemv"]
    for launch in products:  # blocks for every multiprocessor, as far as K can be cut
        x, y, z = launch.grid
        assert x * y * z >= min(2 * multiprocessors, 40), (launch.kernel.name, launch.grid)
    assert all(launch.kernel.shared + 1024 <= 48 << 10 for launch in launches)


def test_prefill_takes_the_tiled_product_and_the_head_one_row() -> None:
    launches = plan_run(decoder("opt", 4), RunSizes(1, 33, 1, 64), nothing(), NOWHERE, ORIN)
    kinds = Counter(launch.kernel.template for launch in launches)
    assert kinds == {"embed": 1, "norm": 65, "gemm": 128, "gemv": 1, "attention": 32}
    assert launches[-2].grid == (1, 1, 1)  # the last norm: the position that gets logits
    tiled = next(launch for launch in launches if launch.kernel.template == "gemm")
    assert tiled.grid == (2560 // 64, 1, 3)


def test_matrices_of_other_formats_take_launches_of_their_own() -> None:
    weights = decoder("opt", 4)
    first = replace(weights.layers[0], key=replace(weights.layers[0].key, bits=16, block=0))
    mixed = replace(weights, layers=(first, *weights.layers[1:]))
    plain = plan_run(weights, RunSizes(1, 1, 1, 128), nothing(), NOWHERE, ORIN)
    launches = plan_run(mixed, RunSizes(1, 1, 1, 128), nothing(), NOWHERE, ORIN)
    assert len(launches) == len(plain) + 2
    assert [launch.grid[2] for launch in launches[2:5]] == [1, 1, 1]
    assert plain[2].grid[2] == 3


def test_the_kernels_of_a_decoder_cover_its_runs() -> None:
    weights = decoder("llama", 4)
    names = {kernel.name for kernel in needed_kernels(weights)}
    for rows in range(1, 9):
        for steps in (1, 2, 33):
            launches = plan_run(weights, RunSizes(rows, steps, 1, 128), nothing(), NOWHERE, H200)
            assert {launch.kernel.name for launch in launches} <= names


def test_the_bytes_of_a_step_by_hand() -> None:
    """Two layers of 64 channels with 4-bit weights in blocks of 32, biases, and a head in fp32."""

    def matrix(depth: int, width: int) -> StoredMatrix:
        scales = Stored("", 0, "float16", (depth // 32, width))
        return StoredMatrix(Stored("", 0, "int4", (depth, width)), scales, Stored("", 0, "float16", (width,)))

    norm = StoredNorm("RMS_NORM", Stored("", 0, "float16", (64,)), None, 1e-5)
    square = matrix(64, 64)
    layer = LayerLayout(norm, square, square, square, square, norm, None, matrix(64, 128), matrix(128, 64))
    head = StoredMatrix(Stored("", 0, "float32", (64, 300)))
    layout = DecoderLayout(64, 4, 4, 16, 0.25, 0, None, 0, np.zeros((9, 16)), (layer, layer), norm, head)
    weights = 4 * 64 * 64 + 2 * 64 * 128
    layer_bytes = weights // 2 + weights // 32 * 2 + 4 * (4 * 64 + 128 + 64)
    assert step_bytes(layout, 10) == 2 * layer_bytes + 2 * 64 * 300 + 2 * 2 * 2 * 4 * 16 * 10


def test_scratch_memory_grows_with_the_launches() -> None:
    """Attention is cut into more parts for few tokens than for many: buffers of many may be too small for fewer."""
    device, weights = ShimDevice(ORIN), decoder("opt", 4)
    buffers = new_buffers(device, weights, RunSizes(1, 1, 1, 64))
    kept = len(device.memory)
    launches = plan_run(weights, RunSizes(1, 1, 1, 2048), buffers, NOWHERE, H200)
    assert not buffers.holds(launches)
    old = buffers.parts
    buffers.enlarge(device, launches)
    assert buffers.holds(launches)
    assert len(device.memory) == kept
    assert old not in device.memory
    assert set(buffers.addresses) == set(device.memory)
    first, size = max(launch.parts for launch in launches), device.memory[buffers.parts][1]
    assert size == buffers.scratch[0] >= first
    device.close()
