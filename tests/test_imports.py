"""The structure of the package: no import cycle, limits on sizes, and one module that defines each public name.

Everything is read with ``ast`` and nothing is imported, so imports inside functions and under ``TYPE_CHECKING`` count.
"""

from __future__ import annotations

import ast
import os
from collections import Counter
from pathlib import Path

from tests.project import pyproject

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "blip2edge"
MOST_LINES, MOST_FUNCTION_LINES = 400, 60
MOST_MODULES, MOST_RUNTIME = 12, 102
CROWDED = {"blip2edge.cli"}  # one file per command

SHARED_NAMES = {"add_arguments", "run", "report_table", "open_graph"}
"""Functions that every command, or every backend, has by design."""

EITHER_WAY = {"__main__", "cli", "examples", "export", "model", "training", "version", "graph_files"}
READS_GRAPHS = {"bulk", "calibration", "engine", "explanation", "optimization"}
NOT_ON = {"no-torch": EITHER_WAY, "no-onnx": EITHER_WAY | READS_GRAPHS}
"""Modules that an import contract leaves out, by the contract's id."""

Modules = dict[str, ast.Module]


def find_modules() -> dict[str, Path]:
    """The file of every module of the package, by dotted name; the root folders are links inside the package."""
    found: dict[str, Path] = {}
    for folder, _, files in os.walk(ROOT / PACKAGE, followlinks=True):
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix == ".py":
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                found[name] = path
    return found


PATHS = find_modules()
MODULES: Modules = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in PATHS.items()}


def imports(modules: Modules) -> dict[str, set[str]]:
    """The modules that each module imports, anywhere in its text."""
    graph: dict[str, set[str]] = {}
    for name, tree in modules.items():
        targets: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.add(inner if inner in modules else node.module)
        graph[name] = (targets & modules.keys()) - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that import each other, directly or through others."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        found: set[str] = set()
        todo = [start]
        while todo:
            new = graph[todo.pop()] - found
            found |= new
            todo.extend(new)
        reached[start] = found
    return {
        frozenset(other for other in reached[name] if name in reached[other]) for name in graph if name in reached[name]
    }


def public_names(tree: ast.Module) -> set[str]:
    """Classes and functions that a module defines, without those that begin with an underscore."""
    defined = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in tree.body if isinstance(node, defined) and not node.name.startswith("_")}


def folder_sizes() -> Counter[str]:
    """Modules in each folder, without ``__init__``."""
    packages = {name.rpartition(".")[0] for name in MODULES}
    return Counter(name.rpartition(".")[0] for name in MODULES if name not in packages and "." in name)


def test_no_import_cycle() -> None:
    assert cycles(imports(MODULES)) == set()


def test_a_cycle_under_type_checking_or_in_a_function_is_found() -> None:
    sources = {
        "p.a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from p.b import B",
        "p.b": "def f():\n    import p.c",
        "p.c": "from p import a",
        "p.d": "import p.a",
    }
    found = cycles(imports({name: ast.parse(text) for name, text in sources.items()}))
    assert found == {frozenset({"p.a", "p.b", "p.c"})}


def test_the_contracts_name_every_module_of_the_device() -> None:
    """A new module of the package is either one that may import torch or onnx, or in contracts 2 and 2b."""
    contracts = {
        one["id"]: set(one.get("source_modules", ())) for one in pyproject()["tool"]["importlinter"]["contracts"]
    }
    for contract, others in NOT_ON.items():
        every = {name for name in MODULES if name.count(".") == 1} - {f"{PACKAGE}.{other}" for other in others}
        assert contracts[contract] == every


def test_modules_and_functions_are_short() -> None:
    long = {}
    for name, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = node.body[1:] or node.body
                code = first[0] if ast.get_docstring(node) is not None else node
                lines = (node.end_lineno or 0) - (code.lineno - 1)
                if lines > MOST_FUNCTION_LINES:
                    long[f"{name}.{node.name}"] = lines
        lines = len(PATHS[name].read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES:
            long[name] = lines
    assert long == {}


def test_folders_are_small() -> None:
    sizes = folder_sizes()
    runtime = {name: count for name, count in sizes.items() if name.startswith(f"{PACKAGE}.runtime")}
    assert {name for name, count in sizes.items() if count > MOST_MODULES} <= CROWDED
    assert 0 < sum(runtime.values()) <= MOST_RUNTIME


def test_a_public_name_has_one_home() -> None:
    counts = Counter(
        name
        for module, tree in MODULES.items()
        if not module.startswith(f"{PACKAGE}.examples")
        for name in public_names(tree)
    )
    assert {name for name, count in counts.items() if count > 1} == SHARED_NAMES
