"""Functions that the benchmark scripts share: paths, arguments, the description of the machine, and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CHECKPOINT = ROOT / "examples" / "checkpoint"


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def named_path(text: str) -> tuple[str, Path]:
    """Parses ``NAME=PATH``."""
    name, _, path = text.partition("=")
    return name, Path(path)


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def machine() -> dict[str, Any]:
    """The machine on which a script runs: processor, cores and system."""
    return {"cpu": cpu_model(), "cores": os.cpu_count(), "system": platform.platform()}


def system(*packages: str) -> dict[str, str]:
    """Operating system, Python and packages, with their versions."""
    return {"system": platform.platform(), **python(*packages)}


def python(*packages: str) -> dict[str, str]:
    """Versions of Python and of some packages."""
    return {"python": platform.python_version(), **versions(*packages)}


def versions(*packages: str) -> dict[str, str]:
    """Versions of some packages."""
    return {name: version(name) for name in packages}


def command(*words: str) -> str:
    """The command that runs this script; its own arguments unless others are given."""
    return " ".join([f"python benchmarks/{Path(sys.argv[0]).name}", *(words or sys.argv[1:])])


def write_json(path: Path | None, document: Any) -> None:
    """Writes a result as JSON; None writes nothing."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def write_result(path: Path | None, **document: Any) -> None:
    """Writes a result as JSON, with the command and the machine; None writes nothing."""
    write_json(path, {"command": command(), "machine": machine(), **document})
