"""Parity and speed on an NVIDIA GPU. This script has not been run on a GPU yet, so there are no results.

    python benchmarks/gpu.py --json benchmarks/results/gpu.json             # random weights, ViT-B + OPT-125m, fp16
    python benchmarks/gpu.py --checkpoint DIR --backends cuda tensorrt      # your own

1. Exports the checkpoint in fp16, and builds engines where TensorRT is installed.
2. Captions the same picture with every backend, and compares the tokens with those of the CPU backend on the fp32
   bundle, up to the first difference.
3. Captions in turn (A B C A B C …) with transformers in fp16, eager and compiled, and with every backend. Milliseconds
   come from CUDA events around the whole caption; results are medians, and ratios within each round.
4. Computes the share of the GPU's bandwidth: bytes of the decoder's weights and cache that each token reads, over the
   bandwidth of a copy on this GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from random_checkpoint import SHAPE, write_checkpoint
from reporting import parser_of, write_json

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER
from blip2edge.errors import Blip2EdgeError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner

BACKENDS = ("cuda", "ort-tensorrt", "tensorrt")
COPIED = 1 << 29  # bytes copied to find the bandwidth; twice that moves


@dataclass(frozen=True)
class Contestant:
    """A name, and the function that captions the picture."""

    name: str
    caption: Callable[[], list[int]]


def milliseconds(function: Callable[[], object]) -> float:
    """Milliseconds that a function takes, between two CUDA events; the host's part is included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    began = time.perf_counter()
    function()
    end.record()
    torch.cuda.synchronize()
    # Work on streams that torch does not know is not between its events: the wall clock covers both.
    return max(float(start.elapsed_time(end)), (time.perf_counter() - began) * 1e3)


def bandwidth() -> float:
    """Bytes a second that a copy within the GPU's memory moves, the best of five."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPIED / (min(milliseconds(lambda: target.copy_(source)) for _ in range(5)) / 1e3)


def bytes_a_token(bundle: Bundle, context: int) -> int:
    """What a step reads: the decoder's weights once, and keys and values of the whole context."""
    record, cache = bundle.graph(DECODER), bundle.manifest.cache
    names = record.files
    weights = sum(bundle.manifest.files[name].size for name in names)
    width = 2 if record.spec.inputs[0].dtype == "float16" else 4
    per_position = 0 if cache is None else 2 * cache.num_layers * cache.num_heads * cache.head_dim * width
    return weights + per_position * context


def of_transformers(checkpoint: Path, picture: PIL.Image.Image, tokens: int) -> list[Contestant]:
    """transformers in fp16: eager, and with its forward compiled."""
    from transformers import Blip2ForConditionalGeneration

    from blip2edge.runtime.images.preprocess import Preprocessing

    def loaded() -> Any:
        return Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float16).eval().cuda()

    bundle = Bundle.open(checkpoint.parent / "fp16")
    pixels = Preprocessing.from_json(bundle.manifest.preprocessing).batch([picture])
    pixel_values = torch.from_numpy(pixels).half().cuda()

    def contestant(name: str, model: Any) -> Contestant:
        def caption() -> list[int]:
            with torch.inference_mode():
                out = model.generate(
                    pixel_values=pixel_values, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
                )
            ids: list[int] = out[0].tolist()[-tokens:]
            return ids

        return Contestant(name, caption)

    compiled = loaded()
    compiled.language_model.forward = torch.compile(compiled.language_model.forward, dynamic=True)
    return [contestant("transformers eager", loaded()), contestant("transformers compiled", compiled)]


def of_backend(name: str, bundle: Path, picture: PIL.Image.Image, tokens: int) -> Contestant:
    """A backend of this project; engines are built first where it runs those."""
    if name == "tensorrt":
        from blip2edge.engine.build import build_bundle

        build_bundle(bundle, notify=lambda sentence: print(sentence, file=sys.stderr))
    captioner = Captioner.load(bundle, backend=name)

    def caption() -> list[int]:
        return list(captioner.caption(picture, max_new_tokens=tokens, min_new_tokens=tokens).tokens)

    return Contestant(name, caption)


def race(contestants: list[Contestant], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, in turn, after two rounds to warm up."""
    times: dict[str, list[float]] = {one.name: [] for one in contestants}
    for number in range(rounds + 2):
        for one in contestants:
            taken = milliseconds(one.caption)
            if number >= 2:
                times[one.name].append(taken)
    return times


def agreement(wanted: list[int], got: list[int]) -> int:
    """Tokens before the first difference."""
    for place, (first, second) in enumerate(zip(wanted, got, strict=False)):
        if first != second:
            return place
    return min(len(wanted), len(got))


def run(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """The whole comparison."""
    checkpoint = options.checkpoint or directory / "checkpoint"
    if options.checkpoint is None:
        write_checkpoint(checkpoint, SHAPE)
    for precision in ("fp32", "fp16"):
        export_checkpoint(checkpoint, directory / precision, precision=precision, verify="sample")
    picture = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8))
    reference = of_backend("cpu", directory / "fp32", picture, options.tokens).caption()
    contestants, missing = [], {}
    if options.checkpoint is None:
        contestants += of_transformers(checkpoint, picture, options.tokens)
    for name in options.backends:
        try:
            contestants.append(of_backend(name, directory / "fp16", picture, options.tokens))
        except Blip2EdgeError as error:
            missing[name] = str(error)
    same = {one.name: agreement(reference, one.caption()) for one in contestants}
    times = race(contestants, options.rounds)
    bundle, speed = Bundle.open(directory / "fp16"), bandwidth()
    read = bytes_a_token(bundle, options.tokens)
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "bandwidth_gb_s": speed / 1e9,
        "tokens": options.tokens,
        "bytes_a_token": read,
        "not_run": missing,
        "contestants": [
            {
                "name": name,
                "ms": statistics.median(values),
                "tokens_as_cpu_fp32": same[name],
                "share_of_bandwidth": read * options.tokens / (statistics.median(values) / 1e3) / speed,
                "over_eager": statistics.median(
                    first / second for first, second in zip(next(iter(times.values())), values, strict=True)
                ),
            }
            for name, values in times.items()
        ],
    }


def main() -> int:
    """Parses the command line and prints the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint; left out: random weights")
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was measured", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as directory:
        result = run(options, Path(directory))
    for row in result["contestants"]:
        print(
            f"{row['name']:24} {row['ms']:9.1f} ms  {row['over_eager']:5.2f} x  {row['share_of_bandwidth']:5.1%} of "
            f"bandwidth  {row['tokens_as_cpu_fp32']}/{options.tokens} tokens as the CPU's fp32"
        )
    for name, reason in result["not_run"].items():
        print(f"{name:24} not run: {reason}")
    write_json(options.json, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
