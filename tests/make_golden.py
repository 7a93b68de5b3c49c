"""Makes tests/data/golden: a tiny bundle and transformers' results for it. ``python -m tests.make_golden``

On a device without torch and transformers, perhaps with Python 3.10, ``tests/runtime/captioning/test_golden.py``
compares the runtime with these results. They also check that later versions read bundles of schema version 1.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from blip2edge.export.pipeline import export_checkpoint
from tests.drawing import Variant, save, with_ends

GOLDEN = Path(__file__).parent / "data" / "golden"
PROMPTS = (None, "a photo of", "Question: what is two? Short answer:")
OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 12},
    {"max_new_tokens": 12, "num_beams": 3},
    {"max_new_tokens": 12, "repetition_penalty": 1.4, "min_new_tokens": 4},
)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        drawn = save(Path(folder), with_ends(Variant(seed=3, vision_layers=1, qformer_layers=1)))
        shutil.rmtree(GOLDEN, ignore_errors=True)
        export_checkpoint(drawn.directory, GOLDEN / "bundle")
        rng = np.random.default_rng(0)
        cases = []
        for number, prompt in enumerate(PROMPTS):
            path = GOLDEN / f"picture-{number}.png"
            image = PIL.Image.fromarray(rng.integers(0, 256, (20 + 7 * number, 31, 3), dtype=np.uint8))
            image.save(path)
            for options in OPTIONS:
                tokens = drawn.generate(image, prompt, **options)
                cases.append({"image": path.name, "prompt": prompt, "options": options, "tokens": tokens})
        (GOLDEN / "answers.json").write_text(json.dumps(cases, indent=1) + "\n")
        (GOLDEN / "bundle" / ".verified.json").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
