"""``blip2edge train``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse


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
    for phase, figures in record["phases"].items():
        for name, problem in figures.get("broken", {}).get("first", {}).items():
            print(f"{phase}: skipped {name}: {problem} ({figures['broken']['samples']} samples in all)")
    scores = record.get("heldout")
    if scores:
        print(f"{scores['n']} held-out scenes: {scores['exact_match']:.2%} right to the last letter")
    print(f"next: blip2edge export {output} -o BUNDLE")
    return 0
