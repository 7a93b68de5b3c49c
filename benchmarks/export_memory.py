"""Measures the memory of an export at full size: ``python benchmarks/export_memory.py blip2-opt-2.7b``.

Writes a checkpoint of the named size with random fp16 weights (one shard at a time, in little memory), exports it in
its own process, and samples RssAnon + RssShmem of that process and its children. ``--depth 0.5`` halves every stack of
layers, to show that the memory does not grow with the model.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_checkpoint import published, scaled, write_checkpoint
from reporting import command, parser_of, python, write_json

from blip2edge.cli import run_script
from blip2edge.shapes.families import CONFIGS

SIZES = ("blip2-opt-2.7b", "blip2-flan-t5-xl", "instructblip-vicuna-7b")
"""Configurations of ``blip2edge/shapes/published`` for which the documentation states the memory of an export.

The other configurations of this folder can be measured too.
"""

INTERVAL = 0.02  # seconds between two samples


def tree_bytes(root: int) -> int:
    """Returns RssAnon + RssShmem of a process and all its descendants, in bytes."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
    tree, grown = {root}, True
    while grown:
        more = {pid for pid, parent in parents.items() if parent in tree} - tree
        tree |= more
        grown = bool(more)
    return sum(map(own_bytes, tree))


def own_bytes(pid: int) -> int:
    """Returns RssAnon + RssShmem of one process, in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("RssAnon", "RssShmem")))


def measure(checkpoint: Path, bundle: Path, precision: str) -> dict[str, float]:
    """Exports a checkpoint in a process of its own; returns the process's seconds and peak memory in bytes."""
    command = [sys.executable, "-m", "blip2edge", "export", str(checkpoint), "-o", str(bundle)]
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen([*command, "--precision", precision, "--verify", "sample"])
    while process.poll() is None:
        peak = max(peak, tree_bytes(process.pid))
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {"seconds": round(time.perf_counter() - start, 1), "peak_bytes": peak}


def main() -> None:
    """Writes and exports a checkpoint of each depth, and prints one line for each."""
    parser = parser_of(__doc__)
    known = sorted(path.stem for path in CONFIGS.glob("*.json"))
    parser.add_argument(
        "size", choices=known, metavar="SIZE", help=f"{', '.join(SIZES)}, or any of blip2edge/shapes/published"
    )
    parser.add_argument(
        "--depth", type=float, action="append", help="share of the model's layers; may be repeated (1.0 and 0.5)"
    )
    parser.add_argument("--precision", default="fp16")
    parser.add_argument(
        "--work", type=Path, help="directory for checkpoint and bundle, about 4 times the size of the weights"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    results = []
    for depth in options.depth or [1.0, 0.5]:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            checkpoint = Path(folder) / "checkpoint"
            weights = write_checkpoint(checkpoint, scaled(published(options.size), depth))
            figures = measure(checkpoint, Path(folder) / "bundle", options.precision)
        results.append({"depth": depth, "weight_bytes": weights, **figures})
        print(
            f"{options.size} x {depth:g}, {options.precision}: weights {weights / 1e9:.2f} GB, "
            f"peak RssAnon + RssShmem {figures['peak_bytes'] / 1e9:.2f} GB, {figures['seconds']:.0f} s",
            flush=True,
        )
    if options.json:
        document = {
            "command": command(),
            "machine": {
                "system": platform.platform(),
                "cores": os.cpu_count(),
                **python("torch", "onnx", "onnxruntime", "onnxscript"),
            },
            "size": options.size,
            "precision": options.precision,
            "results": results,
        }
        write_json(options.json, document)


if __name__ == "__main__":
    run_script(main)
