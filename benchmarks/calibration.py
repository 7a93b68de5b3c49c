"""Measures the memory of a calibration (``python benchmarks/calibration.py memory``) and the speed of INT8 (``race``).

``memory`` calibrates the example checkpoint on 50 and on 500 scenes, each time in its own process, whose anonymous
memory is sampled. ``race`` compares three graphs of a ViT-B/16 with random weights at 224 pixels: fp32, the INT8 file
that TensorRT takes, and that file as ``optimize`` rewrites it for the CPU. They run in turn (A B C A B C ...) in one
process on one thread; CPU time of the process is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from export_memory import INTERVAL, tree_bytes
from random_checkpoint import SHAPE, write_checkpoint
from reporting import (
    CHECKPOINT,
    RESULTS,
    bundle_path,
    command,
    cpu_model,
    in_turn,
    median_ratio,
    parser_of,
    system,
    write_json,
)

from blip2edge.bundle.schema import VISION
from blip2edge.calibration.agreement import cosine_similarity
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.optimization.recipes import PassContext, Recipe, apply_recipe
from blip2edge.runtime.backends.onnxruntime_cpu import OnnxRuntimeSession
from blip2edge.training.data.scenes import scenes

SMALL_REST: dict[str, Any] = {
    "qformer_config": {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4},
    "text_config": {
        "model_type": "opt",
        "num_hidden_layers": 1,
        "hidden_size": 256,
        "num_attention_heads": 4,
    },
}
"""Configuration of the bridge and the language model; both are small, because only the vision encoder is measured."""

PICTURE_SIZE = 256  # pixels: side of the picture files
RACE_SIZE = 224  # pixels: side of the encoder's input
RACE_PICTURES = 16  # calibration pictures of the raced bundle; few, because ranges do not change the speed
COPIES = {
    "int8 for the CPU: recorded ranges": ("recorded ranges",),
    "int8 for the CPU: recorded ranges, fused": ("recorded ranges", "fused attention", "fused activations"),
}


def draw(folder: Path, count: int) -> None:
    """Writes enlarged pictures of training scenes as PNG files."""
    folder.mkdir()
    for index, scene in enumerate(scenes(count, split="train", seed=7)):
        scene.picture.resize((PICTURE_SIZE, PICTURE_SIZE)).save(folder / f"{index:04d}.png")


def calibrate(parent: Path, target: Path, images: Path, count: int) -> dict[str, Any]:
    """Calibrates in a process of its own; returns the process's seconds, peak memory in bytes and a progress line."""
    command = [
        sys.executable, "-m", "blip2edge", "calibrate", str(parent), "-o", str(target), "--images", str(images),
        "--count", str(count), "--weights", "none", "--threads", "1", "--no-optimize",
    ]  # fmt: skip
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(target.parent / f"cache-{count}"),
        "OMP_NUM_THREADS": "1",
    }
    log = target.parent / f"progress-{count}.txt"
    start, peak = time.perf_counter(), 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stderr=output, env=environment)
        while process.poll() is None:
            peak = max(peak, tree_bytes(process.pid))
            time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(log.read_text())
    estimates = [line for line in log.read_text().splitlines() if line.endswith("left")]
    return {
        "pictures": count,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": peak,
        "an_estimate": estimates[len(estimates) // 2] if estimates else None,
    }


def contestants(parent: Path, bundle: Path, folder: Path) -> dict[str, Path]:
    """Returns the path of each measured ONNX graph, by the graph's name in the result."""
    found = {"fp32": parent / f"{VISION}.onnx", "int8 as TensorRT takes it": bundle / f"{VISION}.onnx"}
    for index, (name, passes) in enumerate(COPIES.items()):
        model = ir.load(bundle / f"{VISION}.onnx")
        if apply_recipe(model, Recipe(passes), PassContext(None, 0)) is None:
            raise SystemExit(f"{name}: nothing to rewrite")
        path = folder / f"copy{index}.onnx"
        ir.save(model, path, external_data=f"{path.name}.data")
        found[name] = path
    return found


def race(graphs: dict[str, Path], pixels: np.ndarray[Any, Any], rounds: int) -> dict[str, dict[str, float]]:
    """Runs the graphs in turn; returns CPU milliseconds, speed and cosine of each graph, by its name.

    The speed is relative to the fp32 graph, and the cosine compares the outputs with those of the fp32 graph.
    """
    sessions = {name: OnnxRuntimeSession(path, 1) for name, path in graphs.items()}
    calls = {name: partial(session.run, {"pixel_values": pixels}) for name, session in sessions.items()}
    spent, outputs = in_turn(calls, rounds)
    return {
        name: {
            "milliseconds": round(statistics.median(times) * 1e3, 1),
            "times_fp32": round(median_ratio(spent["fp32"], times), 2),
            "cosine": round(cosine_similarity(*(outputs[each]["image_embeds"] for each in ("fp32", name))), 5),
        }
        for name, times in spent.items()
    }


def measure_memory(folder: Path, parent: Path | None, counts: list[int]) -> dict[str, Any]:
    """Returns the peak memory of calibrations on different numbers of scenes."""
    draw(folder / "images", max(counts))
    parent = parent or export_checkpoint(CHECKPOINT, folder / "parent").bundle
    runs = [calibrate(parent, folder / f"int8-{count}", folder / "images", count) for count in counts]
    return {"model": "examples/checkpoint", "runs": runs}


def measure_race(folder: Path, given: tuple[Path, Path] | None, rounds: int) -> dict[str, Any]:
    """Returns sizes and times of the given fp32 and INT8 bundles; if `given` is None, makes the bundles first."""
    if given is None:
        draw(folder / "images", RACE_PICTURES)
        write_checkpoint(folder / "checkpoint", {**SHAPE, **SMALL_REST}, torch.float32)
        given = export_checkpoint(folder / "checkpoint", folder / "parent").bundle, folder / "int8"
        calibrate(given[0], given[1], folder / "images", RACE_PICTURES)
    parent, bundle = given
    sizes = [sum(path.stat().st_size for path in root.glob(f"{VISION}.onnx*")) for root in given]
    pixels = np.random.default_rng(0).normal(size=(1, 3, RACE_SIZE, RACE_SIZE)).astype(np.float32)
    return {
        "model": f"ViT-B/16 with random weights, {RACE_SIZE} pixels",
        "vision_bytes": {"fp32": sizes[0], "int8": sizes[1], "ratio": round(sizes[1] / sizes[0], 4)},
        "graphs": race(contestants(parent, bundle, folder), pixels, rounds),
    }


def main() -> None:
    """Runs the measurement of the command line, prints the result and writes it as JSON."""
    parser = parser_of(__doc__)
    parser.add_argument("part", choices=("memory", "race"))
    parser.add_argument("--counts", type=int, nargs="+", default=[50, 500], help="for memory: picture counts (50 500)")
    parser.add_argument("--rounds", type=int, default=15, help="for race: number of rounds (15)")
    parser.add_argument("--parent", type=bundle_path, help="fp32 bundle to measure (default: export one)")
    parser.add_argument("--bundle", type=bundle_path, help="for race: the INT8 bundle calibrated from --parent")
    parser.add_argument("--work", type=Path, help="directory for checkpoint and bundles, about 2 GB")
    options = parser.parse_args()
    given = (options.parent, options.bundle) if options.parent and options.bundle else None
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        figures = (
            measure_memory(Path(folder), options.parent, options.counts)
            if options.part == "memory"
            else measure_race(Path(folder), given, options.rounds)
        )
    document = {
        "command": command(options.part),
        "machine": {"cpu": cpu_model(), **system("onnxruntime", "onnx", "numpy")},
        **figures,
    }
    print(json.dumps(document, indent=2))
    write_json(RESULTS / f"calibration-{options.part}.json", document)


if __name__ == "__main__":
    run_script(main)
