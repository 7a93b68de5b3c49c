"""Writes the flags into the pages of ``docs/commands``, one page a command, and the list of pages into ``mkdocs.yml``.

    python benchmarks/command_pages.py --write | --check

The flags come from the parsers. The text above the mark of each page is written by hand and is kept. A command without
a page gets a page with only a title; ``tests/benchmarks/test_command_pages.py`` fails until it has a text and an
example.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from reporting import ROOT, parser_of

from blip2edge.cli import run_script
from blip2edge.cli.parser import COMMANDS, Parser, build_parser

PAGES = ROOT / "docs" / "commands"
SITE = ROOT / "mkdocs.yml"
BEGIN = "<!-- flags: made by benchmarks/command_pages.py -->\n"
TITLES = {"positional arguments": "arguments", "options": "flags"}
NAVIGATION = re.compile(r"(# commands: made by [^\n]*\n).*?( *# end of commands\n)", re.DOTALL)


def parsers() -> dict[str, Parser]:
    """Returns the parser of each command, by the command's name."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(commands.choices)


def flag_cell(action: argparse.Action) -> str:
    """Returns the table cell of an argument and its value, as code: ``--output``, ``-o`` `DIR`."""
    if not action.option_strings:
        name = action.metavar if isinstance(action.metavar, str) else action.dest
        many = {"+": " …", "*": " …"}.get(str(action.nargs), "")
        return f"`{name}`{many}".replace("|", "\\|")
    flags = ", ".join(f"`{flag}`" for flag in reversed(action.option_strings))
    if action.nargs == 0:
        return flags
    name = action.metavar if isinstance(action.metavar, str) else ""
    if name or action.choices is None:
        return f"{flags} `{name or action.dest.upper()}`".replace("|", "\\|")
    return f"{flags} " + " \\| ".join(f"`{value}`" for value in action.choices)


def help_cell(parser: Parser, action: argparse.Action) -> str:
    """Returns the table cell with an argument's help and default, without line breaks."""
    text = parser._get_formatter()._expand_help(action)
    if not action.option_strings and action.choices is not None:
        text = f"One of {', '.join(f'`{value}`' for value in action.choices)}. {text}"
    if action.required and action.option_strings:
        text += " (required)"
    return re.sub(r"<(\w+)>", r"&lt;\1&gt;", " ".join(text.split())).replace("|", "\\|").replace("*", "\\*")


def flags_of(parser: Parser) -> str:
    """Returns the usage and the arguments of one command, as Markdown."""
    name = parser.prog.rpartition(" ")[2]
    required = [action for action in parser._actions if action.required or not action.option_strings]
    words = [_usage(action) for action in sorted(required, key=lambda action: bool(action.option_strings))]
    lines = ["## Usage", "", "```", " ".join(["blip2edge", name, *words, "[flags]"]), "```"]
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest not in ("help", "debug")]
        if not actions:
            continue
        title = TITLES.get(group.title or "", group.title or "")
        lines += ["", f"## {title[:1].upper()}{title[1:]}"]
        if group.description:
            lines += ["", f"{group.description[:1].upper()}{group.description[1:]}."]
        lines += ["", f"| {'argument' if title == 'arguments' else 'flag'} | meaning |", "|---|---|"]
        lines += [f"| {flag_cell(action)} | {help_cell(parser, action)} |" for action in actions]
    common = "`--debug` shows the traceback of an error; `-h` or `--help` prints these flags."
    return "\n".join([*lines, "", common, ""])


def _usage(action: argparse.Action) -> str:
    values = action.metavar if isinstance(action.metavar, str) else "|".join(map(str, action.choices or ()))
    values += {"+": "…", "*": "…"}.get(str(action.nargs), "")
    if action.option_strings:
        return f"{max(action.option_strings, key=len)} {values}"
    return values if action.required else f"[{values}]"


def page(name: str, parser: Parser, present: str) -> str:
    """Returns the page of a command: the hand-written text, then the generated flags.

    Args:
        name: The command.
        parser: Parser of the command.
        present: The existing page; empty if there is no page.
    """
    text = present.partition(BEGIN)[0] or f"# {name}\n\n{parser.description}\n\n"
    return f"{text}{BEGIN}\n{flags_of(parser)}"


def navigation(text: str) -> str:
    """Returns the text of ``mkdocs.yml`` with the pages of all commands."""
    lines = "".join(f"      - {name}: commands/{name}.md\n" for name in COMMANDS)
    return NAVIGATION.sub(lambda found: f"{found[1]}{lines}{found[2]}", text)


def list_of_commands() -> str:
    """Returns the table of all commands."""
    rows = "".join(f"| [{name}]({name}.md) | {summary} |\n" for name, summary in COMMANDS.items())
    return f"| command | what it does |\n|---|---|\n{rows}"


def documents() -> dict[Path, str]:
    """Returns the text of each file that this script writes, by the file's path."""
    index = PAGES / "index.md"
    found = {
        SITE: navigation(SITE.read_text(encoding="utf-8")),
        index: f"{index.read_text(encoding='utf-8').partition(BEGIN)[0]}{BEGIN}\n{list_of_commands()}",
    }
    for name, parser in parsers().items():
        path = PAGES / f"{name}.md"
        found[path] = page(name, parser, path.read_text(encoding="utf-8") if path.exists() else "")
    return found


def main() -> None:
    """Writes the pages of all commands, or compares them with the existing files."""
    parser = parser_of(__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", action="store_true", help="write the pages")
    how.add_argument("--check", action="store_true", help="exit 1 unless the pages are up to date")
    options = parser.parse_args()
    PAGES.mkdir(exist_ok=True)
    for path, text in documents().items():
        if options.write:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path.relative_to(ROOT)} does not match the parsers; run: make docs")


if __name__ == "__main__":
    run_script(main)
