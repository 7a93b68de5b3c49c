"""Runs CapFilt on scenes with planted wrong captions, and scores captioners trained without and with CapFilt.

    python benchmarks/capfilt_scenes.py --work DIR --write benchmarks/results/capfilt-scenes.json

The "web pictures" are scenes, and a share of them has a wrong caption. Half of the wrong captions belong to another
scene; in the other half, one object of the right caption is changed. A captioner that was trained on a small clean set
(stage 2; BLIP used COCO) writes the synthetic captions. The matching head, which filters the captions, is trained on
right captions of other scenes (stage 1). Then one captioner is trained on the web captions and one on CapFilt's output,
with the same frozen parts, recipe and number of steps. `eval` scores both on held-out scenes. Every step uses the
public commands.
"""

from __future__ import annotations

import argparse
import json
import platform
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
from reporting import CHECKPOINT, parser_of, write_json

from blip2edge import __version__
from blip2edge.cli import main as command_line
from blip2edge.cli import run_script
from blip2edge.training.data.entries import BrokenSamples
from blip2edge.training.data.scenes import make_scene
from blip2edge.training.data.shards import ShardWriter, read_shards, shard_paths
from blip2edge.training.metrics.hallucination import pope_questions, things_shown

TRAINED_ON = {
    "clean": "the captioner that writes",
    "web": "before: the web as it is",
    "filtered": "after: what CapFilt made of it",
}
SIZES = ("web", "clean", "share", "steps", "captioner_steps", "scenes")
WEB_SERIES, CLEAN_SERIES = 31, 32  # series of scenes that the example checkpoint was not trained on
RECIPE = """
seed = {seed}
weights_dtype = "float32"

[data]
{data}
prompt_share = 0.0

[model]
vision_from = "{checkpoint}"
language_from = "{checkpoint}"
num_query_tokens = 8

[model.qformer]
hidden_size = 128
intermediate_size = 512
num_layers = 4
num_heads = 4

[loop]
cache_features = true
features_dtype = "{features}"

{phase}
"""
STAGE2 = "[stage2]\nsteps = {steps}\nbatch_size = 16\nlearning_rate = 1e-3\nwarmup_steps = 50"
STAGE1 = "[stage1]\nsteps = 400\nbatch_size = 16\nlearning_rate = 8e-4\nwarmup_steps = 40\nembed_dim = 64"
# Scenes with right captions, which no other step uses.
MATCHER_DATA = 'kind = "scenes"\ncount = 8000\nseries = 21\nprompts = []'
MATCHER_SEED = 5


def blip2edge(*arguments: str) -> str:
    """Runs a command in this process and returns its output."""
    printed = StringIO()
    with redirect_stdout(printed):
        status = command_line(list(arguments))
    if status:
        raise SystemExit(status)
    return printed.getvalue()


def write_scenes(directory: Path, series: int, count: int, captions: list[str] | None = None) -> None:
    """Writes scenes as shards, with the given captions, or with the right ones if None is given."""
    writer = ShardWriter(directory)
    for number in range(count):
        scene = make_scene(number, seed=series)
        content = BytesIO()
        scene.picture.save(content, "PNG")
        caption = scene.caption if captions is None else captions[number]
        writer.add(f"{number:06d}", content.getvalue(), ".png", [caption], {"image_id": f"{series}-{number}"})
    writer.close()


def planted(series: int, count: int, share: float, seed: int) -> list[str]:
    """Returns the captions of scenes; the given share of the captions is wrong."""
    rng = np.random.default_rng(seed)
    scenes = [make_scene(number, seed=series) for number in range(count)]
    near = [
        probe
        for probe in pope_questions([things_shown(scene) for scene in scenes], seed=seed)
        if probe.negatives == "adversarial"
    ]
    captions = [scene.caption for scene in scenes]
    for place, number in enumerate(rng.permutation(count)[: round(share * count)].tolist()):
        if place % 2:
            captions[number] = near[2 * number + int(rng.integers(2))].statement(scenes[number].caption)
        else:
            captions[number] = scenes[(number + 1 + int(rng.integers(count - 1))) % count].caption
    return captions


def train(work: Path, name: str, stage: str, recipe: str, reuse: bool) -> Path:
    """Writes a recipe and trains with the recipe. Returns the checkpoint's directory."""
    path = work / f"{name}.toml"
    path.write_text(recipe, encoding="utf-8")
    if not (reuse and (work / name).is_dir()):
        blip2edge("train", stage, "-c", str(path), "-o", str(work / name), "--force")
    return work / name


def captioner(work: Path, name: str, data: str, steps: int, options: argparse.Namespace) -> Path:
    """Trains a captioner on shards."""
    recipe = RECIPE.format(
        seed=options.seed,
        data=f'kind = "shards"\npath = "{work / data}"',
        checkpoint=CHECKPOINT,
        features="float32",
        phase=STAGE2.format(steps=steps),
    )
    return train(work, f"captioner-{name}", "stage2", recipe, options.reuse)


def matching_head(work: Path, options: argparse.Namespace) -> Path:
    """Trains the matcher that filters the captions, unless a trained one is given. Returns its directory."""
    recipe = RECIPE.format(
        seed=MATCHER_SEED, data=MATCHER_DATA, checkpoint=CHECKPOINT, features="float16", phase=STAGE1
    )
    given: Path | None = options.matcher
    return given.absolute() if given is not None else train(work, "matcher", "stage1", recipe, options.reuse)


def filtered(work: Path, writer: Path, matcher: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Runs CapFilt on the web captions. Returns its report."""
    path = work / "filtered" / "report.json"
    if not (options.reuse and path.is_file()):
        models = ["--captioner", str(writer), "--matcher", str(matcher)]
        output = ["-o", str(path.parent), "--threshold", str(options.threshold), "--force"]
        blip2edge("capfilt", str(work / "web"), *models, *output, "--threads", "1", "--batch-size", "50")
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def cpu_seconds(model: Path) -> float:
    """Returns the CPU seconds of a training, read from its record `training.json`."""
    record: dict[str, Any] = json.loads((model / "training.json").read_text(encoding="utf-8"))
    return float(record["cpu_seconds"])


def score(model: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns a model's scores on held-out scenes; the output of `eval` is kept in the working directory."""
    path: Path = options.work / f"eval-{name}.json"
    if not (options.reuse and path.is_file()):
        path.write_text(blip2edge("eval", str(model), "--count", str(options.scenes), "--threads", "1", "--json"))
    figures = json.loads(path.read_text())
    names = ("exact_match", "chair_i", "cider_d", "text_r1", "image_r1")
    found = {name: round(figures[name], 4) for name in names if name in figures}
    return {**found, "pope_adversarial_f1": round(figures["pope"]["adversarial"]["f1"], 4)}


def filtering(kept: Path, web: list[str], right: list[str]) -> dict[str, Any]:
    """Returns how well the filter separates right from wrong web captions, and how many of the kept captions are right.

    Args:
        kept: Directory with CapFilt's output.
        web: The captions of the web pictures, some of them wrong.
        right: The right captions of the same pictures.
    """
    captions: dict[int, list[tuple[str, str]]] = {}
    for path in shard_paths(kept):
        for entry in read_shards([path], BrokenSamples("kept", 0)):
            captions.setdefault(int(entry.image_id.partition("-")[2]), []).append((entry.text, ""))
    said = {number: {text for text, _ in rows} for number, rows in captions.items()}
    wrong = [number for number, text in enumerate(web) if text != right[number]]
    true = [number for number, text in enumerate(web) if text == right[number]]
    every = [(number, text) for number, texts in said.items() for text in texts]
    return {
        "wrong_dropped": round(sum(web[n] not in said.get(n, ()) for n in wrong) / len(wrong), 4),
        "right_kept": round(sum(web[n] in said.get(n, ()) for n in true) / len(true), 4),
        "kept_captions": len(every),
        "kept_that_are_right": round(sum(text == right[n] for n, text in every) / len(every), 4),
        "pictures_with_the_right_caption": round(
            sum(right[n] in said.get(n, ()) for n in range(len(web))) / len(web), 4
        ),
    }


def parsed() -> argparse.Namespace:
    """Parses the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for data and checkpoints")
    parser.add_argument("--write", type=Path, help="write the results to this JSON file")
    parser.add_argument("--web", type=int, default=1000, help="number of web pictures (1000)")
    parser.add_argument("--clean", type=int, default=600, help="number of pictures in the clean set (600)")
    parser.add_argument("--share", type=float, default=0.6, help="share of web captions that are wrong (0.6)")
    parser.add_argument("--steps", type=int, default=250, help="training steps of each scored captioner (250)")
    parser.add_argument(
        "--captioner-steps", type=int, default=500, help="training steps of the captioner that writes captions (500)"
    )
    parser.add_argument("--threshold", type=float, default=0.5, help="smallest score of a caption that is kept (0.5)")
    parser.add_argument("--scenes", type=int, default=200, help="number of held-out scenes that are scored (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matcher", type=Path, help="use this matching head, from an earlier run of this script")
    parser.add_argument("--reuse", action="store_true", help="use checkpoints and data that are in --work already")
    return parser.parse_args()


def main() -> None:
    """Runs all steps and writes the result."""
    options = parsed()
    work: Path = options.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    web = planted(WEB_SERIES, options.web, options.share, options.seed)
    right = [make_scene(number, seed=WEB_SERIES).caption for number in range(options.web)]
    if not (options.reuse and (work / "web").is_dir()):
        write_scenes(work / "web", WEB_SERIES, options.web, web)
        write_scenes(work / "small", CLEAN_SERIES, options.clean)
    clean = captioner(work, "clean", "small", options.captioner_steps, options)
    matcher = matching_head(work, options)
    report = filtered(work, clean, matcher, options)
    trained = {
        "clean": clean,
        "web": captioner(work, "web", "web", options.steps, options),
        "filtered": captioner(work, "filtered", "filtered", options.steps, options),
    }
    result = {
        "what": "captioners trained on scenes with planted wrong captions, before and after CapFilt",
        "sizes": {key: getattr(options, key) for key in SIZES},
        "wrong_captions": sum(text != truth for text, truth in zip(web, right, strict=True)),
        "matcher": score(matcher, "matcher", options),
        "filter": filtering(work / "filtered", web, right),
        "report": {key: report[key] for key in ("threshold", "keep", "pictures", "web", "synthetic", "seconds")},
        "heldout": {TRAINED_ON[name]: score(model, name, options) for name, model in trained.items()},
        "cpu_seconds": {name: cpu_seconds(model) for name, model in {"matcher": matcher, **trained}.items()},
        "machine": {"processor": platform.machine(), "threads": 1, "python": platform.python_version()},
        "blip2edge": __version__,
        "seed": options.seed,
    }
    write_json(options.write, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_script(main)
