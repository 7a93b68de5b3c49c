"""Measures the time saved and the captions changed by token merging.

    python benchmarks/token_merging.py --json benchmarks/results/token-merging.json

The example checkpoint is exported with ``--merge-tokens R``. It captions 1,000 scenes with pairs of objects that no
training phase used, and the CPU time of its vision encoder is measured. For a ViT-B/16 at 224 pixels with random
weights, only the CPU time is measured. Each bundle has its optimized copy. The bundles run in turn, each on one
thread; times are process CPU time.

``--keep DIR`` keeps the bundles and scores in DIR, and uses existing ones; ``--prepare`` ends before the measurements.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from race import Contestant, race, table, versions
from random_checkpoint import VIT_B, published, shrunk, write_checkpoint
from reporting import CHECKPOINT, parser_of, write_result

from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization.pipeline import optimize
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.training.evaluation.scene_scores import evaluate_scenes

MINIATURE, LARGE = "miniature", "vit-b"
COUNTS = {MINIATURE: (0, 1, 2, 4, 8, 12, 16, 21), LARGE: (0, 4, 8, 12, 16)}
ROUNDS = {MINIATURE: 150, LARGE: 15}


def checkpoint_of(model: str, folder: Path) -> Path:
    """Returns the directory of a model's checkpoint; writes the large model's checkpoint if it does not exist."""
    if model == MINIATURE:
        return CHECKPOINT
    path = folder / "checkpoint"
    if not path.exists():
        config = shrunk(published("blip2-opt-2.7b"))
        write_checkpoint(path, config | {"vision_config": config["vision_config"] | VIT_B})
    return path


def bundle_of(model: str, tokens: int, folder: Path) -> Path:
    """Returns the directory of a bundle with its optimized copy; makes the bundle if it does not exist."""
    path = folder / f"{model}-{tokens}"
    if not path.exists():
        optimize(export_checkpoint(checkpoint_of(model, folder), path, merge_tokens=tokens).bundle)
    return path


def captions_of(bundle: Path, count: int) -> tuple[list[str], float]:
    """Captions held-out scenes; returns the captions, and the share of captions that are exactly right."""
    captioner = Captioner.load(bundle, backend="cpu", threads=1)
    said: list[str] = []

    def caption(pictures: Any) -> list[str]:
        texts = [result.text for result in captioner.caption_many(pictures, batch_size=16)]
        said.extend(texts)
        return texts

    return said, evaluate_scenes(caption, count)["exact_match"]


def scores_of(folder: Path, count: int) -> dict[str, Any]:
    """Returns the scores of the example checkpoint for each R (number of merged tokens per layer)."""
    path = folder / f"scores-{count}.json"
    if path.exists():
        return dict(json.loads(path.read_text()))
    scores: dict[str, Any] = {}
    plain: list[str] = []
    for tokens in COUNTS[MINIATURE]:
        said, right = captions_of(bundle_of(MINIATURE, tokens, folder), count)
        plain = plain or said
        same = sum(one == other for one, other in zip(said, plain, strict=True)) / count
        scores[str(tokens)] = {"exact_match": right, "as_without_merging": same}
        print(f"R = {tokens}: exact match {right:.2%}, as without merging {same:.2%}", file=sys.stderr)
    path.write_text(json.dumps(scores))
    return scores


def timed(model: str, folder: Path) -> list[dict[str, Any]]:
    """Returns the CPU time and the number of output embeddings of a model's vision encoder.

    Both are measured for each R, the number of tokens that each layer merges.
    """
    contestants = [Contestant(str(tokens), "vision", str(bundle_of(model, tokens, folder))) for tokens in COUNTS[model]]
    rows = table(race(contestants, {"run": ["run"]}, ROUNDS[model]), contestants[0].name)
    for row, contestant in zip(rows, contestants, strict=True):
        merging = Bundle.open(contestant.path).manifest.merging
        outputs = Bundle.open(contestant.path).graph("vision_encoder").spec.outputs
        row["merge_tokens"] = int(row.pop("name"))
        row["embeds"] = outputs[0].dims[1]
        row["cosine"] = None if merging is None else merging.cosine
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--count", type=int, default=1000, help="number of held-out scenes (1000)")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        scores = scores_of(folder, options.count)
        for tokens in COUNTS[LARGE]:
            bundle_of(LARGE, tokens, folder)
        if options.prepare:
            return
        results = {model: timed(model, folder) for model in COUNTS}
        for row in results[MINIATURE]:
            row |= scores[str(row["merge_tokens"])]
        known = versions([Contestant("", "", "")], ("torch", "onnx", "onnxruntime", "numpy"))
        write_result(options.json, heldout_scenes=options.count, rounds=ROUNDS, versions=known, results=results)
    for model, rows in results.items():
        for row in rows:
            print(f"{model:10} R = {row['merge_tokens']:2}  {row['run']['cpu_ms']:8.2f} ms  {row}")


if __name__ == "__main__":
    run_script(main)
