"""CapFilt: captions written by a captioner, and all captions judged by a matching head (Li et al., arXiv 2201.12086).

For every picture a synthetic caption joins those of the web, the matching head (ITM) tells how likely each belongs to
the picture, and what reaches the threshold is kept (section 3.3 of that paper, where the threshold is the head's own
decision, 0.5). The result is shards to train on, and a report.

A batch of pictures is judged by one function, `judge`, whose answer depends on nothing but the batch. So one machine
and many (`capfilt_ray`) give the same shards, byte by byte.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from blip2edge.bundle.manifest import sha256_of
from blip2edge.bundle.publishing import staged
from blip2edge.errors import DataError, ImageError, option
from blip2edge.training.data.entries import Broken, Shown
from blip2edge.training.data.shards import ShardWriter
from blip2edge.training.evaluation.judges import (
    Answerer,
    Comparer,
    JudgeOptions,
    open_answerer,
    open_comparer,
)

REPORT = "report.json"
WEB, SYNTHETIC = "web", "synthetic"
KEEP: Mapping[str, tuple[str, ...]] = {"both": (WEB, SYNTHETIC), WEB: (WEB,), SYNTHETIC: (SYNTHETIC,)}
BINS = 10  # of the histogram of probabilities
EXAMPLES = 20  # captions that were dropped, named in the report


@dataclass(frozen=True)
class CapFiltOptions:
    """How captions are made and filtered.

    Attributes:
        captioner: A bundle or checkpoint that captions.
        matcher: One with a matching head.
        threshold: Least probability of a caption that is kept.
        keep: "both", "web" or "synthetic": which captions are kept if they are good enough.
        prompt: How captions begin; None for the captioner's own prompt.
        samples_per_shard: Pictures a shard.
        captioning: How the captioner is run; its batch size is that of everything.
        matching: How the matcher is run.
    """

    captioner: Path
    matcher: Path
    threshold: float = 0.5
    keep: str = "both"
    prompt: str | None = None
    samples_per_shard: int = 1000
    captioning: JudgeOptions = field(default_factory=JudgeOptions)
    matching: JudgeOptions = field(default_factory=JudgeOptions)


@dataclass(frozen=True)
class Judged:
    """What became of one picture.

    Attributes:
        captions: (text, origin, probability) of each caption; the same text twice counts as of the web.
        problem: Why the picture could not be used; empty if it could.
    """

    captions: tuple[tuple[str, str, float], ...] = ()
    problem: str = ""


Batch = Sequence[Shown]


def judge(batch: Batch, captioner: Answerer, matcher: Comparer, prompt: str | None) -> list[Judged]:
    """Captions and judges some pictures.

    Args:
        batch: Pictures with the captions that they have.
        captioner: Writes one more for each.
        matcher: Judges all.
        prompt: How the captions begin.

    Returns:
        One result a picture, in order.
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
    results = {number: Judged(problem=problem) for number, problem in problems.items()}
    for number, own, values in zip(opened, texts, found, strict=True):
        captions = tuple((text, origin, value) for (text, origin), value in zip(own, values, strict=True))
        results[number] = Judged(captions)
    return [results[number] for number in range(len(batch))]


def judge_here(batches: Iterable[Batch], options: CapFiltOptions) -> Iterator[list[Judged]]:
    """Judges batches in this process.

    Raises:
        UsageError: The captioner captions none, or the matcher has no matching head.
    """
    captioner = open_answerer(options.captioner, options.captioning)
    matcher = open_comparer(options.matcher, options.matching)
    for batch in batches:
        yield judge(batch, captioner, matcher, options.prompt)


class _Tally:
    """Counts captions of one origin."""

    def __init__(self) -> None:
        self.seen = self.kept = 0
        self.histogram = [0] * BINS

    def add(self, probability: float, kept: bool) -> None:
        self.seen += 1
        self.kept += kept
        self.histogram[min(BINS - 1, int(probability * BINS))] += 1

    def to_json(self) -> dict[str, Any]:
        return {"seen": self.seen, "kept": self.kept, "histogram": self.histogram}


def capfilt(
    pictures: Sequence[Shown],
    broken: Broken,
    output: Path,
    options: CapFiltOptions,
    *,
    judge_batches: Callable[[Iterable[Batch], CapFiltOptions], Iterator[list[Judged]]] = judge_here,
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Makes clean captions of noisy ones.

    Args:
        pictures: What there is, from `by_picture`.
        broken: Counts pictures that cannot be opened.
        output: The directory to make: shards and the report. It appears whole, or not at all.
        options: How.
        judge_batches: What judges batches, in their order: this process, or Ray.
        force: Replace `output` where it is one of this kind.
        progress: Called with (pictures done, all).

    Returns:
        The report, as it is written.

    Raises:
        DataError: There is no picture, nothing is good enough, or too much is broken.
        OutputError: `output` exists, or cannot be written.
        UsageError: A model that does not do what it is needed for.
    """
    if not pictures:
        raise DataError("expected at least one picture with a caption, got none")
    size, start = options.captioning.batch_size, time.monotonic()
    batches = [pictures[at : at + size] for at in range(0, len(pictures), size)]
    with staged(output, force, REPORT) as staging:
        shards = ShardWriter(staging, options.samples_per_shard)
        tallies = {WEB: _Tally(), SYNTHETIC: _Tally()}
        dropped: list[dict[str, Any]] = []
        written = done = 0
        for batch, results in zip(batches, judge_batches(batches, options), strict=True):
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
                f"lower {option('threshold')}, or give a matcher that knows such pictures",
            )
        report = _report(options, len(pictures), written, broken) | {
            **{origin: tally.to_json() for origin, tally in tallies.items()},
            "dropped": dropped,
            "shards": [{"file": path.name, "sha256": sha256_of(path)} for path in shards.paths],
            "seconds": round(time.monotonic() - start, 1),
        }
        (staging / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _report(options: CapFiltOptions, seen: int, kept: int, broken: Broken) -> dict[str, Any]:
    """What was asked for, and what became of the pictures."""
    return {
        "captioner": str(options.captioner),
        "matcher": str(options.matcher),
        "threshold": options.threshold,
        "keep": options.keep,
        "pictures": {"seen": seen, "kept": kept, "broken": len(broken.problems)},
        "broken": dict(list(broken.problems.items())[:EXAMPLES]),
    }


def _keep(
    shards: ShardWriter,
    key: str,
    shown: Shown,
    result: Judged,
    options: CapFiltOptions,
    counts: tuple[Mapping[str, _Tally], list[dict[str, Any]]],
) -> bool:
    """Writes a picture with the captions that are good enough; tells whether there was one."""
    tallies, dropped = counts
    kept = []
    for text, origin, probability in result.captions:
        good = probability >= options.threshold and origin in KEEP[options.keep]
        tallies[origin].add(probability, good)
        row = {"text": text, "origin": origin, "probability": round(probability, 6)}
        if good:
            kept.append(row)
        elif len(dropped) < EXAMPLES:
            dropped.append({"image_id": shown.image_id, **row})
    if kept:
        fields = {"image_id": shown.image_id, "captions": kept}
        texts = [str(row["text"]) for row in kept]
        shards.add(key, shown.picture.read(), shown.picture.suffix, texts, fields)
    return bool(kept)
