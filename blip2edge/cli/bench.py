"""``blip2edge bench``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.files import write
from blip2edge.cli.flag_groups import add_backend, add_draft
from blip2edge.cli.flag_types import non_negative_int, positive_int
from blip2edge.packages import missing
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.runtime.bench.measure import CostOf
    from blip2edge.runtime.captioning.captioner import Captioner


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bench``."""
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    add_backend(parser)
    parser.add_argument("--runs", metavar="N", type=positive_int, default=10, help="captions that are timed (10)")
    parser.add_argument("--warmup", metavar="N", type=non_negative_int, default=2, help="captions before them (2)")
    parser.add_argument(
        "--tokens", metavar="N", type=positive_int, default=20, help="length of a caption, in tokens (20)"
    )
    parser.add_argument(
        "--batch-sizes",
        metavar="N",
        type=positive_int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="batch sizes to compare (1 2 4 8)",
    )
    add_draft(
        parser,
        "draft model whose accepted tokens per pass are reported; the stages are timed without speculative decoding",
    )
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with charts to FILE")


def run(options: argparse.Namespace) -> int:
    """Measure a bundle and print a table, or JSON; write a page with --html."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the memory bandwidth is measured on one core
    from blip2edge.runtime.bench.measure import BenchOptions, bench
    from blip2edge.runtime.bench.report import bench_page, markdown
    from blip2edge.runtime.captioning.captioner import Captioner

    chosen = BenchOptions(
        runs=options.runs, warmup=options.warmup, tokens=options.tokens, batches=tuple(options.batch_sizes)
    )
    start = time.perf_counter()
    captioner = Captioner.load(options.bundle, backend=options.backend, threads=options.threads, draft=options.draft)
    loaded = time.perf_counter() - start
    with Progress() as progress:
        report = bench(captioner, chosen, start_s=loaded, cost_of=_cost_of(captioner), progress=progress)
    print(json.dumps(report.to_json(), indent=2) if options.json else markdown(report))
    if options.html is not None:
        write(options.html, bench_page(report), "--html")
        print(f"{options.html}: the same with charts", file=sys.stderr)
    return 0


def _cost_of(captioner: Captioner) -> CostOf | None:
    """Counts the operations and bytes of each stage; None where the onnx packages are not installed."""
    if missing(("onnx", "onnx_ir")):
        return None
    from blip2edge.optimization.stage_cost import stage_costs

    return lambda prompt, tokens: stage_costs(captioner.bundle, prompt, tokens)
