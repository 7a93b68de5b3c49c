"""Scores the names that a captioner generates: exact matches, with shuffled pairs as a control.

    blip2edge eval runs/emoji/captioner --data runs/emoji/data/test --predictions runs/emoji/test.json
    python examples/recipes/emoji/score.py runs/emoji/test.json --data runs/emoji/data/test

`blip2edge eval` prints the caption scores (CIDEr and others) of the same run. For the output of stage 1 it prints the
retrieval of names by pictures and of pictures by names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from blip2edge.training.metrics.exact import exact_match, shuffled_match

EXAMPLES = 12  # wrong answers to print


def words_found(said: list[str], right: list[str]) -> float:
    """Share of the names with at least one correct word, such as "green apple" for "red apple"."""
    pairs = zip(said, right, strict=True)
    return sum(bool(set(one.split()) & set(other.split())) for one, other in pairs) / len(right)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Scores the names that a captioner generates.")
    parser.add_argument("predictions", type=Path, help="output of `blip2edge eval --predictions`")
    parser.add_argument("--data", type=Path, required=True, help="the folder of the captioned pictures")
    options = parser.parse_args()
    said: list[str] = []
    right: list[str] = []
    wrong: list[dict[str, str]] = []
    for line in json.loads(options.predictions.read_text(encoding="utf-8")):
        name = Path(str(line["image_id"])).stem
        said.append(str(line["caption"]).strip())
        right.append((options.data / f"{name}.txt").read_text(encoding="utf-8").strip())
        if said[-1] != right[-1] and len(wrong) < EXAMPLES:
            wrong.append({"right": right[-1], "said": said[-1]})
    figures = {
        "n": len(right),
        "exact_match": exact_match(said, right),
        "shuffled_match": shuffled_match(said, right),
        "a_word_right": words_found(said, right),
        "wrong": wrong,
    }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
