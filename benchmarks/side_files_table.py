"""Writes the tables of ``docs/checkpoints.md``: ``python benchmarks/side_files_table.py --write docs/checkpoints.md``.

The rows come from ``model/checkpoint/side_keys.py``. The text comes from ``benchmarks/side_files_notes.md``, where
``{TABLE}`` stands for a table.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from reporting import parser_of

from blip2edge.cli import run_script
from blip2edge.model.checkpoint import side_keys
from blip2edge.model.checkpoint.side_keys import KeyTable

NOTES = Path(__file__).with_name("side_files_notes.md")
TABLES = ("IMAGE_PROCESSOR", "PROCESSOR", "TOKENIZER", "GENERATION", "CONFIG")


def table(keys: KeyTable) -> str:
    """Returns the table of a file's keys: keys that are used, then checked keys, then keys that change no caption."""
    lines = ["| keys | what happens |", "|---|---|"]
    if keys.honoured:
        lines.append(f"| {listed(keys.honoured)} | honoured |")
    for key, accepted in keys.checked.items():
        values = ", ".join(f"`{json.dumps(value)}`" for value in (*accepted, None))
        lines.append(f"| `{key}` | refused, except {values} |")
    lines.append(f"| {listed(keys.neutral)} | neutral |")
    return "\n".join(lines)


def listed(names: tuple[str, ...]) -> str:
    """Returns the names as code, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


def page() -> str:
    """Returns the text of docs/checkpoints.md."""
    text = NOTES.read_text(encoding="utf-8")
    for name in TABLES:
        text = text.replace(f"{{{name}}}", table(getattr(side_keys, name)))
    return text.replace("{FROM_CONFIG}", listed(side_keys.FROM_CONFIG))


def main() -> None:
    """Writes docs/checkpoints.md, or compares the generated text with the existing file."""
    parser = parser_of(__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--check", type=Path)
    options = parser.parse_args()
    if options.write:
        options.write.write_text(page(), encoding="utf-8")
    elif options.check and options.check.read_text(encoding="utf-8") != page():
        sys.exit(f"{options.check} does not match model/checkpoint/side_keys.py; run: make docs")


if __name__ == "__main__":
    run_script(main)
