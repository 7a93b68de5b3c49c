"""Completion in the shell: the generated scripts, and what bash offers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from blip2edge.choices import PRECISIONS, TRAINING_STAGES
from blip2edge.cli import main
from blip2edge.cli.completion import SHELLS
from blip2edge.cli.parser import COMMANDS, build_parser

BASH = shutil.which("bash")

# Calls the registered function as readline does, with the words as COMP_WORDBREAKS separates them.
ASK = """
source completion.bash
[[ $(complete -p blip2edge) == *"-F _blip2edge"* ]] || exit 3
compopt() { echo "compopt $*"; }  # outside a completion, bash refuses it
while IFS= read -r line; do
    COMP_WORDS=($line)
    [[ $line == *" " ]] && COMP_WORDS+=("")
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
    _blip2edge
    echo "${COMPREPLY[*]}"
done
"""


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_have_every_command_and_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(shell, capsys)
    assert all(f" {name}" in text or f"'{name}:" in text or f'"{name}"' in text for name in COMMANDS)
    prefix = "-l " if shell == "fish" else "--"
    parser = build_parser()
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    for one in dict(commands or {}).values():
        for flag in one._option_string_actions:
            if flag.startswith("--"):
                assert prefix + flag.removeprefix("--") in text, flag


@pytest.mark.skipif(BASH is None, reason="bash is not installed")
def test_bash_completes_commands_flags_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "completion.bash").write_text(script("bash", capsys))
    precisions = " ".join(PRECISIONS)
    expected = {
        "blip2edge plan --device orin-nano-4": "orin-nano-4gb",
        "blip2edge calibrate --device th": "thor",
        "blip2edge plan llava": "llava-hf/llava-1.5-7b-hf",
        "blip2edge ca": "calibrate caption capfilt",
        "blip2edge ": " ".join(COMMANDS),
        "blip2edge --v": "--version",
        "blip2edge export --prec": "--precision",
        "blip2edge export --precision ": precisions,
        "blip2edge export --precision fp1": "fp16",
        "blip2edge export --precision = ": precisions,
        "blip2edge export --precision = b": "bf16",
        "blip2edge --debug train st": " ".join(stage for stage in TRAINING_STAGES if stage.startswith("st")),
        "blip2edge caption dog.jpg -b ": "",  # a directory, by bash's own completion
        "blip2edge caption dog.jpg --threads ": "compopt +o default\n",  # a number: no file names either
        "blip2edge completion z": "zsh",
        "blip2edge caption build --st": "--stream",  # the first command counts
    }
    done = subprocess.run(
        [str(BASH), "--norc", "-c", ASK],
        input="".join(f"{line}\n" for line in expected),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=True,
    )
    assert done.stderr == ""
    assert done.stdout == "".join(f"{words}\n" for words in expected.values())


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shell != "bash"])
def test_other_shells_can_read_their_script(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(script(shell, capsys))
    subprocess.run([program, "--no-execute" if shell == "fish" else "-n", str(path)], timeout=60, check=True)
