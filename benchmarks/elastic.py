"""Measures elastic queries: captions with the first m of M visual tokens, and the savings for a video of 60 frames.

    python benchmarks/elastic.py --json benchmarks/results/elastic.json

1. ``scenes``: `examples/recipes/scenes/elastic.toml` trains the example checkpoint from its shipped weights (7 minutes
   of CPU time); its bundle captions 1,000 held-out scenes at each m. The same weights without the entry for elastic
   queries make the plain bundle. Its token ids are compared with the token ids of the elastic bundle at m = M.
2. ``video``: 60 frames in one prompt, at the example's sizes and at those of BLIP-2 (ViT-B/16, 32 queries, the
   language model of OPT-125m), with random weights: tokens of the context, bytes of the KV cache, and CPU time of
   bridge, prefill and whole caption. All numbers m are measured in turn on one thread; ratios are taken within a round.

``--keep DIR`` keeps checkpoints and bundles in DIR, and uses existing ones. ``--skip-scenes`` and ``--skip-video``
leave out a measurement; its values in the JSON file are kept.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import SHAPE, VIT_B, write_checkpoint
from reporting import CHECKPOINT, ROOT, command, machine, median_ratio, parser_of, python, write_json

from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.encoder import StageClock
from blip2edge.runtime.decoding.generate import argmax
from blip2edge.training.evaluation.scene_scores import evaluate_scenes
from blip2edge.training.run import train

RECIPE = ROOT / "examples" / "recipes" / "scenes" / "elastic.toml"
ELASTIC = "elastic_queries"
FRAMES, TOKENS, LEAST = 60, 20, 2

SMALL = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
VIDEO: dict[str, Any] = {"model_type": "instructblipvideo", "num_frames": FRAMES, ELASTIC: LEAST}
SHAPES: dict[str, dict[str, Any]] = {
    "miniature": VIDEO
    | {
        "num_query_tokens": 8,
        "video_token_index": 357,
        "vision_config": SMALL | {"num_hidden_layers": 3, "image_size": 64, "patch_size": 8},
        "qformer_config": SMALL | {"num_hidden_layers": 4, "vocab_size": 358, "encoder_hidden_size": 128},
        "text_config": {
            "model_type": "opt",
            "vocab_size": 358,
            "hidden_size": 128,
            "word_embed_proj_dim": 128,
            "ffn_dim": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
        },
    },
    "blip-2": VIDEO
    | {
        "num_query_tokens": SHAPE["num_query_tokens"],
        "video_token_index": SHAPE["image_token_index"],
        "vision_config": VIT_B,
        "qformer_config": {},
        "text_config": {"model_type": "opt"},
    },
}
"""Configurations of two video models.

``miniature`` has the sizes of the example checkpoint, except a context of 1,024 tokens; ``blip-2`` is a BLIP-2 with
ViT-B/16 and OPT-125m.
"""

NUMBERS = {"miniature": (8, 4), "blip-2": (32, 16, 8)}
ROUNDS = {"miniature": 20, "blip-2": 2}


def elastic_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint trained with elastic queries, and its training record; trains a missing checkpoint."""
    path = folder / "elastic"
    if not path.exists():
        train("stage2", RECIPE, path, log=lambda line: print(line, file=sys.stderr), evaluation_scenes=0)
    return path, dict(json.loads((path / "training.json").read_text()))


def plain_checkpoint(path: Path, folder: Path) -> Path:
    """Writes a copy of a checkpoint without the entry for elastic queries; returns the copy's directory."""
    plain = folder / "plain"
    plain.mkdir(exist_ok=True)
    for file in path.iterdir():
        if file.is_file():
            (plain / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    del config[ELASTIC]
    (plain / "config.json").write_text(json.dumps(config))
    return plain


def bundle_of(checkpoint: Path, path: Path, verify: str | None = None) -> Path:
    """Returns the bundle of a checkpoint; exports the checkpoint if the bundle does not exist."""
    if not path.exists():
        export_checkpoint(checkpoint, path, verify=verify)
    return path


def captions_of(bundle: Path, count: int, queries: int | None) -> tuple[list[tuple[int, ...]], float]:
    """Captions held-out scenes; returns the token ids, and the share of captions that are exactly right."""
    ids: list[tuple[int, ...]] = []
    with Captioner.load(bundle, backend="cpu", threads=1, draft="none") as captioner:

        def caption(pictures: Any) -> list[str]:
            results = list(captioner.caption_many(pictures, batch_size=16, queries=queries))
            ids.extend(result.tokens for result in results)
            return [result.text for result in results]

        return ids, evaluate_scenes(caption, count)["exact_match"]


def scenes(folder: Path, count: int) -> dict[str, Any]:
    """Captions held-out scenes with each number m of queries; the model has M queries.

    Returns the share of exactly right captions at each m, and how many captions at m = M equal those of the plain
    bundle.
    """
    checkpoint, record = elastic_checkpoint(folder)
    elastic = bundle_of(checkpoint, folder / "elastic-bundle")
    plain = bundle_of(plain_checkpoint(checkpoint, folder), folder / "plain-bundle")
    with Captioner.load(elastic, backend="cpu", threads=1) as captioner:
        spec = captioner.bundle.manifest.elastic
    if spec is None:
        raise SystemExit(f"{elastic} is not elastic")
    wanted, plain_right = captions_of(plain, count, None)
    rows, equal = [], 0
    for queries in range(spec.max_queries, spec.min_queries - 1, -1):
        ids, right = captions_of(elastic, count, queries)
        rows.append({"queries": queries, "exact_match": right})
        print(f"m = {queries}: exact match {right:.1%}", file=sys.stderr)
        if queries == spec.max_queries:
            equal = sum(one == other for one, other in zip(ids, wanted, strict=True))
    return {
        "scenes": count,
        "training_cpu_seconds": record["cpu_seconds"],
        "exact_match": rows,
        "plain_exact_match": plain_right,
        "shipped_exact_match": json.loads((CHECKPOINT / "training.json").read_text())["heldout"]["exact_match"],
        "ids_equal_to_plain_at_full": equal,
    }


class CpuClock(StageClock):
    """Adds up the CPU seconds of each stage."""

    def __init__(self) -> None:
        super().__init__()
        self.cpu = dict.fromkeys(self.ms, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        """Adds the CPU time of a ``with`` block to the time of a stage."""
        start = time.process_time()
        with super().__call__(stage):
            yield
        self.cpu[stage] += time.process_time() - start


class Video:
    """Captions one video of :data:`FRAMES` frames of noise; each caption has ``TOKENS`` tokens."""

    def __init__(self, bundle: Path) -> None:
        self.captioner = Captioner.load(bundle, backend="cpu", threads=1)
        size = 224
        frames = np.random.default_rng(0).integers(0, 256, (FRAMES, size, size, 3), dtype=np.uint8)
        clock = StageClock()
        self.prompt = "a photo of"
        encoder = self.captioner.encoder
        self.item: Any = list(frames)
        prepared = encoder.prepare([self.item], [self.prompt], clock)
        start = time.process_time()
        # The vision encoder runs frame by frame here, so that memory holds the activations of one.
        parts = [encoder.run_vision(prepared.pixels[at : at + 1], clock)["image_embeds"] for at in range(FRAMES)]
        self.vision_seconds = time.process_time() - start
        self.vision = {"image_embeds": np.concatenate(parts)}
        self.pixels = prepared.pixels

    def caption(self, queries: int) -> dict[str, Any]:
        """Captions the video with ``queries`` queries.

        Returns the CPU seconds of each stage after the vision encoder, the number of prompt tokens, and the bytes of
        the KV cache.
        """
        encoder, clock = self.captioner.encoder, CpuClock()
        prepared = encoder.prepared([self.prompt], [FRAMES], self.pixels, queries)
        outputs = encoder.run_bridge(self.vision, prepared.bridge_inputs, clock)
        encoded = prepared.encoded({"visual_tokens": outputs["visual_tokens"]})
        logits, state = self.captioner.generator.prefill(encoded, clock)
        with clock("decode"):
            for _ in range(TOKENS - 1):
                logits = state.step(argmax(logits))
        cache = self.captioner.bundle.manifest.cache
        if cache is None:
            raise SystemExit("the bundle has no KV cache")
        context = prepared.prompts[0].length + TOKENS - 1
        each = 2 * 4 * cache.num_layers * cache.num_heads * cache.head_dim  # keys and values in float32
        return {**clock.cpu, "prompt_tokens": prepared.prompts[0].length, "kv_bytes": context * each}


def video(name: str, folder: Path) -> dict[str, Any]:
    """Captions a video of 60 frames with each number m of queries; the model has M queries.

    Returns time, tokens and bytes of the KV cache at each m, and their ratios to the values at m = M.
    """
    checkpoint = folder / f"video-{name}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, SHAPES[name])
    run = Video(bundle_of(checkpoint, folder / f"video-{name}-bundle", "sample"))
    rounds: dict[int, list[dict[str, Any]]] = {queries: [] for queries in NUMBERS[name]}
    for number in range(ROUNDS[name] + 1):
        for queries, found in rounds.items():
            result = run.caption(queries)
            if number:
                found.append(result)
        print(f"{name}: round {number} of {ROUNDS[name]}", file=sys.stderr)
    full = rounds[NUMBERS[name][0]]
    return {
        "frames": FRAMES,
        "new_tokens": TOKENS,
        "vision_cpu_s": round(run.vision_seconds, 3),
        "rows": [_row(queries, found, full, run.vision_seconds) for queries, found in rounds.items()],
    }


def _row(
    queries: int, found: Sequence[Mapping[str, Any]], full: Sequence[Mapping[str, Any]], vision: float
) -> dict[str, Any]:
    def seconds(runs: Sequence[Mapping[str, Any]], *stages: str) -> list[float]:
        return [sum(run[stage] for stage in stages) for run in runs]

    def both(*stages: str, more: float = 0.0) -> dict[str, float]:
        own, base = seconds(found, *stages), seconds(full, *stages)
        pairs = [one + more for one in base], [one + more for one in own]
        return {
            "cpu_ms": round(statistics.median(pairs[1]) * 1e3, 2),
            "times_faster": round(median_ratio(*pairs), 3),
        }

    after = ("bridge", "prefill", "decode")
    return {
        "queries": queries,
        "prompt_tokens": found[0]["prompt_tokens"],
        "kv_mib": round(found[0]["kv_bytes"] / 2**20, 2),
        "kv_share": round(found[0]["kv_bytes"] / full[0]["kv_bytes"], 3),
        "bridge": both("bridge"),
        "prefill": both("prefill"),
        "decode": both("decode"),
        "after_vision": both(*after),
        "whole": both(*after, more=vision),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--count", type=int, default=1000, help="number of held-out scenes (1000)")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--skip-scenes", action="store_true")
    parser.add_argument("--skip-video", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    document: dict[str, Any] = {}
    if options.json is not None and options.json.exists():
        document = json.loads(options.json.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if not options.skip_scenes:
            document["scenes"] = scenes(folder, options.count)
        if not options.skip_video:
            document["video"] = {name: video(name, folder) for name in SHAPES}
    known = {"command": command("--json", "benchmarks/results/elastic.json"), "machine": machine()}
    document |= known | {"versions": python("torch", "onnx", "onnxruntime", "numpy")}
    write_json(options.json, document)
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    run_script(main)
