"""CapFilt: generates captions for pictures and filters all captions with a matching head (Li et al., arXiv 2201.12086).

A captioner generates one synthetic caption for each picture. The matching head (ITM) scores the generated
caption and the captions from the web. Captions that reach a threshold are kept (section 3.3 of that paper,
with the threshold 0.5). The result is shards to train on, and a report.

`score_batch` scores one batch, and the result depends only on that batch. So the shards that one machine writes and the
shards that many machines write (`ray_backend`) are equal, byte by byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blip2edge.bundle.outputs.publishing import staged
from blip2edge.bundle.trust.integrity import sha256_of
from blip2edge.choices import KEEP, SYNTHETIC, WEB
from blip2edge.errors import DataError, ImageError, option
from blip2edge.training.data.entries import AnnotatedPicture, BrokenSamples
from blip2edge.training.data.shards import ShardWriter
from blip2edge.training.evaluation.models import CaptionModel, MatchModel, ModelOptions
from blip2edge.training.evaluation.open_model import check_prompt, open_captioner, open_matcher

REPORT_FILE = "report.json"
_BINS = 10  # of the histogram of probabilities
_EXAMPLES = 20  # dropped captions that the report lists


@dataclass(frozen=True)
class CapFiltOptions:
    """How captions are generated and filtered.

    Attributes:
        captioner: A bundle or checkpoint of a captioner.
        matcher: A bundle or checkpoint with a matching head.
        threshold: Smallest probability of a caption that is kept.
        keep: Which captions may be kept: "web" (captions of the input), "synthetic" (generated captions), or "both".
        prompt: Prompt of the generated captions; None for the captioner's default.
        samples_per_shard: Number of pictures in one output shard.
        captioning: Options with which the captioner is run. Its batch size is also the number of pictures that are
            scored together.
        matching: Options with which the matcher is run.
    """

    captioner: Path
    matcher: Path
    threshold: float = 0.5
    keep: str = "both"
    prompt: str | None = None
    samples_per_shard: int = 1000
    captioning: ModelOptions = field(default_factory=ModelOptions)
    matching: ModelOptions = field(default_factory=ModelOptions)


@dataclass(frozen=True)
class ScoredPicture:
    """The scored captions of one picture.

    Attributes:
        captions: (text, origin, probability) of each caption. The origin is "web" or "synthetic"; a text that is both
            counts as "web". The probability that caption and picture match is from the matching head.
        problem: Why the picture cannot be used; empty if it can be used.
    """

    captions: tuple[tuple[str, str, float], ...] = ()
    problem: str = ""


Batch = Sequence[AnnotatedPicture]


def score_batch(batch: Batch, captioner: CaptionModel, matcher: MatchModel, prompt: str | None) -> list[ScoredPicture]:
    """Generates a caption for each picture of a batch, and scores all captions.

    Args:
        batch: Pictures with their captions from the web.
        captioner: Generates the synthetic captions.
        matcher: Scores all captions.
        prompt: Prompt of the synthetic captions; None for the captioner's default.

    Returns:
        One result for each picture, in order.
    """
    opened: dict[int, Image.Image] = {}
    problems: dict[int, str] = {}
    for number, shown in enumerate(batch):
        try:
            opened[number] = shown.picture.open()
        except ImageError as error:
            problems[number] = error.problem
    images = list(opened.values())
    written = captioner(images, [prompt] * len(images)) if images else []
    texts = []
    for number, synthetic in zip(opened, written, strict=True):
        web = list(dict.fromkeys(batch[number].captions))
        new = [synthetic] if synthetic and synthetic not in web else []
        texts.append([(text, WEB) for text in web] + [(text, SYNTHETIC) for text in new])
    found = matcher.probabilities(images, [[text for text, _ in own] for own in texts]) if images else []
    results = {number: ScoredPicture(problem=problem) for number, problem in problems.items()}
    for number, own, values in zip(opened, texts, found, strict=True):
        captions = tuple((text, origin, value) for (text, origin), value in zip(own, values, strict=True))
        results[number] = ScoredPicture(captions)
    return [results[number] for number in range(len(batch))]


def score_locally(batches: Iterable[Batch], options: CapFiltOptions) -> Iterator[list[ScoredPicture]]:
    """Scores batches in this process.

    Raises:
        UsageError: `captioner` is not a captioner, or the matcher has no matching head.
    """
    captioner = open_captioner(options.captioner, options.captioning)
    check_prompt(captioner, options.captioner, options.prompt)
    matcher = open_matcher(options.matcher, options.matching)
    for batch in batches:
        yield score_batch(batch, captioner, matcher, options.prompt)


class _CaptionCounts:
    """Counts the scored and the kept captions of one origin ("web" or "synthetic")."""

    def __init__(self) -> None:
        self.seen = self.kept = 0
        self.histogram = [0] * _BINS

    def add(self, probability: float, kept: bool) -> None:
        self.seen += 1
        self.kept += kept
        self.histogram[min(_BINS - 1, int(probability * _BINS))] += 1

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen, "kept": self.kept, "histogram": self.histogram}


def run_capfilt(
    pictures: Sequence[AnnotatedPicture],
    broken: BrokenSamples,
    output: Path,
    options: CapFiltOptions,
    *,
    score_batches: Callable[[Iterable[Batch], CapFiltOptions], Iterator[list[ScoredPicture]]] = score_locally,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Generates and filters captions, and writes the result as shards with a report.

    Args:
        pictures: The data, from `by_picture`.
        broken: Collects broken samples; pictures that cannot be opened are added.
        output: Directory to write. The directory appears only when it is complete.
        options: How captions are generated and filtered.
        score_batches: Scores batches in their order: `score_locally`, or the result of `score_on_ray`.
        force: Whether to replace `output` if an earlier run of CapFilt wrote `output`.
        progress: Called with (pictures done, all pictures).

    Returns:
        The report, as written to `report.json`.

    Raises:
        DataError: There is no picture, no caption reaches the threshold, or more samples are broken than allowed.
        OutputError: `output` exists, or cannot be written.
        UsageError: `captioner` is not a captioner, or the matcher has no matching head.
    """
    if not pictures:
        raise broken.none_usable("picture with a caption")
    size, start = options.captioning.batch_size, time.monotonic()
    batches = [pictures[at : at + size] for at in range(0, len(pictures), size)]
    with staged(output, force, REPORT_FILE) as staging:
        shards = ShardWriter(staging, options.samples_per_shard)
        tallies = {WEB: _CaptionCounts(), SYNTHETIC: _CaptionCounts()}
        dropped: list[dict[str, Any]] = []
        written = done = 0
        for batch, results in zip(batches, score_batches(batches, options), strict=True):
            for shown, result in zip(batch, results, strict=True):
                if result.problem:
                    broken.add(shown.image_id, result.problem)
                    continue
                written += _keep(shards, f"{written:08d}", shown, result, options, (tallies, dropped))
            done += len(batch)
            progress(done, len(pictures))
        shards.close()
        if not written:
            raise DataError(
                f"no caption of {len(pictures)} pictures reaches the threshold {options.threshold}",
                f"lower {option('threshold')}, or give a matcher that was trained on pictures like these",
            )
        report = _report(options, len(pictures), written, broken) | {
            **{origin: tally.to_json() for origin, tally in tallies.items()},
            "dropped": dropped,
            "shards": [{"file": path.name, "sha256": sha256_of(path)} for path in shards.paths],
            "seconds": round(time.monotonic() - start, 1),
        }
        (staging / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _report(options: CapFiltOptions, seen: int, kept: int, broken: BrokenSamples) -> dict[str, Any]:
    """Returns the first entries of the report: the options, and the numbers of pictures."""
    return {
        "captioner": str(options.captioner),
        "matcher": str(options.matcher),
        "threshold": options.threshold,
        "keep": options.keep,
        "pictures": {"seen": seen, "kept": kept, "broken": len(broken.problems)},
        "broken": dict(list(broken.problems.items())[:_EXAMPLES]),
    }


def _keep(
    shards: ShardWriter,
    key: str,
    shown: AnnotatedPicture,
    result: ScoredPicture,
    options: CapFiltOptions,
    counts: tuple[Mapping[str, _CaptionCounts], list[dict[str, Any]]],
) -> bool:
    """Writes a picture with its captions that reach the threshold. Returns whether the picture has such a caption."""
    tallies, dropped = counts
    kept = []
    for text, origin, probability in result.captions:
        good = probability >= options.threshold and origin in KEEP[options.keep]
        tallies[origin].add(probability, good)
        row = {"text": text, "origin": origin, "probability": round(probability, 6)}
        if good:
            kept.append(row)
        elif len(dropped) < _EXAMPLES:
            dropped.append({"image_id": shown.image_id, **row})
    if kept:
        fields = {"image_id": shown.image_id, "captions": kept}
        texts = [str(row["text"]) for row in kept]
        shards.add(key, shown.picture.read(), shown.picture.suffix, texts, fields)
    return bool(kept)
