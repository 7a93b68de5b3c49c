"""``blip2edge train`` and ``blip2edge eval``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.errors import BundleError, UsageError
from blip2edge.manifest import MANIFEST
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.training.evaluate import CaptionMany, SceneScores


def train(options: argparse.Namespace) -> int:
    """Train a stage by a recipe, and print where the checkpoint is."""
    from blip2edge.training.run import train as run

    output = options.output or Path("runs") / options.config.stem
    with Progress() as progress:
        record = run(
            options.stage,
            options.config,
            output,
            resume=options.resume,
            force=options.force,
            progress=progress,
        )
    if int(os.environ.get("RANK", "0")):  # of several processes, the first one tells
        return 0
    print(f"{output}: {record['parameters']} parameters, trained in {record['seconds']:.0f} s")
    scores = record.get("heldout")
    if scores:
        print(f"{scores['n']} held-out scenes: {scores['exact_match']:.2%} right to the last letter")
    print(f"next: blip2edge export {output} -o BUNDLE")
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """Caption generated scenes and print the rate of captions that are right to the last letter."""
    from blip2edge.training.evaluate import evaluate_scenes

    if options.count < 2:
        raise UsageError(f"--count: at least 2 pictures are expected, not {options.count}")
    caption_many = _captioner(options.model, options.batch_size)
    with Progress() as progress:
        scores = evaluate_scenes(
            caption_many,
            options.count,
            split=options.split,
            progress=lambda done, total: progress("captioning", done, total),
        )
    print(json.dumps(scores) if options.json else _text(scores))
    return 0


def _captioner(model: Path, batch_size: int) -> CaptionMany:
    """What captions: the runtime for a bundle, torch for a checkpoint.

    Raises:
        BundleError: The directory is neither.
    """
    if (model / MANIFEST).is_file():
        from blip2edge.runtime.captioner import Captioner

        captioner = Captioner.load(model)
        return lambda pictures: [
            result.text for result in captioner.caption_many(pictures, batch_size=batch_size)
        ]
    if (model / "config.json").is_file():
        from blip2edge.training.captioning import checkpoint_captioner

        return checkpoint_captioner(model, batch_size=batch_size)
    raise BundleError(
        f"{model} is neither a bundle (no {MANIFEST}) nor a checkpoint (no config.json)",
        "make a bundle with: blip2edge export CHECKPOINT -o BUNDLE",
    )


def _text(scores: SceneScores) -> str:
    lines = [
        f"{scores['n']} scenes, object pairs of the split {scores['split']!r}, seed {scores['seed']}",
        f"exact match               {scores['exact_match']:.2%}",
        f"against shuffled pictures {scores['shuffled_match']:.2%}",
    ]
    for right, said in scores["wrong"]:
        lines += [f"  wrong: {said.strip()!r}", f"  right: {right!r}"]
    return "\n".join(lines)
