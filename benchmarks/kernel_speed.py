"""Times the kernels of a decoder of published size, with random weights; part 3 of ``gpu.py`` runs this script.

    python benchmarks/kernel_speed.py build/gpu-kernels     # the folder of gpu_kernels.py; prints one JSON object

It needs the driver, ``cuda-bindings`` and NumPy. It runs in a process of its own and does
not import torch, so that the time from the start of the process to the first token can be measured.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from reporting import ROOT, parser_of

sys.path.insert(0, str(ROOT))  # the simulated GPU of the tests

from blip2edge.cli import run_script
from blip2edge.runtime.cuda.decoding.decoder import ChoosingRun
from blip2edge.runtime.cuda.decoding.session import KernelBuffers, KernelSession
from blip2edge.runtime.cuda.device.driver import DriverDevice, load_driver
from blip2edge.runtime.cuda.device.interface import KernelDevice
from blip2edge.runtime.cuda.kernel import Kernel
from blip2edge.runtime.cuda.layout import DecoderLayout, LayerLayout, Stored, StoredMatrix, StoredNorm
from blip2edge.runtime.cuda.plan import needed_kernels, step_bytes, step_launches
from blip2edge.runtime.cuda.token_table import TableFormat, TableOnDevice
from blip2edge.runtime.cuda.weights import (
    DecoderWeights,
    LayerOnDevice,
    MatrixWeights,
    NormWeights,
    planned_weights,
)
from blip2edge.runtime.decoding.kv.in_place import LENGTHS, TOTAL
from blip2edge.runtime.decoding.sampling import Draws, StepScores

BITS: tuple[Literal[4, 8, 16], ...] = (16, 8, 4)
BLOCK = 64
TABLE = TableFormat("FLOATS", 16, "__half")
PROMPT, TOKENS = 40, 192  # 32 visual tokens and a short prompt
PLAIN = [StepScores(np.zeros(0, np.int64), 1.0)]
DRAWN = StepScores(PLAIN[0].seen, draws=Draws(0.8, 50, 0.9, np.random.default_rng(3).random(2 * TOKENS)))


@dataclass(frozen=True)
class Size:
    """The sizes of a decoder like OPT: numbers of layers, heads and tokens, widths of layer and feed-forward."""

    layers: int
    width: int
    inner: int
    heads: int
    vocabulary: int

    def layout(self, bits: Literal[4, 8, 16]) -> DecoderLayout:
        """Describes the decoder with weights of ``bits`` bits, without files: names and offsets of files are empty."""
        width, inner, dtype = self.width, self.inner, {16: "float16", 8: "int8", 4: "int4"}[bits]

        def matrix(depth: int, columns: int) -> StoredMatrix:
            scales = None if bits == 16 else Stored("", 0, "float16", (depth // BLOCK, columns))
            return StoredMatrix(Stored("", 0, dtype, (depth, columns)), scales, Stored("", 0, "float32", (columns,)))

        vector = Stored("", 0, "float32", (width,))
        norm, square = StoredNorm("LAYER_NORM", vector, vector, 1e-5), matrix(width, width)
        layer = LayerLayout(
            norm, square, square, square, square, norm, None, matrix(width, inner), matrix(inner, width)
        )
        positions, head_dim = Stored("", 0, "float32", (2050, width)), width // self.heads
        head = StoredMatrix(Stored("", 0, "float16", (width, self.vocabulary)))
        return DecoderLayout(
            width, self.heads, self.heads, head_dim, head_dim**-0.5, 0, positions, 2, None, (layer,) * self.layers,
            norm, head,
        )  # fmt: skip


OPT_2_7B, TINY = Size(32, 2560, 10240, 32, 50272), Size(2, 64, 128, 4, 300)


def kernels_of(size: Size) -> list[Kernel]:
    """Returns the kernels of the decoder in every format."""
    found = [kernel for bits in BITS for kernel in needed_kernels(planned_weights(size.layout(bits)), (1, 5))]
    return list({kernel.name: kernel for kernel in (*found, *TABLE.kernels)}.values())


def measure(cubins: Path, dry: bool) -> dict[str, Any]:
    """Times a decode step in each format, and compares the time with the GPU's measured bandwidth.

    The weights are random, and the batch has one row. ``queued``: all steps are launched before the host waits.
    ``paced``: the host reads each token while the next one is computed, as `caption` does. ``drawn``: as ``queued``,
    with top-k 50 and top-p 0.9. With the first format, the time from the start of the process to the first token is
    measured too, without the reading of weights.

    Args:
        cubins: Folder with the compiled kernels.
        dry: Whether this is a dry run.
    """
    size, found, rate = TINY if dry else OPT_2_7B, {}, 0.0
    for bits in BITS:
        device = opened(dry, cubins, size)
        rate = rate or bandwidth(device, (1 if dry else 1024) << 20)
        found[f"{bits} bits"] = timed(device, size, bits, rate, 4 if dry else TOKENS)
    first_s = found["16 bits"].pop("first_token_s")
    return {"bandwidth": rate, "process_to_first_token_s_without_weights": first_s, **found}


def opened(dry: bool, folder: Path, size: Size) -> DriverDevice:
    """Opens the GPU with the kernels of a size."""
    from blip2edge.runtime.cuda.copy_files import find_cubin

    if dry:
        from tests.runtime.cuda.fake_driver import CUBIN, FakeDriver

        device = DriverDevice(FakeDriver(kernels_of(size)))
        device.load(CUBIN)
        return device
    device = DriverDevice(load_driver())
    device.load(find_cubin(folder, device.capability).read_bytes())
    return device


def bandwidth(device: KernelDevice, size: int) -> float:
    """Measures copies on the GPU in bytes a second; a byte counts twice, because it is read and written."""
    source, target = device.allocate(size), device.allocate(size)
    best = np.inf
    for _ in range(4):  # the first one warms up
        device.read(source, (1,), np.uint8)
        start = time.perf_counter()
        for _ in range(8):
            device.copy_rows(target, size, source, size, size, 1)
        device.read(target, (1,), np.uint8)
        best = min(best, time.perf_counter() - start)
    device.free(source)
    device.free(target)
    return float(8 * 2 * size / best)


def timed(device: DriverDevice, size: Size, bits: Literal[4, 8, 16], rate: float, tokens: int) -> dict[str, Any]:
    """Times the decoder in one format; closes the device."""
    layout = size.layout(bits)
    start = time.perf_counter()
    weights, table = random_weights(device, layout)
    device.read(table.address, (1,), np.uint8)
    loaded_s = time.perf_counter() - start
    session = KernelSession(weights, device)
    buffers = session.in_place({})
    capacity = PROMPT + 2 * tokens + 8
    buffers.resize((1, layout.kv_heads, capacity, layout.head_dim), 0)
    first_prefill = _prefill(buffers, layout)
    run = ChoosingRun(session, table, 1)
    run.begin(PLAIN, np.array([PROMPT]))
    random = np.random.default_rng(1)
    embeds = random.normal(0, 0.1, (1, 1, layout.width)).astype(np.float32)
    run.put(embeds, np.array([PROMPT]), buffers.addresses(0), capacity)
    run.step()()
    first_token_s = process_seconds() - loaded_s
    for _ in range(3):  # the second one captures
        run.step()()
    start = time.perf_counter()
    waiting = [run.step() for _ in range(tokens)]
    for wait in waiting:
        wait()
    queued = (time.perf_counter() - start) / tokens
    start = time.perf_counter()
    waiting = [run.step()]
    for _ in range(tokens - 1):
        waiting.append(run.step())
        waiting.pop(0)()
    waiting.pop()()
    paced = (time.perf_counter() - start) / tokens
    run.begin([DRAWN], np.array([PROMPT]))  # tokens are drawn: top-k and top-p on the GPU
    run.put(embeds, np.array([PROMPT]), buffers.addresses(0), capacity)
    for _ in range(3):
        run.step()()
    start = time.perf_counter()
    waiting = [run.step() for _ in range(tokens)]
    for wait in waiting:
        wait()
    drawn = (time.perf_counter() - start) / tokens
    prefill = min(_prefill(buffers, layout) for _ in range(3))
    needed = step_bytes(layout, PROMPT + tokens)
    session.close()
    return {
        "bytes": needed,
        "launches": step_launches(len(layout.layers)),
        "queued_ms": queued * 1e3,
        "paced_ms": paced * 1e3,
        "drawn_ms": drawn * 1e3,
        "share_of_bandwidth": needed / queued / rate,
        "paced_share_of_bandwidth": needed / paced / rate,
        "first_prefill_ms": first_prefill * 1e3,
        "prefill_ms": prefill * 1e3,
        "weights_s": loaded_s,
        "first_token_s": first_token_s,
    }


def _prefill(buffers: KernelBuffers, layout: DecoderLayout) -> float:
    """Returns the seconds of a prefill."""
    embeds = np.random.default_rng(2).normal(0, 0.1, (1, PROMPT, layout.width)).astype(np.float32)
    inputs = {
        "inputs_embeds": embeds,
        "logits_indices": np.array([[PROMPT - 1]]),
        LENGTHS: np.array([PROMPT - 1], np.int32),
        TOTAL: np.array(PROMPT, np.int32),
    }
    start = time.perf_counter()
    buffers.run(inputs, 0, "logits", (1, 1, layout.vocabulary))
    return time.perf_counter() - start


def random_weights(device: KernelDevice, layout: DecoderLayout) -> tuple[DecoderWeights, TableOnDevice]:
    """Fills a decoder's weights, and its token table, with random values; every matrix has memory of its own."""
    random = np.random.default_rng(0)
    halves = random.normal(0, 0.02, 1 << 22).astype(np.float16)
    integers = random.integers(0, 256, 1 << 23, dtype=np.uint8)

    def filled(size: int, pattern: np.ndarray[Any, Any]) -> int:
        address, raw = device.allocate(size), pattern.view(np.uint8)
        for start in range(0, size, raw.size):
            device.write(address + start, raw[: size - start])
        return address

    def vector(count: int, value: float) -> int:
        address = device.allocate(4 * count)
        device.write(address, np.full(count, value, np.float32))
        return address

    def matrix(stored: StoredMatrix) -> MatrixWeights:
        depth, width = stored.weight.shape
        own = {"int8": 8, "int4": 4}.get(stored.weight.dtype, 16)
        weight = filled(stored.weight.bytes, halves if own == 16 else integers)
        scales = 0
        if stored.scales is not None:
            scales = device.allocate(stored.scales.bytes)
            device.write(scales, np.full(stored.scales.shape, 0.02 / (1 << (own - 1)), np.float16))
        bias = 0 if stored.bias is None else vector(width, 0.0)
        return MatrixWeights(own, depth, width, stored.block, "__half", weight, scales, bias)  # type: ignore[arg-type]

    def norm(stored: StoredNorm) -> NormWeights:
        return NormWeights(stored.kind, vector(layout.width, 1.0), vector(layout.width, 0.0), stored.epsilon)

    layers = tuple(
        LayerOnDevice(
            norm(one.attention_norm), matrix(one.query), matrix(one.key), matrix(one.value), matrix(one.out),
            norm(one.feed_forward_norm), None, matrix(one.up), matrix(one.down),
        )
        for one in layout.layers
    )  # fmt: skip
    positions = vector(2050 * layout.width, 0.0)
    weights = DecoderWeights(layout, layers, norm(layout.final_norm), matrix(layout.head), positions, 0)
    return weights, TableOnDevice(TABLE, filled(2 * layout.width * layout.vocabulary, halves))


def process_seconds() -> float:
    """Returns the seconds since this process started."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measures, and prints the result."""
    parser = parser_of(__doc__)
    parser.add_argument("cubins", type=Path, help="folder with the compiled kernels")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a simulated GPU")
    options = parser.parse_args()
    print(json.dumps(measure(options.cubins, options.dry_run)))


if __name__ == "__main__":
    run_script(main)
