"""``blip2edge caption``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blip2edge.bundle.schema import MARKERS
from blip2edge.cli.flag_groups import (
    add_batch_size,
    add_bundle_option,
    add_generation,
    add_stream_or_json,
    given_generation,
)
from blip2edge.errors import UsageError, option

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``caption``."""
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", help="picture file; for a video model: a video file or a folder of frames"
    )
    parser.add_argument(
        "--prompt",
        metavar="P",
        action="append",
        help="text that the caption continues; give one prompt for all pictures, or repeat the flag for each picture; "
        "for a model that takes several pictures per prompt, write <image> at the place of each picture (default: the "
        "model's own prompt)",
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    add_stream_or_json(parser)
    add_generation(parser)


def run(options: argparse.Namespace) -> int:
    """Caption every picture, in the order given."""
    items, prompts = _items(options.images, options.prompt)
    check(options)
    captioner = load_captioner(options)
    flags = given_generation(options)
    if options.stream:
        for index, item in enumerate(items):
            prompt = None if prompts is None else prompts[index]
            print_pieces(_label(item, len(items)), captioner.stream(item, prompt=prompt, **flags))
        return 0
    results = captioner.caption_many(items, prompts=prompts, batch_size=options.batch_size, **flags)
    for item, result in zip(items, results, strict=True):
        print_result(result, as_json=options.json, label=_label(item, len(items)))
    return 0


def print_result(result: CaptionResult, *, as_json: bool, label: str) -> None:
    """Print one result and flush it, so that the next program in a pipe gets it at once."""
    print(json.dumps(result.to_json()) if as_json else f"{label}{result.text.strip()}", flush=True)


def _label(item: str | list[str], count: int) -> str:
    """The pictures' names before a caption; empty where there is only one caption."""
    if count == 1:
        return ""
    return f"{item if isinstance(item, str) else ' '.join(item)}: "


def _items(images: list[str], given: list[str] | None) -> tuple[list[str | list[str]], list[str] | None]:
    """Assigns pictures to prompts: each prompt takes as many pictures as it contains <image>, at least one.

    Raises:
        UsageError: The number of <image> in the prompts differs from that of the pictures.
    """
    places = [sum(prompt.count(marker) for marker in MARKERS) for prompt in given or ()]
    if given is None or not any(places):
        return list(images), _prompts(given, len(images))
    if len(given) == 1:  # repeat the prompt for the next pictures
        times = max(1, len(images) // places[0])
        given, places = given * times, places * times
    taken = [max(1, count) for count in places]
    if sum(taken) != len(images):
        raise UsageError(
            f"{option('prompt')} has {MARKERS[1]} for {sum(taken)} pictures, but {len(images)} pictures are given",
            f"write {MARKERS[1]} once for each picture",
        )
    items: list[str | list[str]] = []
    for count in taken:
        items.append(images[0] if count == 1 else images[:count])
        images = images[count:]
    return items, given


def _prompts(given: list[str] | None, count: int) -> list[str] | None:
    """One prompt for each picture, or None for the bundle's own.

    Raises:
        UsageError: The number of prompts is neither one nor that of the pictures.
    """
    if given is None:
        return None
    if len(given) == 1:
        return given * count
    if len(given) != count:
        raise UsageError(
            f"expected one {option('prompt')} for all pictures or one for each, got {len(given)} for {count} pictures",
            f"repeat {option('prompt')} once for each picture",
        )
    return given


def check(options: argparse.Namespace) -> None:
    """Check for flags that cannot be combined, before the bundle is loaded.

    Raises:
        UsageError: Beam search with streaming, or a smallest length above the largest.
    """
    beams = options.num_beams is not None and options.num_beams > 1
    if options.stream and beams:
        raise UsageError(
            f"{option('stream')} and {option('num_beams')} cannot be combined: beam search chooses the words at the "
            "end",
            f"leave {option('stream')} or {option('num_beams')} out",
        )
    least, most = options.min_new_tokens, options.max_new_tokens
    if least is not None and most is not None and least > most:
        raise UsageError(
            f"expected {option('min_new_tokens')} of at most {most}, got {least}", f"raise {option('max_new_tokens')}"
        )


def load_captioner(options: argparse.Namespace) -> Captioner:
    """The captioner that the flags name."""
    from blip2edge.runtime.captioning.captioner import Captioner

    return Captioner.load(options.bundle, backend=options.backend, threads=options.threads, draft=options.draft)


def print_pieces(label: str, pieces: Iterable[str]) -> None:
    """Print the pieces of one caption while they are generated."""
    print(label, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
