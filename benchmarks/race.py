"""Measures the process CPU time of several programs in turn; each has its own process and one thread.

Ratios are computed within each round, because all programs of a round run under the same load of the machine. The
median of these ratios is more reliable than the ratio of two medians.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import median_ratio

WORKER = Path(__file__).with_name("worker.py")
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Contestant:
    """A program that is measured.

    Attributes:
        name: Name of the program in the tables.
        kind: A key of ``worker.KINDS``.
        path: Path of the bundle or model that the program loads.
        python: The Python interpreter that runs the program.
    """

    name: str
    kind: str
    path: str
    python: str = sys.executable


class Running:
    """The running process of a measured program."""

    def __init__(self, contestant: Contestant) -> None:
        self.name = contestant.name
        root = str(WORKER.parent.parent)
        environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": root}
        command = [contestant.python, str(WORKER), contestant.kind, contestant.path]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._line() != "ready":
            self.close()
            raise SystemExit(f"{self.name} did not start")

    def ask(self, task: list[Any]) -> float:
        """Runs one task in the process; returns the task's CPU seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return float(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


def race(contestants: list[Contestant], tasks: dict[str, list[Any]], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Runs all tasks of all measured programs in turn, after a warm-up round.

    Returns the CPU seconds of each round, by task and by program.
    """
    running = [Running(contestant) for contestant in contestants]
    seconds: dict[str, dict[str, list[float]]] = {task: {one.name: [] for one in running} for task in tasks}
    for number in range(rounds + 1):
        for task, command in tasks.items():
            for one in running:
                took = one.ask(command)
                if number:
                    seconds[task][one.name].append(took)
        print(f"round {number} of {rounds}", file=sys.stderr)
    for one in running:
        one.close()
    return seconds


def table(seconds: dict[str, dict[str, list[float]]], base: str) -> list[dict[str, Any]]:
    """Returns one row for each program.

    A row has, for each task, the median milliseconds and the median of the ratios to the program named ``base``.
    """
    rows = []
    for name in next(iter(seconds.values())):
        row: dict[str, Any] = {"name": name}
        for task, by_name in seconds.items():
            row[task] = {
                "cpu_ms": round(statistics.median(by_name[name]) * 1e3, 2),
                "times": round(median_ratio(by_name[base], by_name[name]), 3),
            }
        rows.append(row)
    return rows


def versions(contestants: list[Contestant], packages: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Returns the versions of some packages in the environment of each program."""
    code = (
        "import json,sys\nfrom importlib.metadata import version, PackageNotFoundError\nfound={}\n"
        "for name in sys.argv[1:]:\n  try: found[name]=version(name)\n  except PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    found = {}
    for number, python in enumerate(dict.fromkeys(contestant.python for contestant in contestants)):
        out = subprocess.run([python, "-c", code, *packages], text=True, capture_output=True, check=True).stdout
        found[f"environment {number + 1}"] = json.loads(out)
    return found
