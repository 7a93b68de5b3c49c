"""Checks in which precisions the exported graphs agree with torch, for each model family.

    python benchmarks/parity.py

Shrinks every configuration of ``blip2edge/shapes/published``, gives it random weights (matrices of gain 2, so that
signals keep their magnitude), exports it in every precision with full verification, and writes the largest relative
difference of each graph to ``benchmarks/results/parity.json``, from which ``models_table.py`` makes ``docs/models.md``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from random_checkpoint import published, shrunk, write_checkpoint
from reporting import RESULTS, parser_of, versions, write_json

from blip2edge.choices import PRECISIONS
from blip2edge.cli import run_script
from blip2edge.errors import Blip2EdgeError
from blip2edge.export.pipeline import export_checkpoint
from blip2edge.shapes.families import CONFIGS

GAIN = 2.0


def measure(name: str, precision: str, folder: Path) -> dict[str, Any]:
    """Exports one checkpoint; returns the largest relative difference of each graph, or the reason for a failure."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shrunk(published(name)), torch.float32, GAIN)
    try:
        report = export_checkpoint(checkpoint, folder / precision, precision=precision, verify="full")
    except Blip2EdgeError as error:
        return {"passes": False, "reason": error.problem}
    graphs = {
        graph.name: {"relative": float(f"{graph.relative:.2e}"), "tolerance": graph.tolerance}
        for graph in report.graphs
    }
    return {"passes": True, "graphs": graphs}


def write(path: Path, results: dict[str, Any]) -> None:
    """Writes the results so far, with the versions of the packages."""
    document = {
        "command": "python benchmarks/parity.py",
        "versions": versions("torch", "onnx", "onnxruntime", "onnxscript"),
        "results": dict(sorted(results.items())),
    }
    write_json(path, document)


def main() -> None:
    """Exports all configurations; writes the results after every export, so that a failed run loses no results."""
    parser = parser_of(__doc__)
    parser.add_argument("--only", action="append", help="name of a configuration; may be repeated (all)")
    parser.add_argument("--json", type=Path, default=RESULTS / "parity.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = options.only or sorted(path.stem for path in CONFIGS.glob("*.json"))
    document: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    results: dict[str, Any] = document.get("results", {})
    done: dict[str, str] = {}
    for name in names:
        same = done.setdefault(json.dumps(shrunk(published(name)), sort_keys=True), name)
        if same != name:  # the same kind of model in another size
            results[name] = {precision: {**found, "as": same} for precision, found in results[same].items()}
            continue
        with tempfile.TemporaryDirectory() as folder:
            for precision in PRECISIONS:
                found = measure(name, precision, Path(folder))
                results.setdefault(name, {})[precision] = found
                worst = max((graph["relative"] for graph in found.get("graphs", {}).values()), default=None)
                print(name, precision, found.get("reason", f"{worst}"), flush=True)
        write(options.json, results)
    write(options.json, results)
    if not all(found["passes"] for name in names for found in results[name].values()):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
