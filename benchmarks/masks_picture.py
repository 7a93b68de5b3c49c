"""Draws docs/masks.svg: the three attention masks of stage 1, computed with the training's own function.

python benchmarks/masks_picture.py docs/masks.svg
"""

from __future__ import annotations

from pathlib import Path

import torch
from reporting import parser_of

from blip2edge.charts import element, label, svg_file
from blip2edge.cli import run_script
from blip2edge.model.masks import TASKS, attention_mask

QUERIES, TOKENS, PADDED = 4, 5, 1
CELL, GAP, LEFT, TOP = 22, 60, 74, 64  # pixels
TITLES = {"itc": "ITC: unimodal", "itm": "ITM: bidirectional", "itg": "ITG: multimodal causal"}
ATTENDED, MASKED, PAD = "#2f6f9f", "#eef1f4", "#d8c9a8"


def slot_name(slot: int) -> str:
    """Returns the name of a position: q1, q2, … for queries; t1, t2, … for tokens; pad for padding."""
    if slot < QUERIES:
        return f"q{slot + 1}"
    return "pad" if slot >= QUERIES + TOKENS - PADDED else f"t{slot - QUERIES + 1}"


def draw() -> str:
    """Returns an SVG picture of the three attention masks of stage 1."""
    text = torch.ones(1, TOKENS, dtype=torch.int64)
    text[0, TOKENS - PADDED :] = 0
    slots = QUERIES + TOKENS
    side = slots * CELL
    width, height = LEFT + len(TASKS) * (side + GAP), TOP + side + 46
    shapes = []
    for number, task in enumerate(TASKS):
        left = LEFT + number * (side + GAP)
        mask = attention_mask(task, QUERIES, text)[0]
        shapes.append(label(TITLES[task], left, 20))
        for i in range(slots):
            middle = i * CELL + CELL / 2
            shapes.append(label(slot_name(i), left - 6, TOP + middle + 4, anchor="end"))
            shapes.append(label(slot_name(i), left + middle, TOP - 6, anchor="middle"))
            for j in range(slots):
                padded = "pad" in (slot_name(i), slot_name(j))
                fill = ATTENDED if mask[i, j] and slot_name(i) != "pad" else PAD if padded else MASKED
                x, y = left + j * CELL + 1, TOP + i * CELL + 1
                shapes.append(element("rect", x=x, y=y, width=CELL - 2, height=CELL - 2, fill=fill))
    notes = ((ATTENDED, "attends to"), (MASKED, "masked"), (PAD, "padding: never read"))
    for number, (fill, note) in enumerate(notes):
        x = LEFT + number * 150
        shapes.append(element("rect", x=x, y=height - 28, width=14, height=14, fill=fill))
        shapes.append(label(note, x + 20, height - 17))
    rotation = f"rotate(-90 14 {TOP + side / 2})"
    shapes.append(element("text", "query", x=14, y=TOP + side / 2, transform=rotation))
    shapes.append(label("key →", LEFT, TOP - 24))
    return svg_file(width, height, shapes)


def main() -> None:
    """Parses the command line, and writes the picture."""
    parser = parser_of(__doc__)
    parser.add_argument("path", type=Path, help="the SVG file to write")
    parser.parse_args().path.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
