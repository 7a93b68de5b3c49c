"""Makes the expected values in tests/data/captions. ``python -m tests.make_caption_reference``

Needs pycocoevalcap (PyPI, with pycocotools) and Java; the tests need neither. Its scores of the captions in
``coco_example.json``, and its tokens of the lines in ``tokens.json``, are written into these files.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CAPTIONS = Path(__file__).parent / "data" / "captions"


def tokenised(captions: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """Captions of numbered pictures as the reference tokenizer leaves them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    numbered = {number: [{"caption": text} for text in texts] for number, texts in enumerate(captions)}
    found: dict[int, list[str]] = PTBTokenizer().tokenize(numbered)
    return found


def scores(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """What the reference scorers say."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said, written = tokenised([[text] for text in candidates]), tokenised(references)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu = Bleu(4).compute_score(written, said, verbose=0)[0]
        rouge, cider = (scorer.compute_score(written, said)[0] for scorer in (Rouge(), Cider()))
    named = {f"bleu_{size}": value for size, value in enumerate(bleu, start=1)}
    return named | {"rouge_l": float(rouge), "cider_d": float(cider)}


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON with one line for each item of a list."""
    parts = []
    for key, value in content.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in value) if isinstance(value, list) else ""
        parts.append(f" {json.dumps(key)}: " + (f"[\n{rows}\n ]" if rows else json.dumps(value)))
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main() -> None:
    """Writes both files anew."""
    example = json.loads((CAPTIONS / "coco_example.json").read_text(encoding="utf-8"))
    pictures = example["pictures"]
    example["expected"] = scores(
        [picture["caption"] for picture in pictures], [picture["references"] for picture in pictures]
    )
    write(CAPTIONS / "coco_example.json", example)
    lines = json.loads((CAPTIONS / "tokens.json").read_text(encoding="utf-8"))
    texts = [text for text, _ in lines["lines"]]
    # Numbered one by one, each followed by a line in small letters: the tokenizer looks past the end of a line.
    found = tokenised([[text, "end"] for text in texts])
    lines["lines"] = [[text, found[number][0]] for number, text in enumerate(texts)]
    write(CAPTIONS / "tokens.json", lines)


if __name__ == "__main__":
    main()
