"""The command ``blip2edge caption``: its flags, and the function that runs it."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from blip2edge.bundle.prompt_spec import MARKERS
from blip2edge.cli.flag_groups import (
    add_batch_size,
    add_bundle_option,
    add_generation,
    add_limits,
    add_stream_or_json,
    given_generation,
    given_limits,
    print_unsigned,
)
from blip2edge.cli.flag_types import any_text
from blip2edge.cli.messages import Failures
from blip2edge.cli.picture_arguments import IMAGE_HELP, PictureArgument, find_pictures
from blip2edge.errors import Blip2EdgeError, ImageError, PromptError, UsageError, option
from blip2edge.limits import FILE_LIMITS, Limits
from blip2edge.picture_files import printable

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from blip2edge.bundle.bundle import Bundle
    from blip2edge.runtime.captioning.captioner import Captioner, CaptionResult
    from blip2edge.runtime.images.video import ItemSource


UNSURE = math.log(0.5)
"""Log-probability below which a word is underlined on a terminal."""

_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Item:
    """The input of one caption: one picture, one video, or several pictures for one prompt."""

    pictures: tuple[PictureArgument, ...]

    @property
    def name(self) -> str | list[str]:
        """The name of the picture, or a list of names for several pictures, as in the JSON output."""
        names = [printable(picture.name) for picture in self.pictures]
        return names if len(names) > 1 else names[0]

    @property
    def label(self) -> str:
        """The text that is printed before a caption: the names of its pictures and a colon."""
        return f"{' '.join(printable(picture.name) for picture in self.pictures)}: "

    @property
    def source(self) -> ItemSource:
        """The first argument of ``Captioner.caption`` for this item: one picture, or a list of several."""
        sources = [picture.source for picture in self.pictures]
        return sources if len(sources) > 1 else sources[0]

    def release(self) -> None:
        """Releases the memory of pictures that were downloaded."""
        for picture in self.pictures:
            picture.release()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``caption``."""
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        help=f"{IMAGE_HELP}; for a video model: a video file or a folder of frames",
    )
    parser.add_argument(
        "--prompt",
        metavar="P",
        type=any_text,
        action="append",
        help="text that the caption continues; give one prompt for all pictures, or repeat the flag for each picture; "
        "for a model that takes several pictures per prompt, write <image> at the place of each picture (default: the "
        "model's own prompt)",
    )
    add_batch_size(parser, 1)
    add_bundle_option(parser)
    add_stream_or_json(parser)
    add_generation(parser)
    add_limits(parser, Limits, FILE_LIMITS)


def run(options: argparse.Namespace) -> int:
    """Caption every picture, in the order given; a picture that cannot be read does not end the command."""
    check(options)
    bundle = open_bundle(options)
    pictures = find_pictures(options.images, videos=takes_videos(bundle))
    items, prompts = assign(pictures, options.prompt)
    return print_captions(load_captioner(options, bundle), options, items, prompts)


def print_captions(
    captioner: Captioner, options: argparse.Namespace, items: list[Item], prompts: list[str] | None
) -> int:
    """Prints the caption of each item, and flushes the output, so that the next program in a pipe gets it at once.

    Returns:
        The exit status: 1 if a picture could not be read, or if one of several prompts does not fit the model.
    """
    flags = given_generation(options)
    from blip2edge.runtime.decoding.sampling import warn_of_unused

    warn_of_unused(captioner.options(**flags), flags)
    labelled = len(items) > 1 or any(picture.found for picture in items[0].pictures)
    failures = Failures(ImageError, PromptError) if len(set(prompts or ())) > 1 else Failures(ImageError)
    if options.stream:
        for at, item in enumerate(items):
            try:
                pieces = captioner.stream(item.source, prompt=prompts[at] if prompts else None, **flags)
                print_pieces(item.label if labelled else "", pieces)
            except Blip2EdgeError as error:
                failures.add(error)
            item.release()
        return failures.exit_status(len(items))
    sources = [item.source for item in items]
    results = captioner.caption_many(
        sources, prompts=prompts, batch_size=options.batch_size, return_exceptions=True, **flags
    )
    with closing(results):  # an error that ends the command ends the threads of the results too
        for item, result in zip(items, results, strict=True):
            if isinstance(result, Blip2EdgeError):
                failures.add(result)
            elif options.json:
                print(json.dumps({**result.to_json(), "image": item.name}), flush=True)
            else:
                print(f"{item.label if labelled else ''}{shown_text(captioner, result)}", flush=True)
            item.release()
    return failures.exit_status(len(items))


def shown_text(captioner: Captioner, result: CaptionResult) -> str:
    """Returns the caption for standard output.

    On a terminal, a word is underlined if one of its tokens has a probability below 1/2.
    """
    from blip2edge.runtime.captioning.request import ABSTAINED

    if result.finish_reason == ABSTAINED:
        return "(not sure)" if sys.stdout.isatty() else ""
    text = result.text.strip()
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ:
        return text
    words = iter(captioner.words(result))
    return _WORD.sub(lambda found: f"\x1b[4m{found[0]}\x1b[24m" if next(words).logprob < UNSURE else found[0], text)


def assign(pictures: list[PictureArgument], given: list[str] | None) -> tuple[list[Item], list[str] | None]:
    """Assigns pictures to prompts: each prompt takes as many pictures as it contains <image>, at least one.

    Raises:
        UsageError: The number of <image> in the prompts differs from the number of pictures.
    """
    places = [sum(prompt.count(marker) for marker in MARKERS) for prompt in given or ()]
    if given is None or not any(places):
        return [Item((picture,)) for picture in pictures], _prompts(given, len(pictures))
    if len(given) == 1:  # repeat the prompt for the next pictures
        times = max(1, len(pictures) // places[0])
        given, places = given * times, places * times
    taken = [max(1, count) for count in places]
    if sum(taken) != len(pictures):
        raise UsageError(
            f"{option('prompt')} has {MARKERS[1]} for {sum(taken)} pictures, but {len(pictures)} pictures are given",
            f"write {MARKERS[1]} once for each picture",
        )
    ends = list(accumulate(taken))
    return [Item(tuple(pictures[end - count : end])) for end, count in zip(ends, taken, strict=True)], given


def _prompts(given: list[str] | None, count: int) -> list[str] | None:
    """Returns one prompt for each picture; None to use the bundle's default prompt.

    Raises:
        UsageError: The number of prompts is neither one nor the number of pictures.
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
    """Checks that the given flags can be combined, before the bundle is loaded.

    Raises:
        UsageError: ``--stream`` is given with beam search or ``--abstain-below``, or ``--min-new-tokens`` is larger
            than ``--max-new-tokens``.
    """
    from blip2edge.runtime.decoding.options import check_stream

    if options.stream:
        check_stream(options.num_beams, options.abstain_below)
    least, most = options.min_new_tokens, options.max_new_tokens
    if least is not None and most is not None and least > most:
        raise UsageError(
            f"expected {option('min_new_tokens')} of at most {most}, got {least}", f"raise {option('max_new_tokens')}"
        )


def open_bundle(options: argparse.Namespace) -> Bundle:
    """Opens the bundle that the flags name."""
    from blip2edge.bundle.bundle import Bundle

    return Bundle.open(options.bundle, require_signature=options.require_signature)


def takes_videos(bundle: Bundle) -> bool:
    """Whether the bundle's model reads several frames of a video."""
    prompt = bundle.manifest.prompt
    return prompt is not None and prompt.frames > 1


def load_captioner(options: argparse.Namespace, bundle: Bundle) -> Captioner:
    """Loads the captioner of an opened bundle, on the backend that the flags name."""
    from blip2edge.bundle.bundle import load_whole
    from blip2edge.runtime.captioning.captioner import Captioner

    limits = given_limits(options, Limits)

    def load(opened: Bundle) -> Captioner:
        return Captioner(opened, options.backend, options.threads, options.draft, limits)

    # With a signature, every file of the opened bundle is hashed already; opening it again would hash it again.
    captioner = load_whole(bundle.path, load) if options.require_signature is None else load(bundle)
    print_unsigned(captioner.bundle)
    return captioner


def print_pieces(label: str, pieces: Iterable[str]) -> None:
    """Print the pieces of one caption while they are generated."""
    print(label, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)
