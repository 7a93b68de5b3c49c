"""Checks that every script of benchmarks/ starts, and that its parser takes the commands that are written anywhere."""

from __future__ import annotations

import argparse
import ast
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    path.name: path
    for path in sorted((ROOT / "benchmarks").glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
}
PAGES = (ROOT / "Makefile", ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
UNINSTALLED = {"gguf", "ray"}
"""Packages that scripts import and the extra `dev` does not have."""
UNPARSED = {"first_token.py", "worker.py"}
"""Scripts that read their arguments without argparse."""


def docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def commands_in(text: str) -> Iterator[tuple[str, str]]:
    """Yields script and arguments of the commands ``python benchmarks/SCRIPT …`` in a text, with all optional parts."""
    for found in re.finditer(r"python benchmarks/(\w+\.py)([^`\n]*)", text.replace("\\\n", " ")):
        arguments = re.split(r"\s#|\s{3,}", found[2])[0]
        for alternative in arguments.split("|"):
            yield found[1], re.sub(r"\$\(\w+\)", "1", alternative).translate({ord("["): None, ord("]"): None}).strip()


def written_commands() -> list[tuple[str, str]]:
    """Returns the commands of all docstrings and pages. A page's command without arguments may only name a script."""
    own = {command for path in SCRIPTS.values() for command in commands_in(docstring(path))}
    others = {command for page in PAGES for command in commands_in(page.read_text(encoding="utf-8")) if command[1]}
    return sorted(command for command in own | others if command[0] not in UNPARSED)


class ParsedError(Exception):
    """A script has parsed its arguments."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a script up to the point where its arguments are parsed; what its imports change is undone."""
    parse = argparse.ArgumentParser.parse_args
    modules, path, environment = set(sys.modules), list(sys.path), dict(os.environ)

    def stop(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse(parser, *arguments)
        raise ParsedError

    def call(script: str, arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPTS[script]), *shlex.split(arguments)])
        try:
            runpy.run_path(str(SCRIPTS[script]), run_name="__main__")
        except ModuleNotFoundError as error:
            if error.name not in UNINSTALLED:
                raise
            pytest.skip(f"{script} needs {error.name}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield call
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == ROOT / "benchmarks":
            del sys.modules[name]
    sys.path[:] = path
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_docstring(script: str, run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        run(script, "--help")
    assert not end.value.code
    help_text = " ".join(capsys.readouterr().out.split())
    assert docstring(SCRIPTS[script]).split("\n\n")[0].split(":")[0] in help_text


@pytest.mark.parametrize(("script", "arguments"), written_commands())
def test_written_command_is_parsed(script: str, arguments: str, run: Any) -> None:
    assert script in SCRIPTS
    with pytest.raises(ParsedError):
        run(script, arguments)


def test_wrong_command_is_refused(run: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("tables.py", "README.md --no-such-flag")
