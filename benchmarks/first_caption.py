"""Measures the commands at the beginning of README.md with a model of published size: seconds, bytes, memory.

    python benchmarks/first_caption.py --json benchmarks/results/first_caption.json

Draws a checkpoint with random weights, the sizes and the vocabulary of Salesforce/blip-image-captioning-base (224
million parameters), and pictures to calibrate on. Then it exports, calibrates and captions, each command in a process
of its own, and samples RssAnon + RssShmem of that process and its children. Nothing is downloaded. The captions of
random weights have no meaning, and are longer than real ones.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from export_memory import INTERVAL, tree_bytes
from random_checkpoint import published, write_checkpoint
from reporting import parser_of, python, write_result
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from blip2edge.cli import run_script
from blip2edge.training.data.scenes import scenes

MODEL = "blip-image-captioning-base"
SIDE = 384  # pixels, of the pictures
AGAIN = "caption again"  # the step that is not in the table of README.md


def write_tokenizer(directory: Path, size: int) -> None:
    """Writes a WordPiece tokenizer of BERT's size, with BERT's ids of special tokens; most tokens are invented."""
    names = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1037: "a", 1997: "of", 6302: "photo"}
    vocabulary = {names.get(number, f"w{number}"): number for number in range(size)}
    tokenizer: Any = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 102), ("[CLS]", 101))
    tokenizer.add_special_tokens(list(names.values())[:5])
    tokenizer.save(str(directory / "tokenizer.json"))
    shutil.rmtree(directory / "qformer_tokenizer")


def run(name: str, words: list[str], made: Path | None = None) -> dict[str, Any]:
    """Runs one command; returns its seconds, its peak memory in bytes, and the size of the bundle that it made."""
    start, peak, before = time.perf_counter(), 0, resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen([sys.executable, "-m", "blip2edge", *words], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    text = process.stdout.read() if process.stdout is not None else ""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
    figures: dict[str, Any] = {"command": name, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
    figures["peak_bytes"] = peak
    if made is not None:
        figures["bundle_bytes"] = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    else:
        figures["text"] = text.strip().splitlines()[-1]
    print(f"{name}: {seconds:.1f} s ({cpu:.1f} s of CPU time), peak {peak / 1e9:.2f} GB", flush=True)
    return figures


def main() -> None:
    """Writes the random checkpoint and the pictures, runs the commands, and writes the measured values."""
    parser = parser_of(__doc__)
    parser.add_argument("--pictures", type=int, default=64, help="number of pictures to calibrate on")
    parser.add_argument(
        "--work", type=Path, help="directory for 4 GB of files (default: the system's temporary directory)"
    )
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        base = Path(folder)
        weights = write_checkpoint(base / "checkpoint", published(MODEL), torch.float32, gain=1.5)
        write_tokenizer(base / "checkpoint", 30522)
        (base / "pictures").mkdir()
        for number, scene in enumerate(scenes(options.pictures, split="train", seed=7)):
            scene.picture.resize((SIDE, SIDE)).save(base / "pictures" / f"{number:03d}.jpg")
        checkpoint, bundle, smaller = (str(base / name) for name in ("checkpoint", "blip", "blip-int8"))
        pictures, count = str(base / "pictures"), ["--count", str(options.pictures)]
        steps = [
            run("export", ["export", checkpoint, "-o", bundle], Path(bundle)),
            run("caption in fp32", ["caption", f"{pictures}/000.jpg", "-b", bundle]),
            run("calibrate", ["calibrate", bundle, "-o", smaller, "--images", pictures, *count], Path(smaller)),
            run("caption", ["caption", f"{pictures}/000.jpg", "-b", smaller]),
        ]
        again = run(AGAIN, ["caption", f"{pictures}/000.jpg", "-b", smaller])
    write_result(
        options.json,
        model=MODEL,
        weight_bytes=weights,
        pictures=options.pictures,
        load=os.getloadavg()[1],
        versions=python("torch", "onnx", "onnxruntime"),
        steps=[*steps, again],
        seconds=round(sum(step["seconds"] for step in steps), 1),
    )


if __name__ == "__main__":
    run_script(main)
