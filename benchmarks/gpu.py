"""Runs checks and measurements on an NVIDIA GPU, in three parts of at most 5 minutes each.

    python benchmarks/gpu.py --part 1 --json benchmarks/results/gpu-1.json     # CUDA itself; transformers, to compare
    python benchmarks/gpu.py --part 2 --json benchmarks/results/gpu-2.json     # ONNX Runtime's CUDA provider
    python benchmarks/gpu.py --part 3 --json benchmarks/results/gpu-3.json     # the decoder in CUDA kernels
    python benchmarks/gpu.py --dry-run                                         # all parts, tiny, on the CPU

``gpu_prepare.py`` makes files on another machine that save time here; ``docs/engines.md`` describes how to copy them.

Every step (``gpu_steps.py``) runs in a process of its own with a time limit. The JSON file is written after each step,
so a step that fails, hangs or is killed loses only its own result. A long step prints what it has measured so far; this
is kept if the step does not finish. SIGTERM ends the running step, and the JSON file says so. A dry run makes the same
JSON with tiny models on the CPU and a simulated GPU. It checks the script; its measured values have no meaning.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from gpu_steps import STEPS, Step
from reporting import ROOT, command, machine, parser_of, write_json

from blip2edge.cli import run_script

STEP_SCRIPT = Path(__file__).with_name("gpu_steps.py")
TAIL = 2000  # characters of a failed step's output that are kept
PART_S = 300.0
DRY_FACTOR = 10  # a dry run on a busy CPU gets more time
LATER_S = 5  # a step whose parent was killed ends itself so many seconds after its limit


def run_step(step: Step, dry: bool, limit_s: float) -> dict[str, Any]:
    """Runs a step in a process of its own; ends the process, and all processes that it has started, at its limit.

    Returns:
        ``status`` and ``seconds``; ``result`` is the last JSON object that the step printed, if any. A step that did
        not end well also has ``output`` (the end of its output) and ``exit_status`` (negative: the number of a signal).
    """
    words = [sys.executable, str(STEP_SCRIPT), step.name]
    words += ["--limit", str(math.ceil(limit_s + LATER_S)), *(["--dry-run"] if dry else [])]
    start, status = time.monotonic(), "ok"
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        # A group of its own: all of its processes are ended together. Files, because a process that is left would keep
        # a pipe open.
        process = subprocess.Popen(words, stdout=output, stderr=errors, cwd=ROOT, preexec_fn=os.setpgrp)
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = "timeout"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        printed = _text(output)
        found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        result = _last_json(printed)
        if result is not None:
            found["result"] = result
        if status == "ok" and (process.returncode or result is None):
            found |= {"status": "failed", "exit_status": process.returncode}
        if found["status"] != "ok":
            found["output"] = (printed + _text(errors))[-TAIL:]
    return found


def _text(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _last_json(printed: str) -> Any:
    """Returns the JSON object of the last line that has one; None if there is none."""
    for line in reversed(printed.splitlines()):
        if line.startswith("{"):
            with suppress(ValueError):  # a line that was cut
                return json.loads(line)
    return None


def _good(found: dict[str, Any]) -> bool:
    return found["status"] == "ok" and bool(found["result"].get("ok", True))


def main() -> int:
    """Runs the steps of a part, and writes their results; returns 1 if a step failed, or found something wrong."""
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
    signal.signal(signal.SIGTERM, _end)
    ends = {part: time.monotonic() + PART_S for part in {step.part for step in chosen}}
    for step in chosen:
        left = math.inf if options.dry_run or options.part is None else ends[step.part] - time.monotonic()
        limit = min(step.limit_s * (DRY_FACTOR if options.dry_run else 1), left)
        document["steps"][step.name] = {"status": "running"}
        write_json(options.json, document)
        try:
            found = run_step(step, options.dry_run, limit) if left > 1 else {"status": "no time left"}
        except BaseException:
            document["steps"][step.name] = {"status": "killed with the script"}
            write_json(options.json, document)
            raise
        document["steps"][step.name] = found
        write_json(options.json, document)
        shown = found.get("result", found.get("output", ""))
        print(f"{step.name}: {found['status']}, {found.get('seconds', 0)} s: {json.dumps(shown)}", flush=True)
    return 0 if all(_good(found) for found in document["steps"].values()) else 1


def _end(number: int, _: Any) -> None:
    """Ends the script at a signal, by an exception that also ends the running step."""
    sys.exit(128 + number)


if __name__ == "__main__":
    run_script(main)
