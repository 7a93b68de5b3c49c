"""Measures the time saved and captions changed by ``watch --reuse-below``: ``python benchmarks/reuse.py --json FILE``.

The video is made of generated scenes with camera noise: each scene stands still, then one of its objects changes its
colour, then the picture fades into the next scene. The example checkpoint captions the video once for each value of
``--reuse-below``. The captions are compared with those of a run that encodes every frame.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reporting import CHECKPOINT, cpu_model, in_turn, parser_of, write_json
from reuse_films import Picture, recoloured, with_noise

from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.serving.streams.sources import Frame
from blip2edge.runtime.serving.watch import WatchResult, watch
from blip2edge.training.data.scenes import scenes

LIMITS = (0.0, 0.002, 0.005, 0.01, 0.02, 0.05)
STILL = 8  # frames of each of a scene's three parts
NOISE = 3.0  # standard deviation of the camera's, in 255ths
SEED = 77


def film(count: int) -> list[NDArray[np.uint8]]:
    """Makes the frames of a video with ``count`` scenes."""
    rng = np.random.default_rng(SEED)
    shown = list(scenes(count + 1, split="heldout", seed=SEED))
    frames: list[Picture] = []
    for scene, following in pairwise(shown):
        other, coming = recoloured(scene), np.asarray(following.picture, np.float32)
        frames += [np.asarray(scene.picture, np.float32)] * STILL + [other] * STILL
        frames += [other + (coming - other) * (step + 1) / STILL for step in range(STILL)]
    return [with_noise(frame, rng, NOISE) for frame in frames]


def watched(captioner: Captioner, frames: list[NDArray[np.uint8]], below: float) -> list[WatchResult]:
    """Captions the video once with one value of ``--reuse-below``; returns the results of all frames."""

    def source() -> Iterator[Frame]:
        for index, frame in enumerate(frames):
            yield Frame(str(index), frame)

    return list(watch(captioner, source(), every=True, reuse_below=below, draft="none"))


def measure(captioner: Captioner, frames: list[NDArray[np.uint8]], rounds: int) -> list[dict[str, Any]]:
    """Measures all values of ``--reuse-below`` in turn; returns a row for each, with the time of its fastest round."""
    seconds, found = in_turn({below: partial(watched, captioner, frames, below) for below in LIMITS}, rounds)
    texts = {below: [one.result.text for one in seen if one.result] for below, seen in found.items()}
    return [
        {
            "below": below,
            "reused": sum(one.reused for one in found[below]) / len(frames),
            "same_words": sum(map(str.__eq__, texts[below], texts[0.0])) / len(frames),
            "cpu_ms": min(seconds[below]) / len(frames) * 1e3,
        }
        for below in LIMITS
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--scenes", type=int, default=40, metavar="N")
    parser.add_argument("--rounds", type=int, default=2, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    frames = film(options.scenes)
    with tempfile.TemporaryDirectory() as folder:
        bundle = export_checkpoint(CHECKPOINT, Path(folder) / "bundle").bundle
        rows = measure(Captioner.load(bundle, backend="cpu", threads=1), frames, options.rounds)
    document = {
        "machine": {"cpu": cpu_model()},
        "frames": len(frames),
        "scenes": options.scenes,
        "noise": NOISE,
        "results": [{name: round(value, 4) for name, value in row.items()} for row in rows],
    }
    print(json.dumps(document, indent=2))
    write_json(options.json, document)


if __name__ == "__main__":
    run_script(main)
