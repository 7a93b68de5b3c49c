"""Runs the commands that write on disks that are too small, and checks what they say and leave. Needs root (mount).

    python -m tests.full_disks --sizes 6 --json benchmarks/results/full-disks.json

Each command runs on file systems in memory (tmpfs) of several sizes, from almost nothing up to what it needs. It must
end with one error that says that the disk is full; an old output must be unchanged, and nothing else may be left.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from blip2edge.bundle.trust.integrity import STAMPS
from blip2edge.errors import OutputError
from tests.faults import NAMES, Trials, done, preload

FULL = "the disk is full"


@contextmanager
def small_disk(place: Path, size: int) -> Iterator[None]:
    """Mounts a file system of ``size`` bytes."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def snapshot(directory: Path) -> dict[str, bytes]:
    """The content of all files but the stamps."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != STAMPS
    }


def used(directory: Path) -> int:
    """Bytes of all files, in pages."""
    return sum((path.lstat().st_size // 4096 + 1) * 4096 for path in directory.rglob("*"))


def run(root: Path, sizes: int, names: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Runs each command on disks of several sizes.

    Returns:
        For each command what held (the error of each disk) and what failed.
    """
    trials = Trials(root, 1)
    trials.prepare(names)
    results: dict[str, dict[str, list[str]]] = {}
    for name, command in trials.commands.items():
        held, failed = [], []
        place = root / "disk"
        place.mkdir(exist_ok=True)
        old = trials.old(name)
        for number in range(sizes):
            with small_disk(place, used(old) + 8192 + number * used(old) // (sizes - 1)):
                out = place / "out"
                shutil.copytree(old, out)
                before = snapshot(out)
                problem = done(partial(command.run, out, True), trials.errors)
                left = sorted(path.name for path in place.iterdir() if path != out)
                left += [str(path.relative_to(out)) for path in out.rglob(".*") if path.name != STAMPS]
                left = [] if name == "train" else left  # the snapshots stay, to resume from
                if not problem:
                    held.append("")
                elif OutputError.__name__ in problem and FULL in problem and not left and snapshot(out) == before:
                    held.append(problem)
                else:
                    failed.append(f"{problem}; left {left}; old unchanged: {snapshot(out) == before}")
        results[name] = {"held": held, "failed": failed}
    return results


def main() -> int:
    """Runs the commands, prints the errors, and writes the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, default=6)
    parser.add_argument("--commands", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--json", type=Path, help="file for the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="blip2edge-full-") as folder:
        preload(Path(folder))
        results = run(Path(folder), options.sizes, options.commands)
    for name, result in results.items():
        full = [text for text in result["held"] if text]
        print(
            f"{name}: {len(full)} full, {len(result['held']) - len(full)} large enough, {len(result['failed'])} failed"
        )
        for text in [*dict.fromkeys(full), *result["failed"]]:
            print(f"    {text}")
    if options.json is not None:
        from tests.project import write_result

        write_result(options.json, results=results)
    return 1 if any(result["failed"] for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
