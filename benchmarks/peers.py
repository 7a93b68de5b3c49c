"""Captions with transformers, plain ONNX Runtime and blip2edge: the same weights, picture and lengths, in one run.

    python benchmarks/peers.py --keep DIR --compile --json benchmarks/results/peers-cpu.json
    python benchmarks/peers.py --keep DIR --bundle INT8=DIR8 --bundle INT8+INT4=DIR4 --json …
    python benchmarks/peers.py --keep DIR --batch 8 --json …

All programs run in one process on one thread, in turn (A B C A B C …); their process CPU time is measured. Results are
medians, and ratios within each round, because the speed of a shared machine drifts. The captioner has random weights
and the sizes of ViT-B/16 at 224 pixels, a 12-layer Q-Former of 32 queries and OPT-125m. The other bundles are made
from ``DIR/bundle`` by ``blip2edge calibrate`` and ``blip2edge optimize``.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from random_checkpoint import SHAPE, write_checkpoint
from reporting import command, in_turn, machine, median_ratio, named_bundle, parser_of, python, write_json

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import EMBEDDINGS_FILE, EMBEDDINGS_TENSOR
from blip2edge.bundle.token_table import TokenTable
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.captioning.captioner import Captioner


@dataclass(frozen=True)
class Contestant:
    """A compared program: its name, and the function that captions the picture with it."""

    name: str
    caption: Callable[[], list[list[int]]]


def rows_of(ids: np.ndarray | torch.Tensor) -> list[list[int]]:
    """Returns token ids ``[B, T]`` as lists."""
    rows: list[list[int]] = ids.tolist()
    return rows


def transformers_contestants(checkpoint: Path, pixels: np.ndarray, tokens: int, compiled: bool) -> list[Contestant]:
    """Returns the compared programs of transformers: eager, and with torch.compile if `compiled` is true."""
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    pixel_values = torch.from_numpy(pixels)

    def caption() -> list[list[int]]:
        out = model.generate(pixel_values=pixel_values, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return rows_of(out[:, -tokens:])

    contestants = [Contestant("transformers eager", caption)]
    if compiled:
        twin = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        twin.vision_model.forward = torch.compile(twin.vision_model.forward)
        twin.qformer.forward = torch.compile(twin.qformer.forward)
        twin.language_model.forward = torch.compile(twin.language_model.forward, dynamic=True)

        def caption_compiled() -> list[list[int]]:
            out = twin.generate(
                pixel_values=pixel_values, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            return rows_of(out[:, -tokens:])

        contestants.append(Contestant("transformers torch.compile", caption_compiled))
    return contestants


def plain_runtime(bundle: Path, pixels: np.ndarray, tokens: int) -> Contestant:
    """Returns the program that runs ONNX Runtime with default options; each step copies the KV cache to NumPy."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = {
        name: onnxruntime.InferenceSession(str(bundle / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
        for name in ("vision_encoder", "bridge", "decoder")
    }
    manifest = Bundle.open(bundle).manifest
    cache, table = manifest.cache, TokenTable(bundle / EMBEDDINGS_FILE, EMBEDDINGS_TENSOR, "float32")
    assert cache is not None
    prompt = Captioner.load(bundle, threads=1).prompts(None)

    def caption() -> list[list[int]]:
        batch = len(pixels)
        embeds = sessions["vision_encoder"].run(None, {"pixel_values": pixels})[0]
        visual = sessions["bridge"].run(["visual_tokens"], {"image_embeds": embeds})[0]
        x = np.stack([prompt.embed(table, row) for row in visual])
        past = {name: np.zeros((batch, cache.num_heads, 0, cache.head_dim), np.float32) for name in cache.past_names()}
        ids: list[np.ndarray] = []
        for _ in range(tokens):
            seen, steps = next(iter(past.values())).shape[2], x.shape[1]
            feeds = {
                "inputs_embeds": x,
                "attention_mask": np.ones((batch, seen + steps), np.int64),
                "position_ids": np.tile(np.arange(seen, seen + steps), (batch, 1)),
                "logits_indices": np.full((batch, 1), steps - 1, np.int64),
                **past,
            }
            logits, *present = sessions["decoder"].run(None, feeds)
            past = dict(zip(cache.past_names(), present, strict=True))
            ids.append(logits[:, 0].argmax(axis=-1))
            x = table.rows(ids[-1])[:, None]
        return rows_of(np.stack(ids, axis=1))

    return Contestant("ONNX Runtime, plain", caption)


def ours(
    name: str, bundle: Path, picture: np.ndarray, tokens: int, batch: int, stages: list[dict[str, float]]
) -> Contestant:
    """Returns the program that runs a bundle in blip2edge; each call appends its times to `stages`."""
    captioner = Captioner.load(bundle, threads=1)

    def caption() -> list[list[int]]:
        results = list(
            captioner.caption_many(
                [picture] * batch,
                batch_size=batch,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                eos_token_ids=(),
            )
        )
        stages.append(results[0].timings_ms)
        return [list(result.tokens) for result in results]

    return Contestant(f"blip2edge {name}", caption)


def race(contestants: list[Contestant], rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Runs all compared programs in turn, after a warm-up round.

    Returns:
        By the program's name: the CPU seconds of each round, and the share of token ids that equal those of the first
        program.
    """
    seconds, ids = in_turn({contestant.name: contestant.caption for contestant in contestants}, rounds)
    base = np.array(ids[contestants[0].name])
    same = {name: float((np.array(found) == base).mean()) for name, found in ids.items()}
    return seconds, same


def main() -> None:
    """Makes the checkpoint, exports it, and prints the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile (takes minutes)")
    parser.add_argument(
        "--keep", type=Path, required=True, help="directory of checkpoint and bundle, which are made if missing (3 GB)"
    )
    parser.add_argument("--bundle", type=named_bundle, action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--batch", type=int, default=1, help="number of pictures in a batch (1)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    checkpoint, bundle = options.keep / "checkpoint", options.keep / "bundle"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, SHAPE)
    if not bundle.exists():
        export_checkpoint(checkpoint, bundle, verify="sample")
        optimize(bundle)
    picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    stages: dict[str, list[dict[str, float]]] = {}
    blip2edge = [
        ours(name, path, picture, options.tokens, options.batch, stages.setdefault(name, []))
        for name, path in [("fp32", bundle), *options.bundle]
    ]
    pixels = Captioner.load(bundle, threads=1).encoder.images.preprocessing.batch([picture] * options.batch)
    contestants = [
        *transformers_contestants(checkpoint, pixels, options.tokens, options.compile),
        plain_runtime(bundle, pixels, options.tokens),
        *blip2edge,
    ]  # fmt: skip
    seconds, same = race(contestants, options.rounds)
    report(seconds, same, {name: rows[1:] for name, rows in stages.items()}, options)


def report(
    seconds: dict[str, list[float]],
    same: dict[str, float],
    stages: dict[str, list[dict[str, float]]],
    options: argparse.Namespace,
) -> None:
    """Prints a Markdown table and writes the JSON."""
    base = next(iter(seconds.values()))
    rows = []
    for name, values in seconds.items():
        row = {"name": name, "cpu_seconds": statistics.median(values), "speedup": median_ratio(base, values)}
        rows.append(row | {"same_ids": same[name], "pictures_per_cpu_s": options.batch / row["cpu_seconds"]})
    medians = {
        name: {stage: round(statistics.median(run[stage] for run in runs), 1) for stage in runs[0]}
        for name, runs in stages.items()
    }
    where = machine()
    print(f"{where['cpu']}, one thread, {options.tokens} tokens, batch {options.batch}, {options.rounds} rounds\n")
    print("| | CPU seconds | times transformers eager | same ids |\n|---|---:|---:|---:|")
    for row in rows:
        print(f"| {row['name']} | {row['cpu_seconds']:.3f} | {row['speedup']:.2f} | {row['same_ids']:.0%} |")
    if options.json:
        document = {
            "command": command(),
            "machine": where,
            "versions": python("torch", "transformers", "onnxruntime", "numpy"),
            "shape": SHAPE,
            "tokens": options.tokens,
            "batch": options.batch,
            "rounds": seconds,
            "results": rows,
            "stages_ms": medians,
        }
        write_json(options.json, document)


if __name__ == "__main__":
    run_script(main)
