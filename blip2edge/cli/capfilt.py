"""``blip2edge capfilt``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blip2edge.cli.evaluate import data_config, judge_options
from blip2edge.cli.table import table
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from blip2edge.training.capfilt.filtering import Judged


def capfilt(options: argparse.Namespace) -> int:
    """Write captions, judge all of them, and keep what is good enough in shards."""
    from dataclasses import replace

    from blip2edge.training.capfilt.filtering import CapFiltOptions, judge_here
    from blip2edge.training.capfilt.filtering import capfilt as run
    from blip2edge.training.data.entries import by_picture
    from blip2edge.training.data.registry import read_entries

    judge_batches: Callable[..., Iterator[list[Judged]]] = judge_here
    if options.ray is not None:
        from blip2edge.training.capfilt.on_ray import judge_on_ray

        judge_batches = judge_on_ray(options.ray, options.workers)
    config, base = data_config(options)
    entries, broken = read_entries(config, base=base)
    captioning = judge_options(options)
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
        report = run(
            by_picture(entries),
            broken,
            options.output,
            chosen,
            judge_batches=judge_batches,
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
