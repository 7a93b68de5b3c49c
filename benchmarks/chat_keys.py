"""Writes the table of a chat request's keys in docs/serving.md, from the data that the server reads.

python benchmarks/chat_keys.py --write docs/serving.md
"""

from __future__ import annotations

import argparse
from pathlib import Path

from blip2edge.runtime.serving.chat_keys import key_table

BEGIN, END = "<!-- chat keys: made by benchmarks/chat_keys.py -->\n", "<!-- end of chat keys -->\n"


def placed(page: str) -> str:
    """A page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{key_table()}\n{END}{after}"


def main() -> None:
    """Writes the table into a page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", type=Path, metavar="FILE", required=True, help="put it into that page")
    path: Path = parser.parse_args().write
    path.write_text(placed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
