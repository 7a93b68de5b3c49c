"""The same weights, picture and lengths through transformers and through blip2edge, in one run.

    python benchmarks/peers.py --compile --json benchmarks/results/peers-cpu.json

One process, one thread, batch 1, the contestants in turn (A B C A B C …), process CPU time, medians of the rounds and
ratios round by round: a shared machine drifts, and what stands beside each other drifts together. The captioner has
random weights in the shape of ViT-B/16 at 224 pixels, a 12-layer Q-Former of 32 queries and OPT-125m.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from export_memory import write_checkpoint

from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioner import Captioner

SHAPE: dict[str, Any] = {
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "image_token_index": 50271,
    "vision_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "qformer_config": {},
    "text_config": {"model_type": "opt"},
}
"""ViT-B/16, the Q-Former of BLIP-2 and OPT-125m (transformers' defaults)."""


@dataclass(frozen=True)
class Contestant:
    """A name and what captions the picture."""

    name: str
    caption: Callable[[], list[int]]


def cpu_model() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def transformers_contestants(
    checkpoint: Path, pixels: np.ndarray, tokens: int, compiled: bool
) -> list[Contestant]:
    """transformers as a user runs it: eager, and with the language model compiled."""
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    pixel_values = torch.from_numpy(pixels)

    def caption() -> list[int]:
        out = model.generate(
            pixel_values=pixel_values, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
        )
        return list(out[0].tolist())[-tokens:]

    contestants = [Contestant("transformers eager", caption)]
    if compiled:
        twin = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        twin.vision_model.forward = torch.compile(twin.vision_model.forward)
        twin.qformer.forward = torch.compile(twin.qformer.forward)
        twin.language_model.forward = torch.compile(twin.language_model.forward, dynamic=True)

        def caption_compiled() -> list[int]:
            out = twin.generate(
                pixel_values=pixel_values, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            return list(out[0].tolist())[-tokens:]

        contestants.append(Contestant("transformers torch.compile", caption_compiled))
    return contestants


def ours(bundle: Path, picture: np.ndarray, tokens: int, stages: list[dict[str, float]]) -> Contestant:
    """The runtime on an exported bundle."""
    captioner = Captioner.load(bundle, threads=1)

    def caption() -> list[int]:
        result = captioner.caption(picture, max_new_tokens=tokens, min_new_tokens=tokens)
        stages.append(result.timings_ms)
        return list(result.tokens)

    return Contestant("blip2edge fp32", caption)


def race(contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contestant, round by round, after one round that warms up."""
    seconds: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    ids: dict[str, list[int]] = {}
    for number in range(rounds + 1):
        for contestant in contestants:
            start = time.process_time()
            ids[contestant.name] = contestant.caption()
            if number:
                seconds[contestant.name].append(time.process_time() - start)
    different = [name for name, found in ids.items() if found != ids[contestants[0].name]]
    if different:
        print(f"note: other ids than {contestants[0].name}: {', '.join(different)}", file=sys.stderr)
    return seconds


def main() -> None:
    """Makes the checkpoint, exports it, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile as a further contestant (minutes)"
    )
    parser.add_argument("--work", type=Path, help="where the checkpoint and the bundle go (3 GB)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    stages: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        checkpoint, bundle = Path(folder) / "checkpoint", Path(folder) / "bundle"
        write_checkpoint(checkpoint, SHAPE)
        export_checkpoint(checkpoint, bundle, verify="sample")
        picture = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        contestant = ours(bundle, picture, options.tokens, stages)
        pixels = Captioner.load(bundle, threads=1).preprocessing.batch([picture])
        contestants = [
            *transformers_contestants(checkpoint, pixels, options.tokens, options.compile), contestant,
        ]  # fmt: skip
        seconds = race(contestants, options.rounds)
    report(seconds, stages[1:], options)


def report(
    seconds: dict[str, list[float]], stages: list[dict[str, float]], options: argparse.Namespace
) -> None:
    """Prints a Markdown table and writes the JSON."""
    base = next(iter(seconds.values()))
    rows = []
    for name, values in seconds.items():
        ratios = [first / own for first, own in zip(base, values, strict=True)]
        rows.append(
            {"name": name, "cpu_seconds": statistics.median(values), "speedup": statistics.median(ratios)}
        )
    median = {stage: round(statistics.median(row[stage] for row in stages), 1) for stage in stages[0]}
    machine = {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()}
    packages = ("torch", "transformers", "onnxruntime", "numpy")
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    print(f"{machine['cpu']}, one thread, {options.tokens} tokens, batch 1, fp32, {options.rounds} rounds\n")
    print("| | CPU seconds a caption | times transformers eager |\n|---|---:|---:|")
    for row in rows:
        print(f"| {row['name']} | {row['cpu_seconds']:.2f} | {row['speedup']:.2f} |")
    print(f"\nblip2edge by stage, ms: {', '.join(f'{stage} {ms}' for stage, ms in median.items())}")
    if options.json:
        document = {
            "command": "python benchmarks/peers.py " + " ".join(sys.argv[1:]),
            "machine": machine,
            "versions": versions,
            "shape": SHAPE,
            "tokens": options.tokens,
            "rounds": seconds,
            "results": rows,
            "stages_ms": median,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
