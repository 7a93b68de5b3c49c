"""Measures the perplexity of a real language model, in fp32 and with INT8 and INT4 weights.

The integer weights are calibrated, or plainly rounded for comparison.

    python benchmarks/smollm2.py --out SMOLLM2
    python benchmarks/smollm2_captioner.py SMOLLM2 --out CHECKPOINT
    blip2edge export CHECKPOINT -o BUNDLE
    python benchmarks/texts.py --out TEXTS
    python benchmarks/perplexity.py BUNDLE --texts TEXTS --json benchmarks/results/perplexity.json

A bundle's decoder and token embedding table are quantized by the code of `blip2edge calibrate --weights`, with windows
of ``calibration.txt`` instead of captions. Perplexity is measured on windows of ``evaluation.txt``, which has other
documents; the first token of a window is not scored. ONNX Runtime fuses the blocks into MatMulNBits, which also rounds
activations to eight bits per block. The variants named "plain" round every matrix to nearest, with scales that map the
largest value to the largest integer; blocks and file size are the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from reporting import bundle_path, machine, parser_of, versions, write_json

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.dtypes import Array
from blip2edge.bundle.schema import DECODER, EMBEDDINGS_FILE, EMBEDDINGS_TENSOR, TOKENIZER_FILE
from blip2edge.bundle.token_table import TokenTable
from blip2edge.calibration.batches import Feeds
from blip2edge.calibration.context import CalibrationContext
from blip2edge.calibration.formats import GraphFormat, NumberFormat
from blip2edge.calibration.storage import DataFile
from blip2edge.calibration.targets import find_targets
from blip2edge.calibration.weights.quantize import quantize_weights
from blip2edge.calibration.weights.weight_only import choose_formats, quantize_matrices
from blip2edge.cli import run_script
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.runtime.text.tokenizer import Tokenizer

WINDOW = 512  # tokens
FILES = ("decoder.onnx", "decoder.onnx.data", EMBEDDINGS_FILE)
VARIANTS = ("fp32", "int8", "int4", "int4 plain")


def windows(bundle: Bundle, text: Path, count: int) -> Array:
    """Returns windows of a text's token ids, int64 ``[count, WINDOW]``, at equal distances over the text."""
    ids = Tokenizer.from_file(bundle.file(TOKENIZER_FILE)).encode(text.read_text(encoding="utf-8"))
    if len(ids) < count * WINDOW:
        sys.exit(f"{text} has {len(ids)} tokens, but {count} windows of {WINDOW} tokens are needed")
    starts = np.linspace(0, len(ids) - WINDOW, count).astype(int)
    return np.stack([np.array(ids[start : start + WINDOW], np.int64) for start in starts])


def inputs(bundle: Bundle, table: TokenTable, rows: Array) -> Iterator[dict[str, Array]]:
    """Yields the decoder's inputs for each window, so that the decoder gives logits at every position."""
    cache = bundle.manifest.cache
    assert cache is not None
    empty = np.zeros((1, cache.num_heads, 0, cache.head_dim), np.float32)
    places = np.arange(WINDOW, dtype=np.int64)[None]
    for row in rows:
        yield {
            "inputs_embeds": table.rows(row)[None],
            "attention_mask": np.ones_like(places),
            "position_ids": places,
            "logits_indices": places,
            **dict.fromkeys(cache.past_names(), empty),
        }


def perplexity(bundle: Bundle, folder: Path, rows: Array) -> tuple[float, int]:
    """Returns the perplexity of the decoder and token embedding table in a folder, and the number of scored tokens."""
    table = TokenTable(folder / EMBEDDINGS_FILE, EMBEDDINGS_TENSOR, "float32")
    session = OnnxRuntimeSession(folder / "decoder.onnx", 1)
    lost, scored = 0.0, 0
    for row, given in zip(rows, inputs(bundle, table, rows), strict=True):
        logits = session.run(given, ["logits"])["logits"][0, :-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(logits)), row[1:]]
        lost += float((np.log(np.exp(logits).sum(axis=-1)) - chosen).sum())
        scored += len(chosen)
    return float(np.exp(lost / scored)), scored


def calibrated(bundle: Bundle, bits: int, rows: Array, folder: Path) -> dict[str, Any]:
    """Writes the decoder with integer weights, like `calibrate --weights`; returns the mean error of the matrices."""
    feeds = Feeds(folder / "feeds")
    table = TokenTable(bundle.file(EMBEDDINGS_FILE), EMBEDDINGS_TENSOR, "float32")
    for given in inputs(bundle, table, rows):
        feeds.add(DECODER, given)
    context = CalibrationContext(bundle, folder, feeds, "smooth", 1, lambda *_: None, print, "")
    graph = quantize_weights(context, bundle.graph(DECODER), GraphFormat(NumberFormat(f"int{bits}")))
    shutil.rmtree(folder / "feeds")
    if not (folder / EMBEDDINGS_FILE).exists():
        shutil.copyfile(bundle.file(EMBEDDINGS_FILE), folder / EMBEDDINGS_FILE)
    errors = [(matrix.error, matrix.plain_error) for matrix in graph.summary.matrices.values()]
    ours, plain = (float(np.mean([pair[at] for pair in errors if pair[at] is not None])) for at in (0, 1))
    return {"matrices": len(errors), "mean_error": ours, "mean_error_plain": plain}


def rounded_plainly(bundle: Bundle, bits: int, folder: Path) -> None:
    """Writes the decoder with weights rounded to nearest; the token embedding table stays in fp32."""
    model = ir.load(bundle.file("decoder.onnx"))
    products = find_targets(model).products
    formats, _ = choose_formats(products, GraphFormat(NumberFormat(f"int{bits}")))
    with DataFile(folder / "decoder.onnx.data") as file:
        quantize_matrices(model, products, file, formats, plain=True)
    ir.save(model, folder / "decoder.onnx")
    shutil.copyfile(bundle.file(EMBEDDINGS_FILE), folder / EMBEDDINGS_FILE)


def measure(bundle: Bundle, variant: str, calibration: Array, evaluation: Array) -> dict[str, Any]:
    """Quantizes the bundle's weights as one variant; returns perplexity, file size and rounding errors."""
    start = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        if variant == "fp32":
            folder = bundle.path
        elif variant.endswith("plain"):
            rounded_plainly(bundle, int(variant[3]), folder)
        else:
            found = calibrated(bundle, int(variant[3]), calibration, folder)
        seconds = time.process_time() - start
        value, scored = perplexity(bundle, folder, evaluation)
        size = sum((folder / file).stat().st_size for file in FILES)
    return {
        "perplexity": value, "tokens": scored, "bytes": size, "cpu_seconds_to_quantise": round(seconds, 1), **found
    }  # fmt: skip


def summary(results: dict[str, Any]) -> dict[str, float]:
    """Returns perplexities, losses and sizes relative to fp32; empty until all variants are measured."""
    if not {"fp32", "int8", "int4", "int4 plain"} <= results.keys():
        return {}
    base = results["fp32"]
    lost = {name: results[name]["perplexity"] - base["perplexity"] for name in results}
    return {
        "int8_over_fp32": results["int8"]["perplexity"] / base["perplexity"],
        "int4_over_fp32": results["int4"]["perplexity"] / base["perplexity"],
        "int4_loss_over_plain_loss": lost["int4"] / lost["int4 plain"],
        "int8_size_over_fp32": results["int8"]["bytes"] / base["bytes"],
        "int4_size_over_fp32": results["int4"]["bytes"] / base["bytes"],
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path, help="a bundle in fp32")
    parser.add_argument("--texts", type=Path, required=True, help="directory that benchmarks/texts.py wrote")
    parser.add_argument("--tokens", type=int, default=20480, help="smallest number of tokens of the evaluation")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--only", action="append", choices=VARIANTS, help="variant to measure; may be repeated (all)")
    parser.add_argument("--json", type=Path, help="JSON file of results, written after each variant; old results stay")
    options = parser.parse_args()
    bundle = Bundle.open(options.bundle)
    texts = {part: options.texts / f"{part}.txt" for part in ("calibration", "evaluation")}
    calibration = windows(bundle, texts["calibration"], options.calibration_tokens // WINDOW)
    evaluation = windows(bundle, texts["evaluation"], -(-options.tokens // (WINDOW - 1)))
    document: dict[str, Any] = {"results": {}}
    if options.json and options.json.is_file():
        document = json.loads(options.json.read_text(encoding="utf-8"))
    for variant in options.only or VARIANTS:
        document["results"][variant] = measure(bundle, variant, calibration, evaluation)
        print(variant, document["results"][variant], flush=True)
        document |= {
            "command": "python benchmarks/perplexity.py BUNDLE --texts TEXTS",
            "machine": {
                **machine(),
                "threads": 1,
            },
            "versions": versions("onnxruntime", "onnx", "onnx_ir", "numpy"),
            "texts_sha256": {part: hashlib.sha256(path.read_bytes()).hexdigest() for part, path in texts.items()},
            "window": WINDOW,
            "calibration_tokens": calibration.size,
            "summary": summary(document["results"]),
        }
        write_json(options.json, document)
    print(document["summary"])


if __name__ == "__main__":
    run_script(main)
