"""Measures the gain of the scheduler: vision overlapped with decoding, and continuous batching of random arrivals.

    python benchmarks/scheduling.py --json benchmarks/results/scheduling.json --trace docs/overlap.svg

1. *Overlap*: captions several pictures one by one on all cores, and through the scheduler with one decoding row. The
   scheduler runs with half of the cores for each thread, so that the next picture is encoded while this one is
   decoded, and with all cores for both threads, which then work in turn. Measures wall time; all variants run in
   turn (A B C A B C), and their captions are equal.
2. *Arrivals*: pictures arrive at random (a Poisson process) and need captions of mixed lengths. Finds the highest rate
   of arrivals at which 99 % of the captions are ready within a time limit, one by one and with continuous batching.
   Both get the same arrivals.

The captioner has random weights and the sizes of the captioner in `benchmarks/peers.py`. The script uses all cores and
measures wall time, so the machine should do nothing else; the machine's load is recorded.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from random_checkpoint import SHAPE, write_checkpoint
from reporting import bundle_path, cpu_model, in_turn, median_ratio, parser_of, write_json

from blip2edge.charts import element, label, svg_file
from blip2edge.cli import run_script
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.runtime.backends.probe import cores
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import Span

RATES = (
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    1.0,
    1.15,
    1.3,
    1.5,
    1.7,
    2.0,
)  # rates of arrival, relative to the rate of captioning one by one
PATIENCE = 6.0  # limit on 99 % of the waiting times, in seconds of one caption made alone
TOKENS = (5, 40)  # shortest and longest caption of the arrivals


def fixed(tokens: int) -> dict[str, Any]:
    """Returns the generation options for a caption of exactly ``tokens`` tokens."""
    return {"max_new_tokens": tokens, "min_new_tokens": tokens}


Tokens = list[tuple[int, ...]]


def streamed(captioner: Captioner, pictures: list[np.ndarray], options: dict[str, Any], spans: list[Span]) -> Tokens:
    """Captions the pictures through a scheduler with one decoding row."""
    spans.clear()
    with captioner.scheduler(max_batch=1, trace=spans.append) as scheduler:
        requests = [scheduler.submit(picture, captioner.options(**options)) for picture in pictures]
        return [request.result().tokens for request in requests]


def overlap(
    whole: Captioner, half: Captioner, pictures: list[np.ndarray], tokens: int, rounds: int
) -> tuple[dict[str, Any], list[Span]]:
    """Measures three ways to caption the pictures.

    The pictures are captioned one by one on all cores; by the scheduler, whose encoding and decoding threads use half
    of the cores each; and by the scheduler again, each of whose two threads uses all cores.

    Returns the wall seconds by round; also, for the scheduler on half of the cores, the time spans in which its two
    threads worked in the last round.

    Args:
        whole: A captioner that uses all cores.
        half: A captioner of the same bundle that uses half of the cores.
        pictures: The pictures to caption.
        tokens: Length of every caption.
        rounds: Measured rounds, after one round of warm-up.
    """
    options, spans, unseen = fixed(tokens), list[Span](), list[Span]()
    ways: dict[str, Callable[[], Tokens]] = {
        "one_by_one": lambda: [whole.caption(picture, **options).tokens for picture in pictures],
        "overlapped": lambda: streamed(half, pictures, options, spans),
        "in_turn": lambda: streamed(whole, pictures, options, unseen),
    }

    def check(given: dict[str, Tokens]) -> None:
        if any(tokens != given["one_by_one"] for tokens in given.values()):
            raise SystemExit("the scheduler gave other tokens than one by one")

    exact, _ = in_turn(ways, rounds, check, time.perf_counter)
    seconds = {name: [round(value, 3) for value in values] for name, values in exact.items()}
    ratios = {
        f"{name}_throughput": round(median_ratio(seconds["one_by_one"], seconds[name]), 3)
        for name in ("overlapped", "in_turn")
    }
    record = {"pictures": len(pictures), "tokens": tokens, "seconds": seconds, **ratios}
    return record | {"busy_together": round(together(spans), 3)}, spans


def together(spans: list[Span]) -> float:
    """Returns the share of the time, from the first span to the last, in which both threads are busy."""
    events = sorted([(span.start, 1) for span in spans] + [(span.end, -1) for span in spans])
    both, active, last = 0.0, 0, events[0][0]
    for at, change in events:
        both += (at - last) * (active >= 2)
        active, last = active + change, at
    return both / (events[-1][0] - events[0][0])


def arrivals(captioner: Captioner, picture: np.ndarray, rate: float, count: int, batch: int) -> dict[str, float]:
    """Captions pictures that arrive at ``rate`` per second; returns waiting times (s), and captions per second."""
    rng = np.random.default_rng(7)  # the same for every way of serving
    gaps, lengths = rng.exponential(1.0, count) / rate, rng.integers(TOKENS[0], TOKENS[1] + 1, count)
    waits: list[float] = []
    with captioner.scheduler(max_batch=batch, max_waiting=count) as scheduler:
        start = due = time.perf_counter()
        requests = []
        for gap, length in zip(gaps, lengths, strict=True):
            due += float(gap)
            time.sleep(max(0.0, due - time.perf_counter()))

            def done(_: Future[Any], arrived: float = due) -> None:
                waits.append(time.perf_counter() - arrived)

            request = scheduler.submit(picture, captioner.options(**fixed(int(length))))
            request.future.add_done_callback(done)
            requests.append(request)
        for request in requests:
            request.result()
        seconds = time.perf_counter() - start
    return {"rate": rate, "p50_s": float(np.quantile(waits, 0.5)), "p99_s": float(np.quantile(waits, 0.99)),
            "captions_per_s": count / seconds}  # fmt: skip


def sustained(captioner: Captioner, picture: np.ndarray, count: int, batch: int, solo_s: float) -> dict[str, Any]:
    """Returns the highest rate of arrivals in `RATES` that keeps the time limit, and the measurements of the rates.

    Rates are measured from the lowest on, up to the first rate that does not keep the limit.
    """
    seen = []
    for relative in RATES:
        seen.append({"of_one_by_one": relative, **arrivals(captioner, picture, relative / solo_s, count, batch)})
        if seen[-1]["p99_s"] > PATIENCE * solo_s:
            break
    kept = [one for one in seen if one["p99_s"] <= PATIENCE * solo_s]
    return {"max_batch": batch, "sustained": kept[-1] if kept else None, "seen": seen}


def drawing(spans: list[Span], pictures: int = 6) -> str:
    """Returns an SVG picture of the time spans of the first pictures: one row per thread, one colour per picture."""
    spans = [span for span in spans if max(span.requests) < pictures]
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    scale = 860 / (last - first)
    colours = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
    lanes = {"preprocess": 30, "vision": 30, "bridge": 30, "prefill": 90, "decode": 90}
    shapes = [
        label("vision", 8, 50), label("words", 8, 110),
        label("0 s", 80, 150), label(f"{last - first:.2f} s", 915, 150),
    ]  # fmt: skip
    for span in spans:
        number = span.requests[0]
        title = f"picture {number + 1}: {span.stage}, {(span.end - span.start) * 1e3:.0f} ms"
        shapes.append(
            element(
                "rect",
                element("title", title),
                x=80 + (span.start - first) * scale,
                y=lanes[span.stage],
                width=max(0.4, (span.end - span.start) * scale),
                height=34,
                fill=colours[number % len(colours)],
                fill_opacity="0.55" if span.stage == "decode" else "1",
            )
        )
    return svg_file(980, 160, shapes)


def main() -> None:
    """Measures how encoding overlaps with decoding, and which rate of requests is served in time."""
    parser = parser_of(__doc__)
    parser.add_argument(
        "bundle", nargs="?", type=bundle_path, help="bundle to measure (default: export a model with random weights)"
    )
    parser.add_argument("--pictures", type=int, default=8)
    parser.add_argument("--arrivals", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--trace", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bundle = options.bundle
        if bundle is None:
            checkpoint = Path(scratch) / "checkpoint"
            write_checkpoint(checkpoint, SHAPE)
            bundle = export_checkpoint(checkpoint, Path(scratch) / "bundle", verify="sample").bundle
        captioner = Captioner.load(bundle)
        half = Captioner.load(bundle, threads=max(1, cores() // 2))
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (224, 224, 3), np.uint8) for _ in range(options.pictures)]
        beside, spans = overlap(captioner, half, pictures, 20, options.rounds)
        if options.trace is not None:
            options.trace.write_text(drawing(spans), encoding="utf-8")
        lengths = [TOKENS[0], sum(TOKENS) // 2, TOKENS[1]]
        start = time.perf_counter()
        for length in lengths:
            captioner.caption(pictures[0], **fixed(length))
        solo = (time.perf_counter() - start) / len(lengths)
        served = [sustained(captioner, pictures[0], options.arrivals, batch, solo) for batch in (1, options.batch)]
    best = [one["sustained"]["captions_per_s"] if one["sustained"] else 0.0 for one in served]
    record = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "python": platform.python_version(),
        "overlap": beside,
        "caption_one_by_one_s": round(solo, 3),
        "bound_s": round(PATIENCE * solo, 3),
        "lengths": TOKENS,
        "arrivals": served,
        "throughput_ratio_at_the_bound": round(best[1] / best[0], 3) if best[0] else None,
    }
    print(json.dumps(record, indent=2))
    write_json(options.json, record)


if __name__ == "__main__":
    run_script(main)
