"""Scores the captions of held-out photographs: how many name the animal. Writes some of them as a page.

    blip2edge eval runs/photos/captioner --data runs/photos/data/test --predictions runs/photos/test.json
    python examples/recipes/photos/score.py runs/photos/test.json --data runs/photos/data --html runs/photos/page.html

The animal is the last word of a photograph's title: "bear" for "polar bear". A caption names the animal if the caption
contains this word, or a word of `KINDS` for it. Only photographs whose animal occurs in the training captions count. As
a control, each caption is also compared with the title of the next photograph.
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import platform
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from blip2edge.cli import run_script
from blip2edge.errors import DataError
from blip2edge.reading import MANIFEST_BYTES, parse_json, read_bytes, read_text, reading

KINDS: Mapping[str, tuple[str, ...]] = {"chicken": ("hen", "rooster"), "duck": ("drake",), "gull": ("seagull",)}
"""Names of females, males and kinds that are right for an animal too."""

SHOWN = 20  # photographs of the page


class Scored(NamedTuple):
    """A held-out photograph: file name, title, caption, and whether its animal occurs in the training captions."""

    name: str
    title: str
    caption: str
    trained: bool


def animal(title: str) -> str:
    """Returns the animal in a title: its last word."""
    return title.split()[-1].lower()


def names_it(caption: str, title: str) -> bool:
    """Returns whether a caption contains the animal of a title, as a whole word."""
    words = set(re.findall(r"[a-z]+", caption.lower()))
    return bool(words & {animal(title), *KINDS.get(animal(title), ())})


def read_scored(predictions: Path, data: Path) -> list[Scored]:
    """Reads the captions and titles of the photographs.

    Args:
        predictions: Output of `blip2edge eval --predictions`.
        data: Output of `prepare.py`.

    Raises:
        DataError: A file is missing, empty or of another form, or a picture of the predictions has no title.
    """
    record = data / "data.json"
    with reading(record, "the output of prepare.py", DataError, "give the directory that prepare.py wrote"):
        trained = " ".join(f"a {name}" for name in parse_json(read_bytes(record, MANIFEST_BYTES))["names"])
    with reading(predictions, "the output of `blip2edge eval --predictions`", DataError):
        lines = parse_json(read_bytes(predictions, MANIFEST_BYTES))
        captions = [(Path(str(line["image_id"])).stem, str(line["caption"]).strip()) for line in lines]
    found = []
    for name, caption in captions:
        path = data / "test" / f"{name}.txt"
        if not path.is_file():
            raise DataError(f"{predictions}: expected captions of {data / 'test'}, which has no {path.name}")
        title = read_text(path, DataError).strip()
        found.append(Scored(name, title, caption, names_it(trained, title)))
    if not found:
        raise DataError(f"{predictions}: expected at least one caption, got none")
    return found


def figures(scored: Sequence[Scored]) -> dict[str, Any]:
    """Returns how many captions name the animal: in all, and for each activity from which the photographs come."""

    def counts(rows: Sequence[Scored]) -> dict[str, Any]:
        known = [row for row in rows if row.trained]
        named = sum(names_it(row.caption, row.title) for row in known)
        return {"photographs": len(rows), "trained": len(known), "named": named}

    known = [row for row in scored if row.trained]
    others = sum(names_it(row.caption, other.title) for row in known for other in known if other is not row)
    shuffled = round(others / max(1, len(known) - 1), 2)  # the mean over all rotations of the titles
    activities = dict.fromkeys(row.name.split("-")[0] for row in scored)
    by = {name: counts([row for row in scored if row.name.startswith(f"{name}-")]) for name in activities}
    whole = counts(scored)
    share = whole["named"] / whole["trained"] if whole["trained"] else 0.0
    captions = {row.name: {"title": row.title, "caption": row.caption, "trained": row.trained} for row in scored}
    return whole | {"share": share, "named_after_shuffling": shuffled, "by_activity": by, "captions": captions}


def page(scored: Sequence[Scored], data: Path) -> str:
    """Returns an HTML page that shows photographs with title and caption; the page contains the pictures."""
    cells = []
    for row in sorted(scored, key=lambda each: not each.trained)[:SHOWN]:
        picture = base64.b64encode((data / "test" / f"{row.name}.png").read_bytes()).decode()
        right = "right" if names_it(row.caption, row.title) else "wrong"
        cells.append(
            f'<figure class="{right}"><img alt="" src="data:image/png;base64,{picture}"><figcaption>'
            f"<b>{html.escape(row.title)}</b><br>{html.escape(row.caption)}</figcaption></figure>"
        )
    style = (
        "body{font:16px sans-serif;display:flex;flex-wrap:wrap;gap:16px;margin:16px}"
        "figure{margin:0;width:220px}img{width:220px;height:220px;object-fit:cover}"
        ".right figcaption{border-left:6px solid #2a7}.wrong figcaption{border-left:6px solid #b33}"
        "figcaption{padding-left:8px}"
    )
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Held-out photographs</title>'
    head += f"<style>{style}</style>"
    return head + "\n".join(cells) + "</html>\n"


def machine() -> dict[str, str]:
    """Returns the machine and the package versions that a result depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def main() -> None:
    """Parses the command line, scores the captions and writes the results."""
    parser = argparse.ArgumentParser(description="Scores the captions of held-out photographs.")
    parser.add_argument("predictions", type=Path, help="output of `blip2edge eval --predictions`")
    parser.add_argument("--data", type=Path, required=True, help="output of prepare.py")
    parser.add_argument("--html", type=Path, help="a page of 20 photographs to write")
    options = parser.parse_args()
    scored = read_scored(options.predictions, options.data)
    if options.html:
        options.html.write_text(page(scored, options.data), encoding="utf-8")
    print(json.dumps(figures(scored) | {"machine": machine()}, indent=2))


if __name__ == "__main__":
    run_script(main)
