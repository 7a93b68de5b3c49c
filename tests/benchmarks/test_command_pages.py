"""The pages of docs/commands: flags from the parsers, text by hand, and examples that parse."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from blip2edge.cli.parser import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "commands"
OTHERS = ("index.md", "tutorial.md")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("command_pages")


def commands_of(text: str) -> list[str]:
    """The lines of a page's shell blocks that run blip2edge, with continued lines joined."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    inside, alone = re.compile(r"\$\((blip2edge [^)]*)\)"), re.compile(r"^(?:.*&& )?(blip2edge [^|&>]*)")
    found = (inside.search(line) or alone.match(line) for line in blocks.splitlines())
    return [each[1] for each in found if each is not None]


def test_pages_have_the_flags_of_the_parsers(pages: Any) -> None:
    for path, text in pages.documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)}: run make docs"
    assert {path.stem for path in PAGES.glob("*.md")} == {"index", *COMMANDS}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_page_has_a_text_and_an_example_that_parses(command: str, pages: Any) -> None:
    by_hand = (PAGES / f"{command}.md").read_text(encoding="utf-8").partition(pages.BEGIN)[0]
    prose = re.sub(r"```.*?```", "", by_hand, flags=re.DOTALL)
    assert len(prose.split()) > 20, "write what the command is for, and when to use it"
    examples = commands_of(by_hand)
    assert examples
    for line in examples:
        assert build_parser().parse_args(shlex.split(line, comments=True)[1:]).command == command


def test_no_entry_has_two_defaults_or_an_empty_one() -> None:
    for path in (ROOT / "docs").rglob("*.md"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert line.count("(default:") <= 1, f"{path.name}: {line}"
            assert not re.search(r"\(default: *\)", line), f"{path.name}: {line}"


@pytest.mark.parametrize("name", OTHERS)
def test_commands_of_other_pages_parse(name: str) -> None:
    examples = commands_of((ROOT / "docs" / name).read_text(encoding="utf-8"))
    assert examples
    for line in examples:
        build_parser().parse_args(shlex.split(line, comments=True)[1:])
