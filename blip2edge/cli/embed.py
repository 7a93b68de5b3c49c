"""``blip2edge embed``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.cli.files import write
from blip2edge.cli.flag_groups import add_batch_size, add_bundle_option
from blip2edge.cli.match import load_matcher
from blip2edge.errors import UsageError, option

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``embed``."""
    parser.add_argument("images", metavar="IMAGE", nargs="*", help="picture file")
    parser.add_argument(
        "--text", metavar="T", action="append", help="text to embed instead of pictures; may be repeated"
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one JSON object per line for each vector (default)")
    how.add_argument("--output", metavar="FILE", type=Path, help="write all vectors to FILE as one .npy array")


def run(options: argparse.Namespace) -> int:
    """Print or write the vectors of pictures or of texts."""
    if bool(options.images) == bool(options.text):
        given = "both" if options.text else "neither"
        raise UsageError(f"expected either pictures or {option('text')}, got {given}")
    matcher = load_matcher(options)
    if options.text:
        vectors = matcher.embed_texts(options.text, batch_size=options.batch_size)
    else:
        vectors = matcher.embed_images(options.images, batch_size=options.batch_size)
    if options.output is not None:
        import numpy as np

        file = io.BytesIO()
        np.save(file, vectors)
        write(options.output, file.getvalue(), "--output")
        print(f"{options.output}: {vectors.dtype} {list(vectors.shape)}")
        return 0
    kind = "text" if options.text else "image"
    for source, vector in zip(options.text or options.images, vectors, strict=True):
        print(json.dumps({kind: source, "embedding": vector.tolist()}), flush=True)
    return 0
