"""Starting and staying: seconds to load a bundle and to its first word, and memory over many captions.

    python benchmarks/startup.py BUNDLE PICTURE --captions 10000 --json FILE

Wall and CPU seconds, the least of some starts: a busy machine stretches the first and hardly the second.
"""

from __future__ import annotations

import argparse
import gc
import resource
import subprocess
import sys
import time
from pathlib import Path

from race import write

from blip2edge.runtime.bench import Bench
from blip2edge.runtime.captioner import Captioner
from blip2edge.runtime.meter import resident_bytes

FIRST_WORD = (
    "import sys\nfrom blip2edge.runtime.captioner import Captioner\n"
    "print(next(iter(Captioner.load(sys.argv[1], threads=1).stream(sys.argv[2]))))"
)


def first_word(bundle: Path, picture: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a process from its start to the first piece of a caption."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", FIRST_WORD, str(bundle), str(picture)], check=True, capture_output=True
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load(bundle: Path) -> tuple[float, float]:
    """Wall and CPU seconds of loading a bundle, the packages imported before."""
    start, cpu = time.perf_counter(), time.process_time()
    Captioner.load(bundle, threads=1)
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--captions", type=int, default=10000)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
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
    results = {
        "load_s": min(wall for wall, _ in loads),
        "load_cpu_s": min(cpu for _, cpu in loads),
        "first_word_s": min(wall for wall, _ in words),
        "first_word_cpu_s": min(cpu for _, cpu in words),
        "bundle_bytes": sum(record.size for record in files),
        "resident_bytes": resident,
    }
    for name, value in results.items():
        print(name, value)
    write(options.json, captions=options.captions, results=results)


if __name__ == "__main__":
    main()
