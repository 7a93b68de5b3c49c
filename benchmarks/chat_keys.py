"""Writes the tables in docs/serving.md (keys of requests, and limits), from the definitions in the server's code.

python benchmarks/chat_keys.py --write docs/serving.md
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from reporting import with_tables

from blip2edge.cli import run_script
from blip2edge.limits import limit_table
from blip2edge.runtime.serving.chat_keys import EMBEDDING_KEYS, key_table

TABLES: dict[str, Callable[[], str]] = {
    "chat keys": key_table,
    "embedding keys": partial(key_table, EMBEDDING_KEYS),
    "limits": limit_table,
}


def placed(page: str) -> str:
    """Returns the page with the current tables between their marks."""
    return with_tables(page, TABLES, "chat_keys.py")


def main() -> None:
    """Writes the tables of request keys and limits into docs/serving.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--write", type=Path, metavar="FILE", required=True, help="write the tables into the page FILE")
    path: Path = parser.parse_args().write
    path.write_text(placed(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
