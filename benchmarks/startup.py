"""Measures start-up time and memory: seconds to load a bundle and to the first word, and memory over many captions.

    python benchmarks/startup.py BUNDLE PICTURE --captions 10000 --json FILE
    python benchmarks/startup.py BUNDLE PICTURE --language SMOLLM2_8 --gguf Q8_0.gguf --llama-python VENV/bin/python

Wall and CPU seconds are the least of several starts; a busy machine increases wall time and hardly CPU time. With
``--language``, also measures a text prompt's first token with a bundle's language model and with llama.cpp, in turn
(A B A B), each in its own process.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from race import ONE_THREAD
from reporting import bundle_path, parser_of, write_result

from blip2edge.cli import run_script
from blip2edge.runtime.bench.measure import Bench
from blip2edge.runtime.bench.meters import resident_bytes
from blip2edge.runtime.captioning.captioner import Captioner

FIRST_WORD = (
    "import sys\nfrom blip2edge.runtime.captioning.captioner import Captioner\n"
    "print(next(iter(Captioner.load(sys.argv[1], threads=1).stream(sys.argv[2]))))"
)


def first_word(bundle: Path, picture: Path) -> tuple[float, float]:
    """Returns the wall and CPU seconds from the start of a process to the first piece of a caption."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", FIRST_WORD, str(bundle), str(picture)], check=True, capture_output=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load(bundle: Path) -> tuple[float, float]:
    """Returns the wall and CPU seconds in which a bundle is loaded, after the packages were imported."""
    start, cpu = time.perf_counter(), time.process_time()
    Captioner.load(bundle, threads=1)
    return time.perf_counter() - start, time.process_time() - cpu


def first_token(kind: str, path: str, python: str) -> tuple[float, float, str]:
    """Returns the wall and CPU seconds from the start of a process to the first token, and the token."""
    script = Path(__file__).with_name("first_token.py")
    start = time.perf_counter()
    process = subprocess.Popen(
        [python, str(script), kind, path], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    wall = time.perf_counter() - start
    process.wait()
    cpu, _, token = line.strip().partition(" ")
    if not token:
        raise SystemExit(f"{kind} gave no token")
    return wall, float(cpu), token


def text_starts(language: str, gguf: str, llama_python: str, starts: int) -> dict[str, Any]:
    """Starts blip2edge and llama.cpp in turn; returns the seconds of both, and the median of the ratios by round."""
    rounds = [
        (first_token("ours", language, sys.executable), first_token("llama", gguf, llama_python))
        for _ in range(starts + 1)
    ][1:]  # without the first round, which reads the files into the page cache
    return {
        "first_token_s": min(ours[0] for ours, _ in rounds),
        "llama_first_token_s": min(theirs[0] for _, theirs in rounds),
        "wall_ratio": statistics.median(ours[0] / theirs[0] for ours, theirs in rounds),
        "cpu_ratio": statistics.median(ours[1] / theirs[1] for ours, theirs in rounds),
        "tokens": [part[2] for part in rounds[0]],
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("bundle", type=bundle_path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--captions", type=int, default=10000)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--language", help="bundle whose language model has 8-bit weights")
    parser.add_argument("--gguf", help="the same weights as a GGUF file, for llama.cpp")
    parser.add_argument("--llama-python", help="Python interpreter whose environment has xllamacpp")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text: dict[str, Any] = {}
    if options.language:
        text = text_starts(options.language, options.gguf, options.llama_python, options.starts)
    loads = [load(options.bundle) for _ in range(options.starts)]
    words = [first_word(options.bundle, options.picture) for _ in range(options.starts)]
    gc.collect()
    bench = Bench(Captioner.load(options.bundle, threads=1))
    files = bench.captioner.bundle.manifest.files.values()
    for _ in range(50):
        bench.caption(8)
    resident = [resident_bytes()]
    for _ in range(10):
        for _ in range(options.captions // 10):
            bench.caption(8)
        resident.append(resident_bytes())
    results: dict[str, Any] = {
        "load_s": min(wall for wall, _ in loads),
        "load_cpu_s": min(cpu for _, cpu in loads),
        "first_word_s": min(wall for wall, _ in words),
        "first_word_cpu_s": min(cpu for _, cpu in words),
        "bundle_bytes": sum(record.size for record in files),
        "resident_bytes": resident,
    } | ({"text": text} if text else {})
    for name, value in results.items():
        print(name, value)
    write_result(options.json, captions=options.captions, results=results)


if __name__ == "__main__":
    run_script(main)
