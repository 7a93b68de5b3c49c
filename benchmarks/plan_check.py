"""Compares the times that ``plan`` predicts for this machine with the times that ``bench`` measures.

The script changes no constant of ``plan``.

    python benchmarks/plan_check.py --work DIR [--json benchmarks/results/plan.json]
    python benchmarks/plan_check.py --work DIR --independent [--json benchmarks/results/plan-independent.json]

The models run on one thread. The constants of ``plan`` were chosen on three models in fp32: the miniature of
``examples/checkpoint`` (BLIP-2), a model of the size of ``Salesforce/blip-image-captioning-base``, and a small LLaVA.
For these models, the comparison only shows how good the fit is. ``--independent`` measures three models of
``plan_shapes.py`` on which no constant was chosen, in fp32, INT8 and INT4.

All weights are random, except the miniature's. Each model is exported, calibrated (for INT8 and INT4) and optimized,
and captions a picture of 480 x 640. The bundles stay in ``--work`` and are used again. The least CPU time of
a stage (for the decoding: of a step) is compared, so that the load of other programs has little effect. The machine's
speed (operations and bytes per second) is measured in the same way. Medians and wall times are recorded too.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from plan_shapes import FITTED, INDEPENDENT, SHAPES
from random_checkpoint import published, write_checkpoint
from reporting import CHECKPOINT, RESULTS, parser_of, python, write_result
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from blip2edge.calibration.pipeline import calibrate
from blip2edge.cli import run_script
from blip2edge.cli.optimize import optimized
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.bench.measure import Bench, BenchOptions, bench
from blip2edge.runtime.bench.memory import run_memory
from blip2edge.runtime.bench.meters import CpuClock, MemoryMeter, resident_bytes
from blip2edge.runtime.bench.plan import PlanOptions, stage_ms
from blip2edge.runtime.bench.roofline import this_device
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.decoding.generate import argmax
from blip2edge.shapes.sources import find_shape

TOKENS = 20
WITHIN = 0.25
STAGES = ("preprocess", "vision", "bridge", "prefill", "decode", "total")


def write_bert_tokenizer(directory: Path) -> None:
    """Replaces the tokenizer by one that puts [CLS] and [SEP] around a text, like BERT's; BLIP's prompts need them."""
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 101, "[SEP]": 102, "a": 2, "photo": 3, "of": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    frame = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)])
    tokenizer.post_processor = frame
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]"}
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names})
    (directory / "tokenizer_config.json").write_text(config)


def remove_frame(directory: Path) -> None:
    """Changes the tokenizer so that it adds no special tokens around a text: Idefics' prompts contain them already."""
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))


def checkpoint_of(name: str, work: Path) -> Path:
    """Returns a model's checkpoint; writes one with random weights if it does not exist."""
    if name == "miniature":
        return CHECKPOINT
    directory = work / name
    if not directory.is_dir():
        write_checkpoint(directory, SHAPES.get(name) or published(name))
        if name not in SHAPES:
            write_bert_tokenizer(directory)
        elif name == "check-idefics":
            remove_frame(directory)
    return directory


def bundle_of(name: str, precision: str, checkpoint: Path, work: Path) -> Path:
    """Returns the directory of a checkpoint's bundle with its optimized copy.

    A bundle that does not exist is exported, and for INT8 and INT4 also calibrated.
    """
    bundle = work / f"{name}-{precision}"
    if not bundle.is_dir():
        if precision == "fp32":
            export_checkpoint(checkpoint, bundle, verify="sample", notify=print)
        else:
            parent = bundle_of(name, "fp32", checkpoint, work)
            pictures = CHECKPOINT.parent / "pictures"
            calibrate(parent, bundle, images=pictures, method="minmax", weights=precision, threads=1)
    if not (bundle / "optimized" / "cpu").is_dir():
        optimized(bundle)
    return bundle


def least_steps_ms(run: Bench, runs: int) -> float:
    """Returns the CPU milliseconds of decoding: the number of steps times the least time of a step in several captions.

    Other programs use the memory from time to time, which makes a step slower. A step is short, so that some of the
    steps run undisturbed; a whole caption is too long for that.
    """
    least = math.inf
    for _ in range(runs):
        encoded = run.captioner.encoder([run.picture], [run.prompt], CpuClock())
        logits, state = run.captioner.generator.prefill(encoded, CpuClock())
        for _ in range(TOKENS - 1):
            start = time.process_time()
            logits = state.step(argmax(logits))
            least = min(least, time.process_time() - start)
    return least * (TOKENS - 1) * 1e3


def compare(name: str, precision: str, work: Path, runs: int) -> dict[str, Any]:
    """Predicts and measures the times and the memory of one model; returns both."""
    checkpoint = checkpoint_of(name, work)
    bundle = bundle_of(name, precision, checkpoint, work)
    shape, _ = find_shape(str(checkpoint))
    before = resident_bytes()
    with MemoryMeter() as loading:
        captioner = Captioner.load(bundle, backend="cpu", threads=1)
    prompt = Bench(captioner).prompt_length() - shape.slots * shape.frames
    request = PlanOptions(prompt_tokens=max(prompt, 1), new_tokens=TOKENS, threads=1)
    devices = [this_device(1, shape.image_size)]
    options = BenchOptions(runs=runs, tokens=TOKENS, batches=(), prompts=(), lengths=())
    report = bench(captioner, options, start_s=0.0, start_bytes=loading.peak)
    steps_ms = least_steps_ms(Bench(captioner), runs)
    devices.append(this_device(1, shape.image_size))
    predictions = [stage_ms(shape, precision, device, request) for device in devices]
    predicted = {stage: min(one[stage] for one in predictions) for stage in STAGES}
    device, _ = min(zip(devices, predictions, strict=True), key=lambda pair: pair[1]["total"])
    measured = {stage: vars(report.stages[stage]) for stage in STAGES}
    saved = measured["decode"]["least_cpu_ms"] - steps_ms
    for stage in ("decode", "total"):
        measured[stage] = {**measured[stage], "least_cpu_ms": measured[stage]["least_cpu_ms"] - max(saved, 0.0)}
    stages = {stage: row(predicted[stage], found) for stage, found in measured.items()}
    memory = run_memory(shape, precision, device, shape.frames, request.prompt_tokens, TOKENS)
    return {
        "name": name,
        "precision": precision,
        "parameters": shape.parameters(),
        "prompt_tokens": request.prompt_tokens,
        "tokens": TOKENS,
        "device": {
            "gigabytes_per_s": round(device.bytes_per_s / 1e9, 1),
            "gigaops_per_s": {kind: round(rate / 1e9, 1) for kind, rate in device.rates.items()},
            "call_us": round(device.efficiency.call_s * 1e6, 2),
            "cached_gigabytes_per_s": round(device.bytes_per_s * device.efficiency.cached_bytes / 1e9, 1),
            "element_ns": round(device.efficiency.element_s * 1e9, 3),
            "host": round(device.host, 2),
        },
        "stages": {stage: found for stage, found in stages.items() if found["measured_cpu_ms"] > 0},
        "memory": {
            "predicted_without_workspace": memory.total - memory.workspace,
            "measured_growth": report.memory["captioning"] - before,
        },
    }


def least(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns, for each stage, the lowest prediction and the lowest measured time of all rounds, and their ratio."""
    fastest = min(rounds, key=lambda one: one["stages"]["total"]["predicted_ms"])
    stages = {}
    for stage in fastest["stages"]:
        all_rounds = [one["stages"][stage] for one in rounds]
        predicted = min(one["predicted_ms"] for one in all_rounds)
        measured = min(all_rounds, key=lambda one: one["measured_cpu_ms"])
        ratio = round(predicted / measured["measured_cpu_ms"], 3)
        stages[stage] = {**measured, "predicted_ms": predicted, "ratio": ratio}
    return {**fastest, "stages": stages, "rounds": len(rounds)}


def row(predicted: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entry of one stage: predicted time, measured time, and their ratio."""
    cpu = measured["least_cpu_ms"]
    return {
        "predicted_ms": round(predicted, 3),
        "measured_cpu_ms": round(cpu, 3),
        "median_cpu_ms": round(measured["cpu_ms"], 3),
        "wall_p50_ms": round(measured["ms"]["p50"], 3),
        "ratio": round(predicted / cpu, 3) if cpu > 0 else None,
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints a line for the memory and for each stage."""
    title, memory = f"{result['name']} {result['precision']}", result["memory"]
    print(f"{title:32} memory     " + ", ".join(f"{key} {value / 1e6:,.0f} MB" for key, value in memory.items()))
    for stage, found in result["stages"].items():
        within = abs(found["ratio"] - 1) <= WITHIN
        print(
            f"{title:32} {stage:10} predicted {found['predicted_ms']:9.2f} ms, measured "
            f"{found['measured_cpu_ms']:9.2f} ms CPU ({found['wall_p50_ms']:.2f} wall), ratio {found['ratio']:.2f}"
            f"{'' if within else '  MISSED'}",
            flush=True,
        )


def main() -> None:
    """Compares the models, prints a line for each stage, and writes the JSON file."""
    parser = parser_of(__doc__)
    parser.add_argument("--work", type=Path, required=True, help="directory for checkpoints and bundles (8 GB)")
    parser.add_argument(
        "--independent", action="store_true", help="measure the models on which plan's constants were not fitted"
    )
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="measure only these models")
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=("fp32", "int8", "int4"),
        help="precisions to measure (default: fp32; with --independent all)",
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=3, help="number of times that all models are measured")
    parser.add_argument("--fresh", action="store_true", help="make all checkpoints and bundles again")
    parser.add_argument("--json", type=Path, help=f"write the results to this file, such as {RESULTS / 'plan.json'}")
    options = parser.parse_args()
    if options.fresh:
        shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True, exist_ok=True)
    names = options.only or (INDEPENDENT if options.independent else FITTED)
    precisions = options.precisions or (("fp32", "int8", "int4") if options.independent else ("fp32",))
    rounds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _, name, precision in itertools.product(range(options.rounds), names, precisions):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # its memory is this model's alone
            found = process.submit(compare, name, precision, options.work, options.runs).result()
        rounds.setdefault((name, precision), []).append(found)
    results = [least(found) for found in rounds.values()]
    for result in results:
        show(result)
    all_stages = [found for result in results for found in result["stages"].values()]
    missed = [found for found in all_stages if abs(found["ratio"] - 1) > WITHIN]
    print(f"{len(all_stages) - len(missed)} of {len(all_stages)} stages within {WITHIN:.0%}")
    write_result(
        options.json,
        what="times that plan predicts for this machine, and those that bench measures; one thread",
        versions=python("onnxruntime", "numpy"),
        within=WITHIN,
        stages_within=len(all_stages) - len(missed),
        stages=len(all_stages),
        results=results,
    )


if __name__ == "__main__":
    run_script(main)
