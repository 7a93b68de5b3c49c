"""The command ``blip2edge watch``: its flags, and the function that runs it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2edge.bundle.outputs.files import check_file, write_output
from blip2edge.cli.caption import load_captioner, open_bundle
from blip2edge.cli.credentials import FORM, filled_address, filled_text, has_credentials
from blip2edge.cli.flag_groups import add_bundle_option, add_generation, add_limits, add_number, given_generation
from blip2edge.cli.flag_types import any_text, http_header, non_negative_number, positive_number, share_or_auto
from blip2edge.cli.messages import print_error, print_note
from blip2edge.errors import DataError, ImageError, UsageError, option, plural, shown_address
from blip2edge.limits import FILE_LIMITS, Limits

if TYPE_CHECKING:
    import argparse

    from blip2edge.runtime.captioning.reuse.ladder import ReusePlan
    from blip2edge.runtime.serving.streams.queued_sink import CaptionEvent, Sink
    from blip2edge.runtime.serving.watch import WatchResult

RECEIVERS = {
    "post": ("URL", "send each caption as a JSON object by HTTP POST"),
    "mqtt": ("URL", "publish each caption as a JSON object: mqtt://[USER:PASSWORD@]HOST[:PORT]/TOPIC, or mqtts://…"),
    "annotated": ("FILE.mp4", "write the captioned frames with their captions as a video"),
}
"""Flags that send captions to a receiver: placeholder and help of each, by the flag's name."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``watch``."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="camera or video whose newest frame is captioned: number of a camera, /dev/video…, csi:0 for a camera of "
        "a Jetson, GStreamer pipeline (in quotes), video file, or stream address such as rtsp://…. Or a folder: every "
        "picture that appears in this folder is captioned",
    )
    parser.add_argument(
        "--prompt",
        metavar="P",
        type=any_text,
        help="text that each caption continues (default: the model's own prompt)",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="caption every frame of a video in order, as fast as possible, not only the newest ones at the video's "
        "speed; for a folder: caption the pictures that it contains now, then stop",
    )
    _add_reuse(parser)
    add_number(
        parser,
        "--max-fps",
        "caption at most X frames per second, which leaves time to other programs; 0: no limit",
        0.0,
        kind=non_negative_number,
        metavar="X",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each frame")
    group = parser.add_argument_group(
        "receivers of captions, besides standard output; each may be given several times",
        f"write a password, here and in SOURCE, as {FORM}: other users of this machine can see the command line",
    )
    for flag, (metavar, text) in RECEIVERS.items():
        group.add_argument(f"--{flag}", metavar=metavar, action="append", default=[], help=text)
    group.add_argument(
        "--post-header",
        metavar="NAME:VALUE",
        type=http_header,
        action="append",
        default=[],
        help="header of the requests of --post, such as 'Authorization: Bearer {env:KEY}'",
    )
    add_bundle_option(parser)
    add_generation(parser)
    add_limits(parser, Limits, FILE_LIMITS)


def _add_reuse(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reuse-below",
        metavar="X",
        type=share_or_auto,
        default=0.0,
        help="reuse the visual tokens of the last encoded frame if the new frame differs from it by less than X (mean "
        "difference of the pixels, 0 to 1); 0: encode every frame; auto: reuse captions too, with thresholds that are "
        "fitted on the first frames so that at most --miss-rate of the reused captions are wrong",
    )
    add_number(
        parser,
        "--miss-rate",
        "with --reuse-below auto: largest share of wrong captions among the reused captions (the frame's own caption "
        "would be another one), with 95%% confidence (default: 0.05)",
        kind=positive_number,
        metavar="X",
    )
    add_number(
        parser,
        "--fit-frames",
        "with --reuse-below auto: number of frames that are encoded in full for a fit (default: 5000)",
    )
    parser.add_argument(
        "--reuse-fit",
        metavar="FILE.json",
        type=Path,
        help="with --reuse-below auto: file for the fitted thresholds; if the file exists, the thresholds are read and "
        "not fitted again; a report is written beside it, as FILE.html",
    )


def _reuse_plan(options: argparse.Namespace) -> ReusePlan | None:
    """Returns the options for fitting the thresholds of ``--reuse-below auto``; None without ``auto``."""
    from blip2edge.cli.reuse_page import reuse_page
    from blip2edge.runtime.captioning.reuse.ladder import ReusePlan

    given = {"rate": options.miss_rate, "frames": options.fit_frames, "path": options.reuse_fit}
    given = {name: value for name, value in given.items() if value is not None}
    if options.reuse_below != "auto":
        if given:
            names = {"rate": "miss_rate", "frames": "fit_frames", "path": "reuse_fit"}
            wrong = names[next(iter(given))]
            raise UsageError(f"{option(wrong)} needs {option('reuse_below')} auto", field=wrong)
        return None

    page = None if options.reuse_fit is None else _report_of(options.reuse_fit)

    def on_fit(document: dict[str, Any]) -> None:
        if page is not None:
            write_output(page, reuse_page(document, shown_address(options.source)), "reuse_fit")
            print_note(f"report: {page}")

    if options.once:  # the source ends, so there may be no next fit
        given["advice"] = "record a longer film, or raise --miss-rate"
    plan = ReusePlan(**given, on_fit=on_fit, report=print_note)
    if page is not None:
        check_file(page, "reuse_fit")
    return plan


def _report_of(fit: Path) -> Path:
    """Returns the file of the HTML report, beside the JSON file with the fitted thresholds.

    Raises:
        UsageError: The file is not named ``FILE.json``. With other suffixes, two files could have the same report.
    """
    if fit.suffix.lower() != ".json":
        raise UsageError(
            f"expected {option('reuse_fit')} to be a JSON file, named FILE.json, got {str(fit)!r}",
            "give a name such as fit.json; the report is then fit.html",
        )
    return fit.with_suffix(".html")


def run(options: argparse.Namespace) -> int:
    """Caption the newest frame again and again, or each picture of a folder, until the source ends or Ctrl-C."""
    from blip2edge.runtime.decoding.sampling import warn_of_unused
    from blip2edge.runtime.serving.streams.sources import open_source
    from blip2edge.runtime.serving.watch import watch as live

    source = _source(options.source)
    name = shown_address(source)
    plan = _reuse_plan(options)
    frames = open_source(source, follow=not options.once, report=print_note)
    flags = given_generation(options)
    frame_count = dropped = failed = 0
    with ExitStack() as opened:
        sinks = _open_sinks(options, opened)
        captioner = load_captioner(options, open_bundle(options))
        warn_of_unused(captioner.options(**flags), flags)
        for caption in live(
            captioner,
            frames,
            prompt=options.prompt,
            every=options.once,
            reuse_below=options.reuse_below,
            reuse=plan,
            max_fps=options.max_fps,
            **flags,
        ):
            frame_count += 1
            dropped += caption.dropped
            if caption.result is None:
                print_error(ImageError(caption.error))
                failed += 1
                continue
            values = {**caption.result.to_json(), **_about(caption)}
            print(json.dumps(values) if options.json else f"{caption.frame}: {caption.result.text}", flush=True)
            for sink in sinks:
                sink.put(_event(name, caption, values))
    if dropped:
        print_note(f"{plural(dropped, 'frame')} dropped, because frames came faster than captions")
    if frames.undecoded:
        print_note(f"{name}: {plural(frames.undecoded, 'frame')} could not be decoded")
    if not frame_count and options.once:
        raise DataError(
            f"{name}: no pictures found", f"check the path, or leave {option('once')} out to wait for pictures"
        )
    damaged = frames.undecoded and not frames.is_live  # a live stream begins between two key frames
    lost = sum(sink.lost for sink in sinks)
    return 1 if (failed or lost or damaged) and options.once else 0


def _source(given: str) -> str:
    """Returns the source of the frames, with its credentials filled in.

    Raises:
        UsageError: A credential is missing, or a pipeline contains a credential.
    """
    source = filled_address(given)
    if has_credentials(given) and " ! " in given + source:  # also a pipeline that is the credential's value
        raise UsageError(
            "expected a pipeline without {env:…} and {file:…}: gst-launch-1.0 shows its passwords to other users",
            "give the camera's address, such as rtsp://USER:{env:NAME}@HOST/PATH, in place of the pipeline",
        )
    return source


def _about(caption: WatchResult) -> dict[str, Any]:
    """Returns the keys of a frame in the JSON output, without the keys of its caption."""
    return {
        "frame": caption.frame,
        "dropped": caption.dropped,
        "age_ms": round(caption.age_ms, 1),
        "reused": caption.reused,
        "step": caption.step,
        **({} if caption.audit is None else {"audit": caption.audit}),
    }


def _event(source: str, caption: WatchResult, values: dict[str, Any]) -> CaptionEvent:
    from blip2edge.runtime.serving.streams.queued_sink import CaptionEvent

    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    return CaptionEvent({**values, "source": source, "time": now}, caption.image, caption.seconds)


def _open_sinks(options: argparse.Namespace, opened: ExitStack) -> list[Sink]:
    """Opens the receivers of captions that the flags name; the exit stack ``opened`` closes them."""
    if options.post_header and not options.post:
        raise UsageError(f"{option('post_header')} needs {option('post')}", field="post_header")
    given = [(flag, filled_address(value)) for flag in RECEIVERS for value in getattr(options, flag)]
    if not given:
        return []
    from blip2edge.runtime.serving.streams.queued_sink import SinkOptions
    from blip2edge.runtime.serving.streams.sinks import SINKS

    headers = {name: filled_text(value) for name, value in options.post_header}
    sinks = []
    for flag, value in given:
        sinks.append(SINKS[flag](value, SinkOptions(print_note, headers)))
        opened.callback(sinks[-1].close)
    return sinks
