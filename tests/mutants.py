"""Mutation testing: changes one place of a module, runs its tests, and counts the changes that no test notices.

``python -m tests.mutants --mutants 100``. A change is one of an operator, a comparison, a constant or a condition. Each
runs in a process of its own, forked after the libraries were imported, with the changed module in place of the real
one; no file is changed. A mutant is killed if a test fails, or does not end in time. Survivors are listed with their
place: some change nothing that matters (a message, a limit that nothing reaches), the others need a test.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, ModuleType

ROOT = Path(__file__).parents[1]

MODULES: dict[str, tuple[str, ...]] = {
    "blip2edge.reading": ("tests/test_reading.py",),
    "blip2edge.bundle.fields": ("tests/test_reading.py",),
    "blip2edge.bundle.manifest_fields": ("tests/bundle/test_manifest.py", "tests/bundle/test_manifest_fields.py"),
    "blip2edge.bundle.manifest": ("tests/bundle/test_manifest.py", "tests/bundle/test_manifest_fields.py"),
    "blip2edge.bundle.safetensors_file": ("tests/bundle/test_safetensors_file.py", "tests/bundle/test_token_table.py"),
    "blip2edge.bundle.schema": ("tests/bundle/test_manifest.py",),
    "blip2edge.calibration.activations.histogram": ("tests/calibration/activations",),
    "blip2edge.calibration.activations.choose_ranges": ("tests/calibration/activations",),
    "blip2edge.runtime.decoding.beam_search": (
        "tests/runtime/decoding/test_beam_search.py",
        "tests/runtime/decoding/test_logits_processors.py",
    ),
    "blip2edge.runtime.decoding.logits_processors": ("tests/runtime/decoding/test_logits_processors.py",),
    "blip2edge.runtime.decoding.sampling": ("tests/runtime/decoding/test_generate.py",),
    "blip2edge.runtime.decoding.state": (
        "tests/runtime/decoding/test_state.py",
        "tests/runtime/decoding/test_growing.py",
    ),
}
"""The tests of each module."""

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        module: Name of the module.
        line: Line of the change.
        change: What was changed, as code.
        outcome: ``killed``, ``killed by time`` or ``survived``.
    """

    module: str
    line: int
    change: str
    outcome: str = ""


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """The changes of one node."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in COMPARISONS:
            yield ast.Compare(node.left, [COMPARISONS[type(op)]()], node.comparators)
        case ast.BinOp(op=op) if type(op) in OPERATORS:
            yield ast.BinOp(node.left, OPERATORS[type(op)](), node.right)
        case ast.BoolOp(op=op):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), node.values)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(number)):
            yield ast.Constant(number + 1)
        case ast.Constant(value=float(number)):
            yield ast.Constant(number * 2 + 1)
        case ast.IfExp():
            yield ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)
        case ast.If():
            yield ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse)


class _Replace(ast.NodeTransformer):
    """Replaces the node of a number, in the order of the walk."""

    def __init__(self, at: int, node: ast.AST) -> None:
        self._at, self._node, self._count = at, node, -1

    def visit(self, node: ast.AST) -> ast.AST:
        self._count += 1
        if self._count == self._at:
            return ast.copy_location(self._node, node)
        return self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[int, str, ast.Module]]:
    """All changes of a module: line, description and the changed tree. Annotations and docstrings are not changed."""
    tree = ast.parse(source)
    skipped: set[int] = set()
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            for inner in ast.walk(getattr(node, name, None) or ast.Pass()):
                skipped.add(id(inner))
    numbered: list[ast.AST] = []

    class Number(ast.NodeTransformer):
        def visit(self, node: ast.AST) -> ast.AST:
            numbered.append(node)
            return self.generic_visit(node)

    Number().visit(tree)
    for at, node in enumerate(numbered):
        if id(node) in skipped:
            continue
        for changed in _changed(node):
            after = ast.parse(source)
            _Replace(at, copy.deepcopy(changed)).visit(after)
            ast.fix_missing_locations(after)
            before = " ".join(ast.unparse(node).split())[:60]
            yield int(getattr(node, "lineno", 0)), f"{before} -> {' '.join(ast.unparse(changed).split())[:60]}", after


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a changed tree."""

    def __init__(self, name: str, code: CodeType, path: str) -> None:
        self._name, self._code, self._path = name, code, path

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != self._name:
            return None
        spec = importlib.machinery.ModuleSpec(name, self, origin=self._path)
        spec.has_location = True
        return spec

    def exec_module(self, module: ModuleType) -> None:
        exec(self._code, module.__dict__)  # the mutant


def _survives(name: str, tree: ast.Module, path: str, tests: Sequence[str], seconds: float) -> str:
    """Runs the tests with a changed module, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        code = 1
        try:
            import pytest

            sys.meta_path.insert(0, _Finder(name, compile(tree, path, "exec"), path))
            code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        finally:
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return "survived" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 else "killed"
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed by time"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=100, help="number of changes, over all modules")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="MODULE")
    parser.add_argument("--seconds", type=float, default=120, help="longest time of the tests of one change")
    parser.add_argument("--again", type=Path, metavar="JSON", help="run the survivors of an earlier run again")
    parser.add_argument("--json", type=Path, help="write the outcome to this file")
    options = parser.parse_args()
    import numpy  # noqa: F401 - what the tests import is imported once
    import pytest  # noqa: F401

    found: list[tuple[str, str, int, str, ast.Module]] = []
    earlier = [] if options.again is None else json.loads(options.again.read_text())
    survivors = {(one["module"], one["change"]) for one in earlier if one["outcome"] == "survived"}
    for name in options.only or dict.fromkeys(module for module, _ in survivors) or MODULES:
        path = ROOT / (name.replace(".", "/") + ".py")
        source = path.read_text(encoding="utf-8")
        if _survives(name, ast.parse(source), str(path), MODULES[name], 10 * options.seconds) != "survived":
            raise SystemExit(f"the tests of {name} fail without a change")
        found += [(name, str(path), *each) for each in mutants(source)]
    if survivors:
        chosen = [one for one in found if (one[0], one[3]) in survivors]
    else:
        chosen = random.Random(options.seed).sample(found, min(options.mutants, len(found)))
    done: list[Mutant] = []
    for name, file, line, change, tree in chosen:
        outcome = _survives(name, tree, file, MODULES[name], options.seconds)
        done.append(Mutant(name, line, change, outcome))
        print(f"{len(done)}/{len(chosen)} {outcome}: {name}:{line} {change}", flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps([asdict(one) for one in done], indent=2) + "\n")
    killed = sum(one.outcome != "survived" for one in done)
    print(f"{killed} of {len(done)} killed, of {len(found)} possible changes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
