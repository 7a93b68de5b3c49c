"""``blip2edge bench``."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from typing import TYPE_CHECKING

from blip2edge.cli.files import write
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.runtime.bench.measure import WorkOf
    from blip2edge.runtime.captioning.captioner import Captioner


def bench(options: argparse.Namespace) -> int:
    """Measure a bundle and print a table, or JSON; a page where one is asked for."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the streaming read is one core's
    from blip2edge.runtime.bench.measure import BenchOptions, bench
    from blip2edge.runtime.bench.report import bench_page, markdown
    from blip2edge.runtime.captioning.captioner import Captioner

    chosen = BenchOptions(
        runs=options.runs, warmup=options.warmup, tokens=options.tokens, batches=tuple(options.batch_sizes)
    )
    start = time.perf_counter()
    captioner = Captioner.load(
        options.bundle, backend=options.backend, threads=options.threads, draft=options.draft
    )
    loaded = time.perf_counter() - start
    with Progress() as progress:
        report = bench(captioner, chosen, start_s=loaded, work_of=_work_of(captioner), progress=progress)
    print(json.dumps(report.to_json(), indent=2) if options.json else markdown(report))
    if options.html is not None:
        write(options.html, bench_page(report), "--html")
        print(f"{options.html}: the same with pictures", file=sys.stderr)
    return 0


def _work_of(captioner: Captioner) -> WorkOf | None:
    """What counts the stages' work; None where the onnx packages are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnx_ir")):
        return None
    from blip2edge.optimization.stage_cost import stage_costs

    return lambda prompt, tokens: stage_costs(captioner.bundle, prompt, tokens)
