"""The flags of `watch`, `serve` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from blip2edge.bundle.schema import DRAFTS
from blip2edge.cli.flags import add_command, non_negative_int, positive_int, positive_number, share_or_zero
from blip2edge.cli.running_flags import add_bundle, add_generation, add_where

if TYPE_CHECKING:
    from blip2edge.cli.flags import Commands


def add_watch(commands: Commands) -> None:
    """Live captions."""
    parser = add_command(commands, "watch", "live captions of a camera, a video or a folder", "live", "watch")
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="a camera's number or /dev/video…, a video file, an address as rtsp://…, or a folder",
    )
    parser.add_argument("--prompt", metavar="P", help="how each caption begins")
    parser.add_argument(
        "--once", action="store_true", help="every frame in order, none dropped; a folder as it is now"
    )
    parser.add_argument(
        "--reuse-below",
        metavar="X",
        type=share_or_zero,
        default=0.0,
        help="do not encode a frame that differs by less than this share of black to white from the last encoded one: "
        "what was seen of that one is put into words anew (0: encode all)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line and frame")
    add_bundle(parser)
    add_generation(parser)


def add_serve(commands: Commands) -> None:
    """The HTTP server."""
    parser = add_command(commands, "serve", "captions over HTTP, and a page with the camera", "live", "serve")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    add_where(parser)
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1", help="to listen on (127.0.0.1)")
    parser.add_argument(
        "--port", metavar="N", type=non_negative_int, default=8000, help="to listen on (8000); 0: a free one"
    )
    parser.add_argument(
        "--max-batch", metavar="N", type=positive_int, default=8, help="captions decoded together (8)"
    )
    parser.add_argument(
        "--queue",
        metavar="N",
        type=positive_int,
        default=64,
        help="requests that may wait (64); more get 503",
    )
    parser.add_argument(
        "--deadline", metavar="S", type=positive_number, help="seconds for a caption; later ones get 504"
    )


def add_bench(commands: Commands) -> None:
    """The measurements."""
    parser = add_command(commands, "bench", "how fast a bundle is on this machine", "bench", "bench")
    parser.add_argument("bundle", metavar="BUNDLE", type=Path)
    add_where(parser)
    parser.add_argument(
        "--runs", metavar="N", type=positive_int, default=10, help="captions that are timed (10)"
    )
    parser.add_argument(
        "--warmup", metavar="N", type=non_negative_int, default=2, help="captions before them (2)"
    )
    parser.add_argument(
        "--tokens", metavar="N", type=positive_int, default=20, help="length of a caption (20)"
    )
    parser.add_argument(
        "--batch-sizes", metavar="N", type=positive_int, nargs="+", default=[1, 2, 4, 8],
        help="pictures at once, in the sweep (1 2 4 8)",
    )  # fmt: skip
    parser.add_argument(
        "--draft",
        choices=DRAFTS,
        default="auto",
        help="whose tokens a pass are told; the stages decode plainly",
    )
    parser.add_argument("--json", action="store_true", help="everything as one JSON object")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with pictures to FILE")
