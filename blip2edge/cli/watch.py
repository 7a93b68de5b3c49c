"""``blip2edge watch``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from blip2edge.cli.caption import load_captioner, open_bundle
from blip2edge.cli.flag_groups import add_bundle_option, add_generation, add_limits, add_number, given_generation
from blip2edge.cli.flag_types import share_or_zero
from blip2edge.cli.messages import print_note
from blip2edge.limits import FILE_LIMITS, Limits

if TYPE_CHECKING:
    import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``watch``."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="number of a camera or /dev/video…, video file, stream address such as rtsp://…: the newest frame is "
        "captioned; or a folder: every picture that appears in it is captioned",
    )
    parser.add_argument(
        "--prompt", metavar="P", help="text that each caption continues (default: the model's own prompt)"
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="caption every frame of a video in order, as fast as possible, not only the newest ones at the video's "
        "speed; for a folder: caption the pictures that it contains now, then stop",
    )
    add_number(
        parser,
        "--reuse-below",
        "reuse the visual tokens of the last encoded frame if the new frame differs from it by less than X (mean "
        "difference of the pixels, 0 to 1); 0: encode every frame",
        0.0,
        kind=share_or_zero,
        metavar="X",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line for each frame")
    add_bundle_option(parser)
    add_generation(parser)
    add_limits(parser, Limits, FILE_LIMITS)


def run(options: argparse.Namespace) -> int:
    """Caption the newest frame again and again, or each picture of a folder, until the source ends or Ctrl-C."""
    from blip2edge.runtime.serving.watch import open_source
    from blip2edge.runtime.serving.watch import watch as live

    frames = open_source(options.source, follow=not options.once)
    captioner = load_captioner(options, open_bundle(options))
    flags = given_generation(options)
    dropped = failed = 0
    for caption in live(
        captioner,
        frames,
        prompt=options.prompt,
        every=options.once,
        reuse_below=options.reuse_below,
        **flags,
    ):
        dropped += caption.dropped
        if caption.result is None:
            print_note(f"error: {caption.error}")
            failed += 1
        elif options.json:
            extra = {
                "frame": caption.frame,
                "dropped": caption.dropped,
                "age_ms": round(caption.age_ms, 1),
                "reused": caption.reused,
            }
            print(json.dumps({**caption.result.to_json(), **extra}), flush=True)
        else:
            print(f"{caption.frame}: {caption.result.text}", flush=True)
    if dropped:
        print_note(f"{dropped} frames were dropped, because they came faster than captions")
    return 1 if failed and options.once else 0
