"""The command ``blip2edge capfilt``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.choices import KEEP
from blip2edge.cli.flag_groups import (
    DATA,
    DECODING,
    SAMPLING,
    add_backend,
    add_batch_size,
    add_data_files,
    add_number,
    add_output,
    add_ray,
    add_some_generation,
    check_needed,
    given_generation,
)
from blip2edge.cli.flag_types import any_text, share
from blip2edge.cli.table import table
from blip2edge.errors import plural
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Mapping

    from blip2edge.training.capfilt.pipeline import ScoredPicture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``capfilt``."""
    parser.add_argument("data", metavar="DATA", help=f"data set to clean: {DATA}")
    parser.add_argument(
        "--captioner",
        metavar="CHECKPOINT|BUNDLE",
        type=Path,
        required=True,
        help="captioner that generates the synthetic captions; a bundle also as hub:ORG/NAME",
    )
    parser.add_argument(
        "--matcher",
        metavar="CHECKPOINT|BUNDLE",
        type=Path,
        required=True,
        help="model with a matching head (ITM), which scores all captions; a bundle also as hub:ORG/NAME",
    )
    add_output(
        parser, "DIR", "directory of the new shards and report.json", force="replace {} if capfilt wrote it before"
    )
    add_number(
        parser,
        "--threshold",
        "smallest matching probability of a kept caption (above 0, at most 1)",
        0.5,
        kind=share,
        metavar="P",
    )
    parser.add_argument(
        "--keep",
        choices=KEEP,
        default="both",
        help="which captions may be kept: those of the data set (web), the generated ones (synthetic), or both",
    )
    add_data_files(parser)
    parser.add_argument(
        "--prompt",
        metavar="P",
        type=any_text,
        help="text that the generated captions continue (default: the captioner's own prompt)",
    )
    add_number(parser, "--samples-per-shard", "number of pictures in a shard", 1000)
    add_ray(parser, "--workers", "load the models")
    add_batch_size(parser, 16)
    add_backend(parser)
    add_some_generation(parser, *DECODING)
    add_some_generation(parser, *SAMPLING)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Write captions, score all captions, and keep the captions that reach the threshold, in shards."""
    from dataclasses import replace

    from blip2edge.bundle.outputs.publishing import check_output
    from blip2edge.training.capfilt.pipeline import REPORT_FILE, CapFiltOptions, run_capfilt, score_locally

    check_needed("workers", options.workers, "ray", options.ray)
    check_output(options.output, options.force, REPORT_FILE, options.data, options.images, options.annotations)
    from blip2edge.model.checkpoint.stored.files import local_checkpoint

    for model in (options.captioner, options.matcher):
        local_checkpoint(model)  # a missing one is refused before the data is read and torch is imported
    from blip2edge.training.capfilt.ray_backend import score_on_ray
    from blip2edge.training.data.detect import detect_data
    from blip2edge.training.data.entries import by_picture
    from blip2edge.training.data.registry import read_entries
    from blip2edge.training.evaluation.models import ModelOptions

    score_batches: Callable[..., Iterator[list[ScoredPicture]]] = score_locally
    if options.ray is not None:
        score_batches = score_on_ray(options.ray, options.workers or 1)
    config, base = detect_data(options.data, options.images, options.annotations, options.max_broken)
    entries, broken = read_entries(config, base=base)
    captioning = ModelOptions(
        options.backend, options.threads, options.batch_size, given_generation(options), options.require_signature
    )
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
            progress=lambda done, total: progress("scoring", done, total),
        )
    print(json.dumps(report) if options.json else _text(report, str(options.output)))
    return 0


def _text(report: Mapping[str, Any], output: str) -> str:
    rows = [(origin, str(report[origin]["seen"]), str(report[origin]["kept"])) for origin in ("web", "synthetic")]
    pictures = report["pictures"]
    return "\n".join(
        [
            table(("captions", "scored", "kept"), rows, right=(1, 2)),
            f"{pictures['kept']} of {pictures['seen']} pictures keep a caption, {pictures['broken']} are broken",
            f"{output}: {plural(len(report['shards']), 'shard')} and report.json, in {report['seconds']} s",
            f'next: train on them with kind = "shards" and path = "{output}" in [data]',
        ]
    )
