"""Measures how INT8 and INT4 change the demo's captions: ``python benchmarks/demo_precision.py``.

Exports the example checkpoint, calibrates it on scenes of the training split, and captions 1,000 scenes with pairs of
objects that neither training nor calibration used. The bundles run with their exported (not optimized) graphs.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from reporting import CHECKPOINT, RESULTS, command, parser_of, system, write_json

from blip2edge.bundle.bundle import Bundle
from blip2edge.calibration.pipeline import calibrate
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.training.data.scenes import scenes
from blip2edge.training.evaluation.scene_scores import evaluate_scenes

CALIBRATION_SEED = 4242


def score(bundle: Path, count: int) -> dict[str, Any]:
    """Returns the share of exactly right captions on held-out scenes, and the size of the bundle in bytes."""
    captioner = Captioner.load(bundle, backend="cpu", threads=1)
    scores = evaluate_scenes(
        lambda pictures: [result.text for result in captioner.caption_many(pictures, batch_size=16)], count
    )
    files = Bundle.open(bundle).manifest.files
    size = sum(record.size for name, record in files.items() if not name.startswith("report."))
    return {"exact_match": scores["exact_match"], "bytes": size}


def measure(folder: Path, pictures: int, count: int) -> dict[str, dict[str, Any]]:
    """Makes and scores a bundle for each precision; returns one row for each precision."""
    parent = export_checkpoint(CHECKPOINT, folder / "fp32").bundle
    images = folder / "images"
    images.mkdir()
    for index, scene in enumerate(scenes(pictures, split="train", seed=CALIBRATION_SEED)):
        scene.picture.save(images / f"{index:04d}.png")
    rows = {"fp32": score(parent, count)}
    for weights in ("int8", "int4"):
        report = calibrate(parent, folder / weights, images=images, weights=weights, threads=1)
        rows[weights] = score(report.bundle, count) | {
            "captions_as_the_parents": None if report.captions is None else report.captions.same,
            "cosine": {
                name: {output: value.mean for output, value in graph.cosine.items()}
                for name, graph in report.graphs.items()
            },
        }
    return rows


def main() -> None:
    """Prints one line for each precision and writes the JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("--pictures", type=int, default=200, help="number of calibration pictures (200)")
    parser.add_argument("--count", type=int, default=1000, help="number of held-out scenes (1000)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        rows = measure(Path(folder), options.pictures, options.count)
    for name, row in rows.items():
        print(f"{name:6} exact match {row['exact_match']:7.2%}  {row['bytes'] / 1e6:6.1f} MB")
    document = {
        "command": command(),
        "machine": system("onnx", "onnxruntime", "numpy", "torch"),
        "pictures": options.pictures,
        "heldout_scenes": options.count,
        "rows": rows,
    }
    write_json(RESULTS / "demo-precision.json", document)


if __name__ == "__main__":
    run_script(main)
