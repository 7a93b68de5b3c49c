"""Compares stage 1 followed by stage 2 with stage 2 alone, at equal numbers of steps on the scenes.

    python benchmarks/stages.py --work DIR [--start examples/checkpoint] [--steps 150 300 900] [--seeds 0 1]

Both runs begin with a new Q-Former between the vision encoder and the language model of `--start`. The first run uses a
third of its steps for stage 1 and the rest for stage 2; the second run uses all steps for stage 2. The score is the
share of held-out scenes whose caption is exactly right.

Writes benchmarks/results/stages.json, in which results of other lengths and seeds are kept, and the curve next to
docs/training.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from reporting import CHECKPOINT, RESULTS, ROOT, write_json

from blip2edge.cli import run_script
from blip2edge.training.run import train

RESULT = RESULTS / "stages.json"
PICTURE = ROOT / "docs" / "stages.png"
SHARE = 3  # one step in three is of stage 1
BLOCK = "hidden_size = 128\nintermediate_size = 512\nnum_layers = 4\nnum_heads = 4\n"


def recipe(start: Path, seed: int, stage1: int, stage2: int, itg: float) -> str:
    """Returns the recipe of one run, as TOML."""
    optimizer = "batch_size = 16\nlearning_rate = 8e-4\nwarmup_steps = 100\n"
    return (
        f"seed = {seed}\nthreads = 1\n[loop]\nlog_every = 25\n"
        f'[model]\nvision_from = "{start}"\nlanguage_from = "{start}"\nnum_query_tokens = 8\ndropout = 0.0\n'
        f"[model.qformer]\n{BLOCK}"
        f"[stage1]\nsteps = {stage1}\nembed_dim = 64\n{optimizer}"
        f"[stage2]\nsteps = {stage2}\nitg_weight = {itg}\n{optimizer}"
    )


def run(work: Path, name: str, text: str, scenes: int) -> dict[str, Any]:
    """Trains once; returns the scores, and the losses of stage 2, each with its step in the whole run."""
    path, out = work / f"{name}.toml", work / name
    path.write_text(text)
    clock = time.process_time()
    record = train("stage2", path, out, force=True, log=print, evaluation_scenes=scenes)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    before = record["phases"].get("stage1", {}).get("steps", 0)
    curve = [[before + line["step"], round(line["losses"]["lm"], 5)] for line in lines if line["phase"] == "stage2"]
    return {
        "exact_match": record["heldout"]["exact_match"],
        "final_lm_loss": record["phases"]["stage2"]["losses"]["lm"],
        "cpu_seconds": round(time.process_time() - clock, 1),
        "curve": curve,
    }


def draw(runs: list[dict[str, Any]]) -> None:
    """Draws the loss of stage 2 over the steps, for the longest runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"stage 1, then stage 2": "tab:blue", "stage 2 alone": "tab:orange"}
    longest = max(each["steps"] for each in runs)
    runs = [each for each in runs if each["steps"] == longest]
    for each in runs:
        steps, losses = zip(*each["curve"], strict=True)
        label = each["name"] if each["seed"] == runs[0]["seed"] else None
        axes.plot(steps, losses, color=colours[each["name"]], label=label, linewidth=1.2)
    axes.set_yscale("log")
    axes.set_xlabel("steps, those of stage 1 included")
    axes.set_ylabel("loss of stage 2")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--work", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--start", type=Path, default=CHECKPOINT)
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[150, 300, 900], help="numbers of training steps to compare"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--scenes", type=int, default=1000, help="number of held-out scenes that are scored")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.is_file() else []
    for steps, seed in itertools.product(options.steps, options.seeds):
        runs = [each for each in runs if (each["steps"], each["seed"]) != (steps, seed)]
        for name, first in {"stage 1, then stage 2": steps // SHARE, "stage 2 alone": 0}.items():
            text = recipe(options.start.resolve(), seed, first, steps - first, 0.0)
            found = run(options.work, f"{steps}-{first}-{seed}", text, options.scenes)
            runs.append({"name": name, "steps": steps, "stage1_steps": first, "seed": seed, **found})
            print(f"{name}, {steps} steps, seed {seed}: {found['exact_match']:.1%}", flush=True)
    runs.sort(key=lambda each: (each["steps"], each["seed"], each["name"]))
    result = {
        "what": "held-out exact match on the scenes after equal numbers of steps at batch 16",
        "scenes": options.scenes,
        "runs": runs,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"processor": platform.processor() or platform.machine(), "threads": 1},
    }
    write_json(RESULT, result)
    draw(runs)


if __name__ == "__main__":
    run_script(main)
