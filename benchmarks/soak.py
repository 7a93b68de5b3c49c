"""Runs a server at twice its capacity, and many captions in one process; checks statuses, times, memory, open files.

    python benchmarks/soak.py overload BUNDLE --minutes 10 --json benchmarks/results/soak.json
    python benchmarks/soak.py endurance BUNDLE --captions 100000 --json benchmarks/results/endurance.json

*overload* starts `blip2edge serve`, measures how many captions per second it gives to 16 clients that wait for their
answers, and then sends requests at twice that rate, whether answers come or not. Each request has its own connection.
Expected: every request is sent; only the statuses 200, 429 and 503; the 99th percentile of a caption's time is at most
the bound that follows from the lengths of queue and batch; the server's resident memory is flat, and it has no more
open files at the end than at the beginning.

*endurance* captions pictures with one `Captioner` and one scheduler in this process. Expected: flat memory and files.

Memory is flat if its mean in the second half of the time is at most 5 % above that in the first half. The first minute
(at most a quarter of the time) does not count: allocators fill their pools.

The machine should do nothing else. Exit status 1 if one of the expectations is not met.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from reporting import bundle_path, cpu_model, parser_of, write_json

from blip2edge.cli import run_script
from blip2edge.runtime.captioning.captioner import Captioner

ALLOWED = {200, 429, 503}
GROWTH = 0.05  # of resident memory, from the first half to the second
WARM_UP_S = 60.0  # does not count for the memory
SAMPLES = 20
MOST_IN_FLIGHT = 800  # requests of the client, below the server's limit of connections
TOKENS = 12


@dataclass(frozen=True)
class Service:
    """A running `blip2edge serve`."""

    process: subprocess.Popen[str]
    address: str

    def answers(self) -> dict[str, int]:
        """Returns the number of answers by status, over all routes, from the server's own metrics."""
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        counts: Counter[str] = Counter()
        for status, count in re.findall(r'blip2edge_request_seconds_count\{.*?status="(\d+)"\} ([\d.e+]+)', text):
            counts[status] += int(float(count))
        return dict(sorted(counts.items()))

    def state(self) -> dict[str, int]:
        """Returns the server's resident memory in bytes, and its number of open files."""
        return process_state(self.process.pid)


def process_state(number: int) -> dict[str, int]:
    """Returns the resident memory in bytes, and the numbers of open files and threads, of a process."""
    pages = int(Path(f"/proc/{number}/statm").read_text().split()[1])
    files, threads = os.listdir(f"/proc/{number}/fd"), os.listdir(f"/proc/{number}/task")
    return {"resident_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "files": len(files), "threads": len(threads)}


@contextmanager
def served(bundle: Path, *words: str) -> Iterator[Service]:
    """Starts the server on a free port; ends it at the end of the block."""
    command = [sys.executable, "-m", "blip2edge", "serve", str(bundle), "--port", "0", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise SystemExit("the server did not start")
            yield Service(process, address)
        finally:
            process.terminate()
            process.wait(60)


def picture() -> bytes:
    """Returns a picture of noise, as the bytes of a JPEG file."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((320, 240)).save(file, "JPEG")
    return file.getvalue()


async def post(host: str, port: int, request: bytes) -> int:
    """Sends one request on a connection of its own; returns the status, or 0 for a connection without an answer."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return 0
    try:
        writer.write(request)
        await writer.drain()
        answer = await reader.read()
        return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
    except OSError:
        return 0
    finally:
        writer.close()


async def capacity(host: str, port: int, request: bytes, clients: int, seconds: float) -> float:
    """Measures how many captions per second the server makes for clients that wait for each answer."""
    done = 0
    end = time.perf_counter() + seconds

    async def client() -> None:
        nonlocal done
        while time.perf_counter() < end:
            status = await post(host, port, request)
            done += status == 200

    await asyncio.gather(*(client() for _ in range(clients)))
    return done / seconds


async def overload(
    service: Service, request: bytes, rate: float, seconds: float
) -> tuple[dict[int, list[float]], list[dict[str, Any]], int]:
    """Sends requests at a fixed rate, whether answers come or not.

    Returns:
        Seconds until the answers, by status; samples of the server's memory and files; and the number of requests that
        were not sent because too many requests had no answer yet.
    """
    host, port = urlsplit(service.address).hostname or "", urlsplit(service.address).port or 0
    times: dict[int, list[float]] = {}
    samples: list[dict[str, Any]] = []
    flying: set[asyncio.Task[None]] = set()
    left_out, start = 0, time.perf_counter()

    async def one() -> None:
        began = time.perf_counter()
        status = await post(host, port, request)
        times.setdefault(status, []).append(time.perf_counter() - began)

    due = start
    while due < start + seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        if time.perf_counter() - start >= len(samples) * seconds / SAMPLES:
            samples.append({"s": round(time.perf_counter() - start, 1), **service.state()})
        if len(flying) < MOST_IN_FLIGHT:
            task = asyncio.create_task(one())
            flying.add(task)
            task.add_done_callback(flying.discard)
        else:
            left_out += 1
        due += 1 / rate
    await asyncio.gather(*flying)
    return times, samples, left_out


def quantiles(values: list[float]) -> dict[str, float]:
    """Returns median, 99th percentile and largest value of some times in seconds; the results are in milliseconds."""
    return {
        "count": len(values),
        "p50_ms": round(float(np.quantile(values, 0.5)) * 1e3, 1),
        "p99_ms": round(float(np.quantile(values, 0.99)) * 1e3, 1),
        "longest_ms": round(max(values) * 1e3, 1),
    }


def growth(samples: list[dict[str, Any]]) -> float:
    """Returns the growth of the mean resident memory, from the first half of the time to the second, as a share."""
    warm_up = min(WARM_UP_S, samples[-1]["s"] / 4)
    sizes = [sample["resident_bytes"] for sample in samples if sample["s"] >= warm_up]
    half = len(sizes) // 2
    return float(np.mean(sizes[half:]) / np.mean(sizes[:half]) - 1)


def memory(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the entries about memory for the result."""
    rule = f"mean of the second half / mean of the first half - 1 <= {GROWTH:g}, after min({WARM_UP_S:g} s, a quarter)"
    return {"memory_growth": round(growth(samples), 4), "memory_rule": rule, "samples": samples}


def bound_ms(words: list[str], captions_per_s: float) -> float:
    """Returns the largest allowed 99th percentile of a caption's time, in milliseconds.

    It is twice the time that the captions of a full queue and a full batch take.

    Args:
        words: Flags of `blip2edge serve`.
        captions_per_s: The measured capacity.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--max-batch", type=int, default=8)
    given, _ = parser.parse_known_args(words)
    waiting: int = given.queue + given.max_batch
    return 2e3 * waiting / captions_per_s


async def run_overload(bundle: Path, minutes: float, measured_s: float, words: list[str]) -> dict[str, Any]:
    content = picture()
    head = f"POST /caption?max_new_tokens={TOKENS}&min_new_tokens={TOKENS} HTTP/1.1\r\nHost: localhost\r\n"
    head += f"Content-Type: image/jpeg\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
    request = head.encode() + content
    with served(bundle, *words) as service:
        host, port = urlsplit(service.address).hostname or "", urlsplit(service.address).port or 0
        await capacity(host, port, request, 16, measured_s / 4)  # warm-up
        most = await capacity(host, port, request, 16, measured_s)
        start = service.state()
        times, samples, left_out = await overload(service, request, 2 * most, 60 * minutes)
        await asyncio.sleep(6)  # idle connections are closed after 5 s
        samples.append({"s": round(60 * minutes + 6, 1), **service.state()})
        health = json.load(urllib.request.urlopen(f"{service.address}/health", timeout=60))
        end = service.state()
    most_ms = bound_ms(words, most)
    statuses = {str(status): quantiles(values) for status, values in sorted(times.items())}
    accepted = len(times.get(200, []))
    p99_ms = statuses["200"]["p99_ms"] if accepted else None
    return {
        "minutes": minutes,
        "captions_per_s_at_capacity": round(most, 2),
        "requests_per_s": round(sum(map(len, times.values())) / (60 * minutes), 2),
        "captions_per_s": round(accepted / (60 * minutes), 2),
        "answers": statuses,
        "not_sent": left_out,
        "p99_ms": p99_ms,
        "p99_bound_ms": round(most_ms, 1),
        "p99_rule": "p99 of the captions <= 2 x (queue + batch) / capacity",
        "load_at_the_end": health["load"],
        "start": start,
        "end": end,
        **memory(samples),
        "held": left_out == 0
        and times.keys() <= ALLOWED
        and p99_ms is not None
        and p99_ms <= most_ms
        and growth(samples) <= GROWTH
        and end["files"] <= start["files"] + 5,
    }


def run_endurance(bundle: Path, captions: int) -> dict[str, Any]:
    """Captions pictures through one scheduler; a window of 32 requests is open at any time."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (48, 64, 3), np.uint8) for _ in range(16)]
    samples: list[dict[str, Any]] = []
    start, texts = time.perf_counter(), set()

    def sample(number: int) -> dict[str, Any]:
        seconds = round(time.perf_counter() - start, 1)
        return {"captions": number, "s": seconds, **process_state(os.getpid())}

    with Captioner.load(bundle) as captioner, captioner.scheduler(max_batch=8) as scheduler:
        options = captioner.options(max_new_tokens=TOKENS)
        flying: deque[Any] = deque()
        for number in range(captions):
            if number * SAMPLES >= len(samples) * captions:
                samples.append(sample(number))
            if len(flying) == 32:
                texts.add(flying.popleft().result().text)
            flying.append(scheduler.submit(pictures[number % 16], options))
        while flying:
            texts.add(flying.popleft().result().text)
        samples.append(sample(captions))
        left = {**scheduler.load, "open": len(scheduler._open)}
    seconds = time.perf_counter() - start
    first = samples[len(samples) // 4]
    return {
        "captions": captions,
        "captions_per_s": round(captions / seconds, 2),
        "different_texts": len(texts),
        "left_in_queues": left,
        **memory(samples),
        "held": growth(samples) <= GROWTH and samples[-1]["files"] <= first["files"] and not any(left.values()),
    }


def main() -> int:
    """Runs the measurement of the command line, overload or endurance, and writes the results."""
    parser = parser_of(__doc__)
    parser.add_argument("kind", choices=("overload", "endurance"))
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--measured-s", type=float, default=20.0, help="seconds for which the capacity is measured")
    parser.add_argument("--serve", nargs="...", default=[], help="further flags for `blip2edge serve`")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.kind == "overload":
        record = asyncio.run(run_overload(options.bundle, options.minutes, options.measured_s, options.serve))
    else:
        record = run_endurance(options.bundle, options.captions)
    record = {"kind": options.kind, "processor": cpu_model(), "cores": os.cpu_count(), **record}
    print(json.dumps({name: value for name, value in record.items() if name != "samples"}, indent=1))
    if options.json:
        write_json(options.json, record)
    return 0 if record["held"] else 1


if __name__ == "__main__":
    run_script(main)
