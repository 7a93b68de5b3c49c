"""``blip2edge completion``: prints a script that completes commands, flags and values in a shell.

The script is generated from the parsers, so that it has all flags of this version. It starts no Python when it runs.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")
FILE_NAMES = ("IMAGE", "SOURCE", "CHECKPOINT", "DATA", "DIR", "DIRECTORY", "FILE")
"""Placeholders of arguments that are read as text but may be a file or a directory."""


@dataclass(frozen=True)
class Argument:
    """Describes one argument of a command for completion.

    Attributes:
        flags: ``--output`` and its short forms; empty for a positional argument.
        values: Allowed values; empty if they are not fixed.
        takes_value: Whether a value follows the flag.
        is_file: Whether the value may be a file or a directory.
        repeats: Whether more than one value may follow, or the positional argument may be repeated.
        text: One short line of help.
        name: Placeholder of the value.
    """

    flags: tuple[str, ...]
    values: tuple[str, ...]
    takes_value: bool
    is_file: bool
    repeats: bool
    text: str
    name: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``completion``."""
    parser.add_argument("shell", choices=SHELLS, help="shell that reads the script")


def run(options: argparse.Namespace) -> int:
    """Print the script of one shell."""
    from blip2edge.cli.parser import COMMANDS, build_parser

    parser, known = build_parser(), _known_values()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    arguments = {"": _arguments(parser)}
    for name, one in commands.choices.items():
        arguments[name] = [
            replace(found, values=found.values or known.get((name, found.flags[-1] if found.flags else found.name), ()))
            for found in _arguments(one)
        ]
    write = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}[options.shell]
    print(write(arguments, COMMANDS), end="")
    return 0


def _known_values() -> dict[tuple[str, str], tuple[str, ...]]:
    """Returns suggested values (names of boards and models) of some arguments; other values are allowed too.

    The keys are pairs: the name of the command, and the flag or placeholder of the argument.
    """
    from blip2edge.runtime.bench.devices import DEVICES, THIS
    from blip2edge.shapes.families import PUBLISHED

    return {
        ("plan", "--device"): (*DEVICES, THIS),
        ("calibrate", "--device"): tuple(DEVICES),
        ("plan", "model"): tuple(PUBLISHED),
    }


def _arguments(parser: argparse.ArgumentParser) -> list[Argument]:
    """Returns the arguments of one parser, without the argument that selects the command."""
    return [
        _argument(action)
        for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._SubParsersAction)
    ]


def _argument(action: argparse.Action) -> Argument:
    name = action.metavar if isinstance(action.metavar, str) else action.dest
    return Argument(
        flags=tuple(action.option_strings),
        values=tuple(map(str, action.choices or ())),
        takes_value=action.nargs != 0,
        is_file=action.type is Path or name in FILE_NAMES,
        repeats=action.nargs in ("+", "*"),
        text=re.split(r"[;:.] | \(", " ".join((action.help or "").split()), maxsplit=1)[0].replace("`", ""),
        name=name.lower(),
    )


def bash_script(arguments: dict[str, list[Argument]], commands: dict[str, str]) -> str:
    """Writes the script for bash.

    Args:
        arguments: Arguments by command; the key ``""`` has the arguments that come before the command.
        commands: The summary of each command.
    """
    after, flags, words = [], [], [f'        "") words="{" ".join(commands)}" ;;']
    for command, found in arguments.items():
        for one in found:
            patterns = "|".join(f'"{command} {flag}"' for flag in one.flags)
            values = " ".join(one.values)
            if not one.flags and values:
                words.append(f'        "{command}") words="{values}" ;;')
            elif values:
                after.append(f'        {patterns}) words="{values}" ;;')
            elif one.flags and one.takes_value:  # no words: bash's own completion of files, unless it is switched off
                after.append(f"        {patterns}) {'' if one.is_file else 'compopt +o default; '}return ;;")
        flags.append(f'        "{command}") words="{" ".join(flag for one in found for flag in one.flags)}" ;;')
    lines = [
        '# Completion of blip2edge for bash. Use it with:  eval "$(blip2edge completion bash)"',
        "_blip2edge() {",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" words="" item',
        '    if [[ $word == "=" ]]; then word=""',
        '    elif [[ $before == "=" ]]; then before="${COMP_WORDS[COMP_CWORD-2]}"; fi',
        '    for item in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f'        case " {" ".join(commands)} " in *" $item "*) command="$item"; break ;; esac',
        "    done",
        '    case "$command $before" in',
        *after,
        "    esac",
        '    if [[ -z $words && $word == -* ]]; then case "$command" in',
        *flags,
        '    esac; elif [[ -z $words ]]; then case "$command" in',
        *words,
        "    esac; fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _blip2edge blip2edge",
    ]
    return "\n".join(lines) + "\n"


def zsh_script(arguments: dict[str, list[Argument]], commands: dict[str, str]) -> str:
    """Writes the script for zsh, from the arguments and the summaries of the commands (:func:`bash_script`)."""

    def specs(one: Argument) -> list[str]:
        values = f"({' '.join(one.values)})" if one.values else "_files" if one.is_file else " "
        value = f":{one.name}:{values}" if one.takes_value else ""
        help_text = re.sub(r"[\[\]:]", "", one.text)
        named = [f"*{flag}[{help_text}]{value}" for flag in one.flags]
        return [_quoted(spec) for spec in named or ["*" + value if one.repeats else value]]

    def listed(command: str) -> str:
        return " ".join(spec for one in arguments[command] for spec in specs(one))

    lines = [
        "#compdef blip2edge",
        '# Completion of blip2edge for zsh. Use it with:  eval "$(blip2edge completion zsh)"',
        "_blip2edge() {",
        '    local curcontext="$curcontext" state line',
        "    local -a commands=(",
        *(f"        {_quoted(f'{name}:{text}')}" for name, text in commands.items()),
        "    )",
        f"    _arguments -C {listed('')} ':command:->command' '*::argument:->argument'",
        "    case $state in",
        "        command) _describe command commands ;;",
        "        argument) case $words[1] in",
        *(f"            {name}) _arguments {listed(name)} ;;" for name in commands),
        "        esac ;;",
        "    esac",
        "}",
        'if [[ $funcstack[1] == _blip2edge ]]; then _blip2edge "$@"; else compdef _blip2edge blip2edge; fi',
    ]
    return "\n".join(lines) + "\n"


def fish_script(arguments: dict[str, list[Argument]], commands: dict[str, str]) -> str:
    """Writes the script for fish, from the arguments and the summaries of the commands (:func:`bash_script`)."""
    lines = ["# Completion of blip2edge for fish. Use it with:  blip2edge completion fish | source"]
    for name, text in commands.items():
        lines.append(f"complete -c blip2edge -f -n __fish_use_subcommand -a {name} -d {_quoted(text)}")
    for command, found in arguments.items():
        where = f"'__fish_seen_subcommand_from {command}'" if command else "__fish_use_subcommand"
        for one in found:
            line = f"complete -c blip2edge -n {where}"
            for flag in one.flags:
                line += f" {'-l' if flag.startswith('--') else '-s'} {flag.lstrip('-')}"
            if one.values:
                line += f" {'-x' if one.flags else '-f'} -a {_quoted(' '.join(one.values))}"
            elif one.flags and one.takes_value:
                line += " -r" if one.is_file else " -x"
            if one.flags or one.values:
                lines.append(f"{line} -d {_quoted(one.text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """Puts a text in single quotes, so that each shell reads it in the same way.

    A single quote inside becomes ``’``, and backslashes are removed.
    """
    return "'" + text.replace("'", "’").replace("\\", "") + "'"
