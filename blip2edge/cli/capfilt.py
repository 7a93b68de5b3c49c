"""``blip2edge capfilt``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blip2edge.cli.evaluate import data_config, model_options
from blip2edge.cli.table import table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from blip2edge.training.capfilt.pipeline import ScoredPicture


def capfilt(options: argparse.Namespace) -> int:
    """Write captions, judge all of them, and keep what is good enough in shards."""
    from dataclasses import replace

    from blip2edge.training.capfilt.pipeline import CapFiltOptions, run_capfilt, score_locally
    from blip2edge.training.data.entries import by_picture
    from blip2edge.training.data.registry import read_entries

    score_batches: Callable[..., Iterator[list[ScoredPicture]]] = score_locally
    if options.ray is not None:
        from blip2edge.training.capfilt.ray_backend import score_on_ray

        score_batches = score_on_ray(options.ray, options.workers)
    config, base = data_config(options)
    entries, broken = read_entries(config, base=base)
    captioning = model_options(options)
    chosen = CapFiltOptions(
        captioner=options.captioner,
        matcher=options.matcher,
        threshold=options.threshold,
        keep=options.keep,
        prompt=options.prompt,
        samples_per_shard=options.samples_per_shard,
        captioning=captioning,
        matching=replace(captioning, generation={}),
    )
    with Progress() as progress:
        report = run_capfilt(
            by_picture(entries),
            broken,
            options.output,
            chosen,
            score_batches=score_batches,
            force=options.force,
            progress=lambda done, total: progress("judging", done, total),
        )
    print(json.dumps(report) if options.json else _text(report, str(options.output)))
    return 0


def _text(report: Mapping[str, Any], output: str) -> str:
    rows = [
        (origin, str(report[origin]["seen"]), str(report[origin]["kept"])) for origin in ("web", "synthetic")
    ]
    pictures = report["pictures"]
    return "\n".join(
        [
            table(("captions", "seen", "kept"), rows, right=(1, 2)),
            f"{pictures['kept']} of {pictures['seen']} pictures have a caption left, {pictures['broken']} are broken",
            f"{output}: {len(report['shards'])} shards and report.json, in {report['seconds']} s",
            f'next: train on them with kind = "shards" and path = "{output}" in [data]',
        ]
    )
