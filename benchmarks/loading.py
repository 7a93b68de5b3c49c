"""Measures how long large bundles take to load: wall seconds of `Captioner.load`, each in a process of its own.

    python benchmarks/loading.py fp32=DIR/bundle INT8=DIR8 --json benchmarks/results/loading.json
    python benchmarks/loading.py fp32=DIR/bundle --openvino-python VENV/bin/python --json …

The bundles are loaded in turn (A B A B). The first round reads the files into the page cache and is not counted. After
the load, the kernel moves the decoder to huge pages in the background; the seconds for this are measured, too.
`peers.py --keep DIR` makes a bundle with the sizes of ViT-B/16, a Q-Former and OPT-125m. With `--openvino-python`, the
same bundles are also loaded with OpenVINO: from the copy that `blip2edge optimize --backend openvino` made if there is
one; otherwise OpenVINO compiles the graphs while they are loaded.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from race import ONE_THREAD
from reporting import named_bundle, parser_of, write_result

from blip2edge.bundle.bundle import Bundle
from blip2edge.cli import run_script

LOAD = """
import json, sys, time
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.backends.huge_pages import wait_for_huge_pages
start = time.perf_counter()
captioner = Captioner.load(sys.argv[1], backend=sys.argv[2], threads=1)
load = time.perf_counter() - start
wait_for_huge_pages()
print(json.dumps([load, time.perf_counter() - start - load]))
"""


def load(bundle: Path, backend: str, interpreter: str) -> tuple[float, float]:
    """Loads a bundle in a new process.

    Returns the seconds until the bundle is loaded, and the further seconds until its memory is moved to huge pages.
    """
    found = subprocess.run(
        [interpreter, "-c", LOAD, str(bundle), backend], check=True, capture_output=True, text=True,
        env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    loaded, moved = json.loads(found.stdout)
    return loaded, moved


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("bundles", type=named_bundle, nargs="+", metavar="NAME=DIR")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--openvino-python", help="Python interpreter whose environment has OpenVINO and blip2edge")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways = [(name, path, "cpu", sys.executable) for name, path in options.bundles]
    if options.openvino_python:
        ways += [(name, path, "openvino", options.openvino_python) for name, path in options.bundles]
    rounds = [[load(*way[1:]) for way in ways] for _ in range(options.rounds + 1)][1:]
    results: list[dict[str, Any]] = []
    for (name, path, backend, _), times in zip(ways, zip(*rounds, strict=True), strict=True):
        results.append({
            "bundle": name, "backend": backend,
            "bytes": sum(record.size for record in Bundle.open(path).manifest.files.values()),
            "load_s": statistics.median(loaded for loaded, _ in times),
            "after_s": statistics.median(moved for _, moved in times),
        })  # fmt: skip
        print(results[-1])
    write_result(options.json, rounds=options.rounds, results=results)


if __name__ == "__main__":
    run_script(main)
