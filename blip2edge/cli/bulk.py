"""The command ``blip2edge bulk``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from blip2edge.choices import BULK_FORMATS, BULK_SOURCES
from blip2edge.cli.flag_groups import (
    GENERATION,
    add_batch_size,
    add_bundle_option,
    add_limits,
    add_number,
    add_output,
    add_ray,
    add_some_generation,
    check_needed,
    given_generation,
    given_limits,
)
from blip2edge.cli.flag_types import any_text, share
from blip2edge.cli.interrupt import Interrupted
from blip2edge.cli.messages import print_note
from blip2edge.errors import DataError, plural
from blip2edge.limits import PICTURE_LIMITS, Limits
from blip2edge.progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``bulk``."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="pictures: a folder, tar shards (a file, a folder, or part-{000..127}.tar), or a .parquet, .csv or .tsv "
        "file with a column of paths or addresses (in a .parquet file also of bytes); on the disk, or in an object "
        "store (s3://, gs:// and so on)",
    )
    add_output(
        parser,
        "OUT",
        "NAME.parquet or NAME.tar for one file; any other name for a directory with a file for each part",
        force="replace {} if bulk made it; also remove the files of an interrupted run that had other flags",
    )
    add_bundle_option(parser)
    parser.add_argument("--format", choices=BULK_FORMATS, help="format of OUT (default: by its name, else parquet)")
    parser.add_argument(
        "--source-format",
        choices=("auto", *BULK_SOURCES),
        default="auto",
        help="kind of SOURCE; auto: by its name, or by the files of the folder",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="column of the pictures in a table (default: image, path, url …)"
    )
    parser.add_argument(
        "--prompt", metavar="P", type=any_text, help="text that the captions continue (default: the model's own prompt)"
    )
    add_number(
        parser,
        "--num-captions",
        "number of captions of a picture: with --num-beams the best ones, with --temperature or --top-p drawn ones",
        1,
    )
    add_number(
        parser,
        "--duplicates",
        "a picture that resembles an earlier one (cosine of the bridge's outputs at least X) takes its captions",
        kind=share,
        metavar="X",
    )
    add_number(
        parser,
        "--chunk-size",
        "number of pictures in a part; a killed run repeats at most one part (--ray: all parts not written)",
        500,
    )
    add_batch_size(parser, 16)
    add_number(parser, "--workers", "number of threads that read and decode pictures (default: all cores)")
    add_ray(parser, "--ray-workers", "load the bundle")
    add_some_generation(parser, "generation", "default values are in bundle.json; --seed is 0 without it", GENERATION)
    add_limits(parser, Limits, PICTURE_LIMITS)
    parser.add_argument("--json", action="store_true", help="print the counts as one JSON object")


def run(options: argparse.Namespace) -> int:
    """Caption all pictures of a source; a killed run goes on where it stopped."""
    from blip2edge.bulk.options import BulkOptions
    from blip2edge.bulk.pipeline import Output, run_bulk
    from blip2edge.bulk.ray_backend import Cluster
    from blip2edge.bulk.sources import PictureSource

    chosen = BulkOptions(
        bundle=options.bundle,
        prompt=options.prompt,
        captions=options.num_captions,
        generation=given_generation(options),
        duplicates=options.duplicates,
        chunk_size=options.chunk_size,
        batch_size=options.batch_size,
        workers=options.workers,
        backend=options.backend,
        threads=options.threads,
        require_signature=options.require_signature,
        limits=given_limits(options, Limits),
    )
    source = PictureSource(options.source, options.source_format, options.column, options.output)
    output = Output.named(options.output, options.format, options.force)
    check_needed("ray_workers", options.ray_workers, "ray", options.ray)
    cluster = None if options.ray is None else Cluster(options.ray, options.ray_workers or 1)
    try:
        with Progress(unit="pictures") as progress:
            counts = run_bulk(source, output, chosen, cluster=cluster, progress=progress)
    except (KeyboardInterrupt, Interrupted):
        print_note("the finished parts are kept: run the same command again to go on")
        raise
    print(json.dumps(counts) if options.json else _text(counts, str(options.output)))
    if counts["broken"] == counts["pictures"]:
        raise DataError("no picture could be read", "see the reason in the rows (error)")
    if counts["broken"] and not options.json:
        print_note(
            f"note: {plural(counts['broken'], 'broken picture')}; rows of broken pictures have the reason (error)"
        )
    return 0


def _text(counts: Mapping[str, Any], output: str) -> str:
    pictures, computed = counts["pictures"], counts["computed"]
    made = f"{computed} of them now, {counts['pictures_per_s']} a second" if computed else "complete already"
    return (
        f"{output}: {plural(pictures, 'picture')}, {counts['broken']} broken, "
        f"{plural(counts['duplicates'], 'duplicate')}, in {plural(counts['parts'], 'part')}; {made}"
    )
