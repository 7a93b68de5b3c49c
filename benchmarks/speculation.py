"""Measures the gain of speculative decoding: a bundle with and without its draft model, on held-out pictures.

    python benchmarks/speculation.py smollm2=BUNDLE miniature=BUNDLE --json benchmarks/results/speculation.json

Each picture is captioned with every value of `--draft`, one after the other, in rotating order, on one thread. Seconds
are process CPU time of the whole caption, from the picture to its text, including the draft model. If the texts are not
equal token for token, nothing is written. With the value "always", the draft model (the bridge's text head) is used at
every step, even where that saves no time.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from reporting import command, cpu_model, median_ratio, named_bundle, parser_of, versions, write_json

from blip2edge.bundle.bundle import Bundle
from blip2edge.bundle.schema import DECODER, DRAFT, EMBEDDINGS_FILE, DraftName
from blip2edge.cli import run_script
from blip2edge.errors import DataError
from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
from blip2edge.runtime.decoding.speculative import SpeculationCost
from blip2edge.training.data.scenes import scenes

Draft = Literal[DraftName, "always"]
SERIES = 900  # series of the held-out scenes, which no training uses


class Always(SpeculationCost):
    """Replaces the estimate of the draft model's gain: the draft model then runs at every step."""

    @property
    def pays(self) -> bool:
        """Returns True: the draft model always runs."""
        return True


class Contestant:
    """One of the compared values of `--draft`. All values use one captioner, so the weights are in memory once."""

    def __init__(self, captioner: Captioner, draft: Draft) -> None:
        self.captioner = captioner
        self.draft: DraftName = "itg" if draft == "always" else draft
        clock = captioner.generator.drafts.costs["itg"].clock
        self.cost = Always(clock) if draft == "always" else SpeculationCost(clock)

    def caption(self, picture: Any, tokens: int) -> CaptionResult:
        """Captions a picture with this value of `--draft`.

        `self.cost` decides when the draft model runs; it uses only the times measured with this value.
        """
        costs = self.captioner.generator.drafts.costs
        costs.update(dict.fromkeys(costs, self.cost))
        return self.captioner.caption(picture, max_new_tokens=tokens, draft=self.draft)


def share(parts: Sequence[CaptionResult], stage: str) -> float:
    """Returns the mean milliseconds of a stage per caption."""
    return round(statistics.mean(part.timings_ms[stage] for part in parts), 3)


def race(bundle: Path, drafts: Sequence[Draft], pictures: int, warm_up: int, tokens: int) -> dict[str, Any]:
    """Measures captions of one bundle with each value of `--draft`.

    Args:
        bundle: A bundle with a draft model.
        drafts: The values of `--draft` that are compared; includes "none".
        pictures: Number of timed captions with each value.
        warm_up: Number of captions before the timed captions.
        tokens: Largest number of tokens of a caption.

    Raises:
        DataError: A text differs from that of plain decoding.
    """
    captioner = Captioner.load(bundle, threads=1)
    contestants = {draft: Contestant(captioner, draft) for draft in drafts}
    seconds: dict[str, list[float]] = {draft: [] for draft in drafts}
    results: dict[str, list[CaptionResult]] = {draft: [] for draft in drafts}
    for number, scene in enumerate(scenes(warm_up + pictures, split="heldout", seed=SERIES)):
        turn = number % len(drafts)
        for draft in (*drafts[turn:], *drafts[:turn]):
            start = time.process_time()
            result = contestants[draft].caption(scene.picture, tokens)
            taken = time.process_time() - start
            if number >= warm_up:
                seconds[draft].append(taken)
                results[draft].append(result)
        for draft in drafts:
            if results[draft] and results[draft][-1].tokens != results["none"][-1].tokens:
                raise DataError(
                    f"{bundle}: picture {number}: --draft {draft} gives {results[draft][-1].text!r}, plain decoding "
                    f"{results['none'][-1].text!r}"
                )
    figures: dict[str, Any] = {}
    for draft in drafts:
        mine, written = results[draft], sum(len(result.tokens) for result in results[draft])
        passes = sum(len(result.tokens) / result.tokens_per_pass for result in mine)
        figures[draft] = {
            "cpu_ms_per_caption": round(1e3 * statistics.mean(seconds[draft]), 3),
            "speed_up": round(sum(seconds["none"]) / sum(seconds[draft]), 3),
            "speed_up_of_the_median_picture": round(median_ratio(seconds["none"], seconds[draft]), 3),
            "tokens_per_pass": round(written / passes, 3),
            "prefill_ms": share(mine, "prefill"),
            "decode_ms": share(mine, "decode"),
            "vision_and_bridge_ms": round(share(mine, "vision") + share(mine, "bridge"), 3),
        }
    return {
        **sizes(bundle),
        "pictures": pictures,
        "tokens_per_caption": round(statistics.mean(len(result.tokens) for result in results["none"]), 2),
        "equal_texts": pictures,
        "drafts": figures,
    }


def sizes(path: Path) -> dict[str, Any]:
    """Returns the bytes of weights that one step uses, for the language model and the draft model, and their ratio."""
    files = Bundle.open(path).manifest.files
    language = files[f"{DECODER}.onnx.data"].size
    draft = files[f"{DRAFT}.onnx.data"].size
    return {
        "precision": Bundle.open(path).graph(DECODER).precision,
        "language_model_bytes": language,
        "token_table_bytes": files[EMBEDDINGS_FILE].size,
        "draft_bytes": draft,
        "language_model_over_draft": round(language / draft, 1),
    }


def main() -> int:
    """Measures the bundles named on the command line."""
    parser = parser_of(__doc__)
    parser.add_argument("bundles", nargs="+", type=named_bundle, metavar="NAME=BUNDLE")
    parser.add_argument("--drafts", nargs="+", choices=get_args(Draft), default=["none", "auto", "always", "lookup"])
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    bundles = {}
    for name, path in options.bundles:
        bundles[name] = race(path, options.drafts, options.pictures, options.warm_up, options.tokens)
    document = {
        "command": command(*(f"{name}=BUNDLE" for name in bundles)),
        "method": "process CPU time, one thread, contestants in turn picture by picture, held-out scenes",
        "machine": cpu_model(),
        "versions": versions("onnxruntime", "numpy", "tokenizers"),
        "bundles": bundles,
    }
    print(json.dumps(document, indent=2))
    write_json(options.json, document)
    return 0


if __name__ == "__main__":
    run_script(main)
