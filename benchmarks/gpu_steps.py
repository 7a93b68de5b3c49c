"""Lists the steps of ``gpu.py``. Called with the name of a step, this script runs the step and prints its result.

    python benchmarks/gpu_steps.py machine

A long step prints a JSON object several times: what it has measured so far. The last one is its result.
"""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gpu_cuda
import gpu_kernels
import gpu_onnxruntime
import gpu_true_size

from blip2edge.cli import run_script


@dataclass(frozen=True)
class Step:
    """A step: its name, the part that it belongs to, its time limit, and the function that returns its result.

    The argument of ``run`` is whether this is a dry run.
    """

    name: str
    part: int
    limit_s: float
    run: Callable[[bool], dict[str, Any]]


STEPS = (
    Step("machine", 1, 30, gpu_cuda.machine),
    Step("bandwidth", 1, 30, gpu_cuda.bandwidth),
    Step("cuda_layer", 1, 30, gpu_cuda.cuda_layer),
    Step("captured_torch", 1, 30, gpu_cuda.captured_torch),
    Step("runtime", 1, 90, gpu_cuda.runtime),
    Step("eager", 1, 90, gpu_cuda.peer),
    Step("compiled", 1, 120, gpu_cuda.compiled),
    Step("provider", 2, 90, gpu_onnxruntime.provider),
    Step("true_size", 2, 240, gpu_true_size.true_size),
    Step("cuda_graphs", 2, 60, gpu_onnxruntime.cuda_graphs),
    Step("overlap", 2, 60, gpu_onnxruntime.overlap),
    Step("kernel_ids", 3, 120, gpu_kernels.kernel_ids),
    Step("kernel_draws", 3, 60, gpu_kernels.kernel_draws),
    Step("kernel_beams", 3, 60, gpu_kernels.kernel_beams),
    Step("kernel_speed", 3, 150, gpu_kernels.kernel_speed),
)


def main() -> None:
    """Runs the step that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=[step.name for step in STEPS])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--limit", type=int, default=0, help="seconds until the step is ended (default: none)")
    options = parser.parse_args()
    signal.alarm(options.limit)  # ends the process, also one that waits for the GPU, if gpu.py was killed
    (step,) = (step for step in STEPS if step.name == options.step)
    print(json.dumps(step.run(options.dry_run)), flush=True)


if __name__ == "__main__":
    run_script(main)
