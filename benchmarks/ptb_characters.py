"""Derives ``blip2edge/training/metrics/characters.py`` from Stanford's tokenizer, which needs Java.

    pip download --no-deps pycocoevalcap && unzip pycocoevalcap-*.whl
    python benchmarks/ptb_characters.py pycocoevalcap/tokenizer/stanford-corenlp-3.4.1.jar

The tokenizer gets every character of the Basic Multilingual Plane alone between two words, and inside a word. If it
deletes a character, or classifies it differently from Python's ``\\w``, the character goes into one of three tables.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Iterable
from pathlib import Path

from reporting import ROOT

from blip2edge.cli import run_script

TARGET = ROOT / "blip2edge" / "training" / "metrics" / "characters.py"
MAIN = "edu.stanford.nlp.process.PTBTokenizer"
HEAD = '''"""Characters that Stanford's PTBTokenizer (CoreNLP 3.4.1) treats unlike Python's regular expressions.

Made by ``benchmarks/ptb_characters.py``; do not edit. Each table lists ranges of code points in hexadecimal.
"""

from __future__ import annotations

'''


def stanford(jar: Path, lines: list[str]) -> list[list[str]]:
    """Runs Stanford's tokenizer as pycocoevalcap does; returns the tokens of each line."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write("\n".join(lines))
        file.flush()
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), MAIN, "-preserveLines", "-lowerCase", file.name]
        done = subprocess.run(command, capture_output=True, check=True)
    return [line.split(" ") for line in done.stdout.decode().split("\n")[: len(lines)]]


def table(name: str, comment: str, characters: Iterable[str]) -> str:
    """Returns the Python source of one table of ranges: an assignment with its docstring."""
    ranges: list[list[int]] = []
    for code in sorted(map(ord, characters)):
        if ranges and code == ranges[-1][1] + 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    text = " ".join(f"{first:X}" if first == last else f"{first:X}-{last:X}" for first, last in ranges)
    lines = textwrap.wrap(text, 110)
    value = f'"{text}"' if len(lines) == 1 else '(\n    "' + ' "\n    "'.join(lines) + '"\n)'
    return f'{name} = {value}\n"""{comment}"""\n'


def main() -> None:
    """Writes the module ``characters.py``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jar", type=Path, help="stanford-corenlp-3.4.1.jar of pycocoevalcap 1.2")
    jar = parser.parse_args().jar
    characters = [chr(code) for code in range(0x7F, 0x10000) if not 0xD800 <= code < 0xE000]
    characters = [one for one in characters if not one.isspace()]
    alone = stanford(jar, [f"a {one} b" for one in characters])
    inside = stanford(jar, [f"ax{one}yb" for one in characters])
    deleted, letters, signs = [], [], []
    for one, between, within in zip(characters, alone, inside, strict=True):
        word = re.match(r"[^\W_]", one) is not None
        if between == ["a", "b"] and len(within) == 2:
            deleted.append(one)
        elif len(within) == 1 and within != ["axyb"] and not word:
            letters.append(one)
        elif len(within) == 3 and word:
            signs.append(one)
    content = "\n".join(
        (
            table(
                "DELETED",
                "Characters that are deleted, like all above U+FFFF; the words around them become separate tokens.",
                deleted,
            ),
            table(
                "LETTERS",
                "Characters that are letters here, but not in Python's patterns: mostly combining marks.",
                letters,
            ),
            table(
                "SIGNS",
                "Characters that are letters in Python's patterns, but separate tokens here: superscripts, fractions.",
                signs,
            ),
        )
    )
    TARGET.write_text(HEAD + content, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
