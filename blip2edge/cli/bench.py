"""The command ``blip2edge bench``: its flags, and the function that runs it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.cli.flag_groups import add_backend, add_bundle, add_draft, add_number, print_unsigned
from blip2edge.cli.flag_types import non_negative_int, positive_int
from blip2edge.cli.next_steps import calibrate_command, print_next, quoted
from blip2edge.packages import missing
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse

    from blip2edge.cli.parser import Parser
    from blip2edge.runtime.bench.measure import CostOf
    from blip2edge.runtime.captioning.captioner import Captioner


def add_arguments(parser: Parser) -> None:
    """Add the flags of ``bench``."""
    add_bundle(parser)
    add_backend(parser)
    add_number(parser, "--runs", "number of captions that are timed", 10)
    add_number(parser, "--warmup", "number of captions that run before the timed captions", 2, kind=non_negative_int)
    add_number(parser, "--tokens", "number of tokens of each caption", 20)
    parser.add_argument(
        "--batch-sizes",
        metavar="N",
        type=positive_int,
        nargs="+",
        default=[1, 2, 4, 8],
        help="batch sizes to compare",
    )
    add_draft(
        parser,
        "draft model of speculative decoding, for which the tokens per decoder pass are reported; the stages are timed "
        "without a draft model",
    )
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object")
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="also write the results with charts to FILE, an HTML page"
    )


def run(options: argparse.Namespace) -> int:
    """Measure a bundle and print a table, or JSON; write a page with --html."""
    if options.html is not None:
        check_file(options.html, "html", ".html", ".htm")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the memory bandwidth is measured on one core
    from blip2edge.runtime.bench.measure import BenchOptions, bench
    from blip2edge.runtime.bench.meters import MemoryMeter
    from blip2edge.runtime.bench.report import bench_page, markdown
    from blip2edge.runtime.captioning.captioner import Captioner

    chosen = BenchOptions(
        runs=options.runs, warmup=options.warmup, tokens=options.tokens, batches=tuple(options.batch_sizes)
    )
    names = ("backend", "threads", "draft", "require_signature")
    start = time.perf_counter()
    with MemoryMeter() as loading:
        captioner = Captioner.load(options.bundle, **{name: getattr(options, name) for name in names})
    loaded = time.perf_counter() - start
    print_unsigned(captioner.bundle)
    with Progress() as progress:
        report = bench(
            captioner,
            chosen,
            start_s=loaded,
            start_bytes=loading.peak,
            cost_of=_cost_of(captioner),
            progress=progress,
        )
    print(json.dumps(report.to_json(), indent=2) if options.json else markdown(report))
    if options.html is not None:
        write_output(options.html, bench_page(report), "html")
        print(f"{options.html}: the results with charts", file=sys.stderr)
    if not options.json:
        smaller = calibrate_command(options.bundle, captioner.bundle.manifest)
        print_next(smaller or f"blip2edge serve {quoted(options.bundle)}")
    return 0


def _cost_of(captioner: Captioner) -> CostOf | None:
    """Returns a function that counts the operations and bytes of each stage; None if an onnx package is missing."""
    if missing(("onnx", "onnx_ir")):
        return None
    from blip2edge.optimization.stage_cost import stage_costs

    return lambda prompt, tokens: stage_costs(captioner.bundle, prompt, tokens)
