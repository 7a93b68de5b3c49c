"""Draws docs/masks.svg: the three masks of the first stage, by the function that the training calls.

python benchmarks/masks_picture.py docs/masks.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from blip2edge.model.masks import TASKS, attention_mask

QUERIES, TOKENS, PADDED = 4, 5, 1
CELL, GAP, LEFT, TOP = 22, 60, 74, 64  # pixels
TITLES = {"itc": "ITC: unimodal", "itm": "ITM: bidirectional", "itg": "ITG: multimodal causal"}
FONT = 'font-family="sans-serif" font-size="11"'
SEEN, HIDDEN, PAD = "#2f6f9f", "#eef1f4", "#d8c9a8"


def label(slot: int) -> str:
    """A slot's name: q1 … for queries, t1 … for tokens, pad."""
    if slot < QUERIES:
        return f"q{slot + 1}"
    return "pad" if slot >= QUERIES + TOKENS - PADDED else f"t{slot - QUERIES + 1}"


def draw() -> str:
    """The picture as SVG."""
    text = torch.ones(1, TOKENS, dtype=torch.int64)
    text[0, TOKENS - PADDED :] = 0
    slots = QUERIES + TOKENS
    side = slots * CELL
    width, height = LEFT + len(TASKS) * (side + GAP), TOP + side + 46
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {FONT} fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, task in enumerate(TASKS):
        left = LEFT + number * (side + GAP)
        mask = attention_mask(task, QUERIES, text)[0]
        parts.append(f'<text x="{left}" y="20" font-size="14" font-weight="bold">{TITLES[task]}</text>')
        for i in range(slots):
            middle = i * CELL + CELL / 2
            parts.append(f'<text x="{left - 6}" y="{TOP + middle + 4}" text-anchor="end">{label(i)}</text>')
            parts.append(f'<text x="{left + middle}" y="{TOP - 6}" text-anchor="middle">{label(i)}</text>')
            for j in range(slots):
                padded = "pad" in (label(i), label(j))
                fill = SEEN if mask[i, j] and label(i) != "pad" else PAD if padded else HIDDEN
                parts.append(
                    f'<rect x="{left + j * CELL + 1}" y="{TOP + i * CELL + 1}" width="{CELL - 2}" '
                    f'height="{CELL - 2}" fill="{fill}"/>'
                )
    notes = ((SEEN, "sees"), (HIDDEN, "does not see"), (PAD, "padding: never read"))
    for number, (fill, note) in enumerate(notes):
        x = LEFT + number * 150
        parts.append(f'<rect x="{x}" y="{height - 28}" width="14" height="14" fill="{fill}"/>')
        parts.append(f'<text x="{x + 20}" y="{height - 17}">{note}</text>')
    parts.append(
        f'<text x="14" y="{TOP + side / 2}" transform="rotate(-90 14 {TOP + side / 2})">looks</text>'
    )
    parts.append(f'<text x="{LEFT}" y="{TOP - 24}">is looked at →</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
