"""The command ``blip2edge embed``: its flags, and the function that runs it."""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.cli.flag_groups import add_batch_size, add_bundle_option, add_limits
from blip2edge.cli.flag_types import any_text
from blip2edge.cli.match import load_matcher
from blip2edge.cli.messages import Failures
from blip2edge.cli.picture_arguments import IMAGE_HELP, find_pictures
from blip2edge.errors import Blip2EdgeError, ImageError, OutputError, UsageError, option
from blip2edge.limits import PICTURE_LIMITS, Limits

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Iterator, Sequence


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``embed``."""
    parser.add_argument("images", metavar="IMAGE", nargs="*", default=[], help=IMAGE_HELP)
    parser.add_argument(
        "--text", metavar="T", type=any_text, action="append", help="text to embed instead of pictures; may be repeated"
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    add_limits(parser, Limits, PICTURE_LIMITS)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print one line of JSON for each vector (default)")
    how.add_argument("--output", metavar="FILE", type=Path, help="write all vectors to FILE as one .npy array")


def run(options: argparse.Namespace) -> int:
    """Print or write the vectors of pictures or of texts."""
    if bool(options.images) == bool(options.text):
        given = "both" if options.text else "neither"
        raise UsageError(f"expected either pictures or {option('text')}, got {given}")
    kind = "text" if options.text else "image"
    pictures = find_pictures(options.images)
    if options.output is not None:
        check_file(options.output, "output", ".npy")
        with _nothing_written(options.output):
            for picture in pictures:
                picture.check()
    names = options.text or [picture.name for picture in pictures]
    matcher = load_matcher(options)
    vectors: Iterable[Any]
    if options.text:
        vectors = matcher.embed_texts(options.text, batch_size=options.batch_size)
    else:
        vectors = matcher.embed_images_iter(
            [picture.source for picture in pictures], batch_size=options.batch_size, return_exceptions=True
        )
    if options.output is not None:
        return _write(options.output, kind, names, vectors)
    failures = Failures(ImageError)
    for name, vector in zip(names, vectors, strict=True):
        if isinstance(vector, Blip2EdgeError):
            failures.add(vector)
        else:
            _print(kind, name, vector)
    return failures.exit_status(len(names))


def _print(kind: str, name: str, vector: Any) -> None:
    print(json.dumps({kind: name, "embedding": vector.tolist()}), flush=True)


def _write(output: Path, kind: str, names: Sequence[str], vectors: Iterable[Any]) -> int:
    """Writes all vectors to a file as one array. A broken picture ends the command, because row N belongs to picture N.

    If the file cannot be written, the vectors are printed, so that they are not lost.
    """
    import numpy as np

    rows = []
    with _nothing_written(output):
        for vector in vectors:
            if isinstance(vector, Blip2EdgeError):
                raise vector
            rows.append(vector)
    array = np.stack(rows)
    file = io.BytesIO()
    np.save(file, array)
    try:
        write_output(output, file.getvalue(), "output")
    except OutputError:
        for name, row in zip(names, rows, strict=True):
            _print(kind, name, row)
        raise
    print(f"{output}: {array.dtype} {list(array.shape)}")
    return 0


@contextmanager
def _nothing_written(output: Path) -> Iterator[None]:
    """Adds a sentence to an ImageError in the block: the output file was not written.

    Row N of the array in the file belongs to picture N, so the file cannot leave out a broken picture.
    """
    try:
        yield
    except ImageError as error:
        fix = f"; {error.fix}" if error.fix else ""
        raise ImageError(
            f"{error.problem}{fix}", f"{output} was not written, because it would lack the row of this picture"
        ) from error
