"""Traces one caption: lists the files, classes and functions that run, and counts the calls from one file to another.

A person who wants to understand the code of a caption must open these files, so there should be few files. The same
picture is captioned twice, and the second caption is traced: work that is done once per process is not counted.

    python benchmarks/caption_path.py BUNDLE examples/pictures/scene-1.png
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import blip2edge
from blip2edge import Captioner
from blip2edge.cli import run_script

ROOT = Path(blip2edge.__file__).resolve().parents[1]


def trace(run: Callable[[], Any]) -> tuple[dict[str, set[str]], int]:
    """Calls a function and traces it.

    Returns the called Python functions of this project by file, and how often the trace goes from one file to another.
    """
    found: dict[str, set[str]] = {}
    entered: list[str] = []

    def on_event(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or code.co_filename.startswith("<"):
            return
        path = Path(code.co_filename).resolve()
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path != Path(__file__).resolve():
            name = str(path.relative_to(ROOT))
            found.setdefault(name, set()).add(getattr(code, "co_qualname", code.co_name))
            entered.append(name)

    sys.setprofile(on_event)
    try:
        run()
    finally:
        sys.setprofile(None)
    changes = sum(one != other for one, other in itertools.pairwise(entered))
    return found, changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("image")
    parser.add_argument("--tokens", type=int, default=12, help="length of the caption (12)")
    parser.add_argument("--draft", default="none", help="draft model (none)")
    options = parser.parse_args()
    captioner = Captioner.load(options.bundle, threads=1, draft=options.draft)

    def run() -> Any:
        return captioner.caption(options.image, max_new_tokens=options.tokens)

    run()
    found, changes = trace(run)
    functions = [name for names in found.values() for name in names]
    classes = {(file, name.split(".")[0]) for file, names in found.items() for name in names if "." in name}
    for file, names in found.items():
        print(f"{file:44} {len(names):3} functions")
    print(
        f"{len(found)} files, {len(classes)} classes, {len(functions)} functions, {changes} changes of file, "
        f"Python {sys.version.split()[0]}"
    )


if __name__ == "__main__":
    run_script(main)
