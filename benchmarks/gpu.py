"""Runs checks and measurements on an NVIDIA GPU, in three parts of at most 5 minutes each.

    python benchmarks/gpu.py --part 1 --json benchmarks/results/gpu-1.json     # CUDA itself; transformers, to compare
    python benchmarks/gpu.py --part 2 --json benchmarks/results/gpu-2.json     # ONNX Runtime's CUDA provider
    python benchmarks/gpu.py --part 3 --json benchmarks/results/gpu-3.json     # the decoder in CUDA kernels
    python benchmarks/gpu.py --dry-run                                         # all parts, tiny, on the CPU

Every step (``gpu_steps.py``) runs in a process of its own with a time limit. The JSON file is written after each step,
so a step that fails, hangs or is killed loses only its own result. A dry run makes the same JSON with tiny models on
the CPU and a simulated GPU. It checks the script; its measured values have no meaning.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_steps import STEPS, Step
from reporting import ROOT, command, machine, parser_of, write_json

from blip2edge.cli import run_script

TAIL = 2000  # characters of a failed step's output that are kept
PART_S = 300.0
DRY_FACTOR = 10  # a dry run on a busy CPU gets more time


def run_step(step: Step, dry: bool, limit_s: float) -> dict[str, Any]:
    """Runs a step in a process of its own; returns ``status``, ``seconds``, and its ``result`` or its ``output``."""
    words = [sys.executable, str(Path(__file__).with_name("gpu_steps.py")), step.name, *(["--dry-run"] if dry else [])]
    start = time.monotonic()
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit_s, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired as error:
        output = (error.stderr or b"").decode(errors="replace")
        return {"status": "timeout", "seconds": round(time.monotonic() - start, 1), "output": output[-TAIL:]}
    seconds = round(time.monotonic() - start, 1)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    try:
        if done.returncode == 0:
            return {"status": "ok", "seconds": seconds, "result": json.loads(last[0])}
    except ValueError:
        pass
    output = (done.stdout + done.stderr)[-TAIL:]
    return {"status": "failed", "seconds": seconds, "exit_status": done.returncode, "output": output}


def main() -> int:
    """Runs the steps that the command line chooses, and writes their results."""
    parser = parser_of(__doc__)
    parts = "1: CUDA and transformers; 2: ONNX Runtime with CUDA; 3: the decoder in CUDA kernels"
    parser.add_argument("--part", type=int, choices=(1, 2, 3), help=parts)
    parser.add_argument("--steps", nargs="+", choices=[step.name for step in STEPS], help="steps to run (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="run tiny models on the CPU, with a simulated GPU")
    parser.add_argument("--json", type=Path, help="write the results to this file after each step")
    options = parser.parse_args()
    chosen = [
        step
        for step in STEPS
        if (options.part is None or step.part == options.part) and (not options.steps or step.name in options.steps)
    ]
    document: dict[str, Any] = {
        "command": command(),
        "machine": machine(),
        "dry_run": options.dry_run,
        "steps": {step.name: {"status": "not started"} for step in chosen},
    }
    write_json(options.json, document)
    ends = {part: time.monotonic() + PART_S for part in {step.part for step in chosen}}
    for step in chosen:
        left = math.inf if options.dry_run or options.part is None else ends[step.part] - time.monotonic()
        limit = min(step.limit_s * (DRY_FACTOR if options.dry_run else 1), left)
        found = run_step(step, options.dry_run, limit) if left > 1 else {"status": "no time left"}
        document["steps"][step.name] = found
        write_json(options.json, document)
        shown = found.get("result", found.get("output", ""))
        print(f"{step.name}: {found['status']}, {found.get('seconds', 0)} s: {json.dumps(shown)}", flush=True)
    return 0 if all(found["status"] == "ok" for found in document["steps"].values()) else 1


if __name__ == "__main__":
    run_script(main)
