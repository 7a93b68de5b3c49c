"""Functions that the benchmark scripts share: paths, arguments, the description of the machine, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from blip2edge.bundle.manifest import read_manifest
from blip2edge.bundle.outputs.locks import write_file
from blip2edge.runtime.backends.huge_pages import wait_for_huge_pages

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINT = ROOT / "examples" / "checkpoint"


Name = TypeVar("Name")
Result = TypeVar("Result")


def in_turn(
    calls: Mapping[Name, Callable[[], Result]],
    rounds: int,
    check: Callable[[dict[Name, Result]], None] = lambda results: None,
    clock: Callable[[], float] = time.process_time,
) -> tuple[dict[Name, list[float]], dict[Name, Result]]:
    """Calls all functions in turn, round by round (A B C A B C …), after a warm-up round.

    Args:
        calls: The measured functions by name.
        rounds: Measured rounds.
        check: Called with the results of each round; raises an error if they are wrong.
        clock: Function that returns the current time in seconds.

    Returns:
        Seconds of each function by round, and the results of the last round.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    results: dict[Name, Result] = {}
    for number in range(rounds + 1):
        for name, call in calls.items():
            start = clock()
            results[name] = call()
            if number:
                seconds[name].append(clock() - start)
        check(results)
        wait_for_huge_pages()
    return seconds, results


def median_ratio(above: Iterable[float], below: Iterable[float]) -> float:
    """Returns the median of the ratios within each round.

    The load of the machine changes this median less than the ratio of two medians.
    """
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def with_tables(page: str, tables: Mapping[str, Callable[[], str]], script: str) -> str:
    """Returns the page with new tables between their marks ``<!-- NAME: made by benchmarks/SCRIPT -->``."""
    for name, table in tables.items():
        begin, end = f"<!-- {name}: made by benchmarks/{script} -->\n", f"<!-- end of {name} -->\n"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{table()}\n{end}{rest.partition(end)[2]}"
    return page


def parser_of(doc: str | None) -> ScriptParser:
    """Returns an argument parser whose help is a script's docstring."""
    return ScriptParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def bundle_path(text: str) -> Path:
    """Parses the directory of a bundle; :class:`ScriptParser` checks that it is one."""
    return Path(text)


def named_bundle(text: str) -> tuple[str, Path]:
    """Parses ``NAME=BUNDLE``; :class:`ScriptParser` checks that the directory is a bundle."""
    return named_path(text)


class ScriptParser(argparse.ArgumentParser):
    """An argument parser that refuses a directory that is no bundle, before anything is measured."""

    def parse_args(self, *given: Any, **more: Any) -> argparse.Namespace:  # type: ignore[override]  # all its forms
        """Parses the arguments; raises BundleError if the argument for a bundle names a directory that is no bundle."""
        options: argparse.Namespace = super().parse_args(*given, **more)
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if value is not None and action.type in (bundle_path, named_bundle):
                for each in value if isinstance(value, list) else [value]:
                    read_manifest(each[1] if isinstance(each, tuple) else each)
        return options


def named_path(text: str) -> tuple[str, Path]:
    """Parses ``NAME=PATH``."""
    name, _, path = text.partition("=")
    return name, Path(path)


def cpu_model() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> dict[str, Any]:
    """Describes the machine on which the script runs: processor, cores and operating system."""
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()}


def system(*packages: str) -> dict[str, str]:
    """Returns the versions of the operating system, Python and some packages."""
    return {"system": platform.platform(), **python(*packages)}


def python(*packages: str) -> dict[str, str]:
    """Returns the versions of Python and some packages."""
    return {"python": platform.python_version(), **versions(*packages)}


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of some packages."""
    return {name: version(name) for name in packages}


def command(*words: str) -> str:
    """Returns the command line that runs this script, with its present arguments or the given `words`."""
    path = Path(sys.argv[0])
    script = f"-m tests.{path.stem}" if path.parent.name == "tests" else f"benchmarks/{path.name}"
    return " ".join([f"python {script}", *(words or sys.argv[1:])])


def write_json(path: Path | None, document: Any) -> None:
    """Writes a result as JSON; None writes nothing."""
    if path is not None:
        write_file(path, (json.dumps(document, indent=2) + "\n").encode())


def write_result(path: Path | None, **document: Any) -> None:
    """Writes a result as JSON, with the command and the machine; None writes nothing."""
    write_json(path, {"command": command(), "machine": machine(), **document})
