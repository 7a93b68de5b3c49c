"""Measures matrix multiplications whose weights are larger than the CPU caches, on one core.

Compares MatMul nodes with equivalent convolutions (Conv nodes), and small with huge memory pages.

    python benchmarks/streaming.py --json benchmarks/results/streaming.json

A graph multiplies the same rows by 30 matrices, 283 MB in all, one after the other, like a decoder. In every round,
each combination is loaded and run several times. The result is the least process CPU time of a round's runs; the table
has the median over the rounds.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from reporting import parser_of, versions, write_result

from blip2edge.cli import run_script
from blip2edge.runtime.backends.huge_pages import on_huge_pages, wait_for_huge_pages

MATRICES, RUNS = 30, 5
SHAPES = ((768, 3072), (3072, 768))  # inner, columns: into an MLP of OPT-125m, and out of it
ROWS = (1, 8, 33, 197)  # a token, a batch of them, a prompt, a ViT's patches


def graph(kind: str, rows: int, inner: int, columns: int) -> bytes:
    """Makes an ONNX model that multiplies the same rows by each of the matrices."""
    rng = np.random.default_rng(0)
    product = kind == "product"
    weight = (inner, columns) if product else (columns, inner, 1, 1)
    source, target = ([rows, inner], [rows, columns]) if product else ([1, inner, 1, rows], [1, columns, 1, rows])
    weights = [numpy_helper.from_array(rng.standard_normal(weight, np.float32), f"w{at}") for at in range(MATRICES)]
    nodes = [helper.make_node("MatMul" if product else "Conv", ["x", f"w{at}"], [f"y{at}"]) for at in range(MATRICES)]
    outputs = [helper.make_tensor_value_info(f"y{at}", TensorProto.FLOAT, target) for at in range(MATRICES)]
    made = helper.make_graph(
        nodes, kind, [helper.make_tensor_value_info("x", TensorProto.FLOAT, source)], outputs, weights
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def least_seconds(model: bytes, huge: bool) -> float:
    """Returns the CPU seconds of the fastest of `RUNS` runs of an ONNX model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    with on_huge_pages() if huge else nullcontext():
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wait_for_huge_pages()
    value = session.get_inputs()[0]
    feed = {value.name: np.random.default_rng(1).standard_normal(value.shape, np.float32)}
    session.run(None, feed)
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        session.run(None, feed)
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    for inner, columns in SHAPES:
        for rows in ROWS:
            models = {kind: graph(kind, rows, inner, columns) for kind in ("product", "convolution")}
            ways = [(kind, huge) for huge in (False, True) for kind in models]
            seconds: dict[tuple[str, bool], list[float]] = {way: [] for way in ways}
            for _ in range(options.rounds):
                for kind, huge in ways:
                    seconds[kind, huge].append(least_seconds(models[kind], huge))
            for (kind, huge), times in seconds.items():
                took, weights = statistics.median(times), MATRICES * inner * columns
                row = {"shape": [inner, columns], "rows": rows, "kind": kind, "huge_pages": huge,
                       "gigabytes_per_s": round(4 * weights / took / 1e9, 1),
                       "gigaflops": round(2 * rows * weights / took / 1e9, 1)}  # fmt: skip
                results.append(row)
                print(row)
    write_result(options.json, versions=versions("onnxruntime", "onnx", "numpy"), results=results)


if __name__ == "__main__":
    run_script(main)
