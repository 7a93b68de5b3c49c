"""docs/errors.md lists messages that the code really has, each with the class that raises it."""

from __future__ import annotations

import argparse
import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from blip2edge import errors
from blip2edge.cli import BROKEN_PIPE, INTERRUPTED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
ROW = re.compile(r"^\| `(?P<message>[^`]+)` \| (?:`(?P<kind>\w+)`)? ?\| (?P<meaning>.+) \|$", re.MULTILINE)
ROWS = [(found["message"], found["kind"]) for found in ROW.finditer(PAGE)]
PLACEHOLDER = "…"
PRIVATE = {"BusyError": "OutputError"}
"""Classes that are not in blip2edge.errors, and their public parent."""


def written(node: ast.AST) -> str | None:
    """A string literal, with ``…`` for what is filled in; None for other expressions."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(written(value) or PLACEHOLDER for value in values)
    return None


def messages() -> Iterator[tuple[str, str]]:
    """Every text in the package, with the error class whose first argument it is, or an empty name."""
    for folder, _, files in os.walk(ROOT / "blip2edge", followlinks=True):
        for file in files:
            if not file.endswith(".py"):
                continue
            for node in ast.walk(ast.parse(Path(folder, file).read_text(encoding="utf-8"))):
                match node:
                    case ast.Call(func=ast.Name(id=name), args=[first, *_]) if name.endswith("Error"):
                        for part in ast.walk(first):  # also a text that is chosen or joined
                            if (text := written(part)) is not None:
                                yield name, text
                    case ast.Constant() | ast.JoinedStr() if (text := written(node)) is not None:
                        yield "", text


MESSAGES = set(messages())


@pytest.mark.parametrize(("message", "kind"), ROWS)
def test_the_message_is_in_the_code(message: str, kind: str | None) -> None:
    pattern = re.compile(re.escape(message) + r"(?!\w)")
    callers = {name for name, text in MESSAGES if pattern.match(text)}
    assert callers, "no text of the package begins like this"
    raised = {PRIVATE.get(name, name) for name in callers if name}
    assert not raised or kind in raised  # a text that is made elsewhere than it is raised has no class here


def test_the_page_has_the_most_likely_errors_of_every_class() -> None:
    assert 35 <= len(ROWS) <= 50
    assert len(ROWS) == PAGE.count("\n| `"), "a row has another form than: | `message` | `class` | meaning |"
    public = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.Blip2EdgeError)
    }
    rare = {"Blip2EdgeError", "MissingPackageError", "EngineFaultError"}
    assert public - rare <= {kind for _, kind in ROWS if kind is not None}


def test_exit_statuses() -> None:
    for status in (errors.Blip2EdgeError.exit_status, errors.UsageError.exit_status, INTERRUPTED, BROKEN_PIPE):
        assert re.search(rf"^\| [\d, ]*\b{status}\b", PAGE, re.MULTILINE)
    with pytest.raises(SystemExit) as ended:
        argparse.ArgumentParser().parse_args(["--no-such-flag"])
    assert ended.value.code == errors.UsageError.exit_status
