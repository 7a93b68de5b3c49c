"""Limits on the size of one request, and on the connections of the server; each limit has a flag."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from blip2edge.errors import UsageError, option

MAX_PIXELS = 89_478_485
"""Default area of the largest picture in pixels (256 MiB as RGB); above it, Pillow warns of a decompression bomb."""

MAX_SIDE = 65_535
"""Default limit of a picture's width and height in pixels, as in JPEG; resizing larger pictures takes much memory."""


def limit(default: float, flag: str, unit: str, text: str) -> Any:
    """Declares a field of a class of limits: its default, its flag, its unit, and its meaning for the help."""
    return field(default=default, metadata={"flag": flag, "unit": unit, "help": text})


@dataclass(frozen=True)
class Limits:
    """The largest allowed request. Pictures are checked before they are decoded.

    Attributes:
        side: Width or height of a picture in pixels.
        pixels: Width times height of a picture.
        decoded_bytes: Memory of one decoded picture; pictures are decoded one after another.
        frames: Frames of a video or of a folder of frames. Of an animated picture only the first frame is decoded.
        pictures: Pictures of a request.
        prompt_chars: Characters of a prompt with all its texts; the bundle's context is a limit as well.
        new_tokens: ``max_new_tokens`` of a request.
        beams: ``num_beams`` of a request; every beam has its own KV cache.
        body_bytes: Size of a request's body.
        json_depth: Objects and lists inside each other in a JSON body.
        json_nodes: Values, keys and escaped quotes in a JSON body.

    Raises:
        UsageError: ``pixels`` is above :data:`MAX_PIXELS`, which Pillow refuses in any case.
    """

    side: int = limit(MAX_SIDE, "--max-side", "PIXELS", "longest side of a picture")
    pixels: int = limit(MAX_PIXELS, "--max-pixels", "PIXELS", "largest area of a picture; not above the default")
    decoded_bytes: int = limit(512 << 20, "--max-decoded-bytes", "BYTES", "most memory of one decoded picture")
    frames: int = limit(100_000, "--max-frames", "N", "largest number of frames of a video or a folder of frames")
    pictures: int = limit(64, "--max-pictures", "N", "largest number of pictures in a request")
    prompt_chars: int = limit(1 << 20, "--max-prompt", "CHARACTERS", "longest prompt; the model has a limit as well")
    new_tokens: int = limit(2**31 - 1, "--max-tokens", "N", "largest max_new_tokens of a request")
    beams: int = limit(8, "--max-beams", "K", "largest num_beams of a request")
    body_bytes: int = limit(32 << 20, "--max-body", "BYTES", "largest body of a request")
    json_depth: int = limit(32, "--max-json-depth", "N", "deepest nesting of a JSON body")
    json_nodes: int = limit(100_000, "--max-json-nodes", "N", "largest number of keys and values in a JSON body")

    def __post_init__(self) -> None:
        if self.pixels > MAX_PIXELS:
            raise UsageError(f"expected {option('max_pixels')} of at most {MAX_PIXELS}, got {self.pixels}")


DEFAULT_LIMITS = Limits()

PICTURE_LIMITS = ("side", "pixels", "decoded_bytes")
"""Fields of :class:`Limits` that also limit picture files on the disk, not only pictures in HTTP requests."""

FILE_LIMITS = (*PICTURE_LIMITS, "frames")
"""Fields of :class:`Limits` that also limit picture and video files on the disk, not only HTTP requests."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits on the connections of the server: on all connections together, and on each connection.

    Attributes:
        connections: Open connections. For a further connection, the oldest idle connection is closed; if all are busy,
            the further connection is answered with 503.
        header_s: Seconds from the first byte of a request, or from the connection, to the end of the header.
        body_s: Seconds for a whole body.
        body_rate: Bytes per second that a body needs on average, after :data:`BODY_GRACE_S`.
        write_s: Seconds in which a client must read data that was sent to it; then its connection is closed.
        memory_bytes: Total size in bytes of the bodies in memory, over all requests that are not answered yet.
    """

    connections: int = limit(1000, "--max-connections", "N", "largest number of open connections")
    header_s: float = limit(10.0, "--header-timeout", "SECONDS", "time for the header of a request")
    body_s: float = limit(120.0, "--body-timeout", "SECONDS", "time for the body of a request")
    body_rate: int = limit(1024, "--min-body-rate", "BYTES", "bytes per second that a body must have on average")
    write_s: float = limit(
        60.0,
        "--write-timeout",
        "SECONDS",
        "time in which a client must read what was sent to it",
    )
    memory_bytes: int = limit(256 << 20, "--body-memory", "BYTES", "memory for the bodies of all open requests")


BODY_GRACE_S = 5.0
"""Seconds from the start of a body, after which its rate must be at least :attr:`ConnectionLimits.body_rate`."""


def limit_table() -> str:
    """Makes the table of limits for ``docs/serving.md``, in Markdown."""
    rows = ["| flag | default | limits |", "|---|---:|---|"]
    for group in (Limits, ConnectionLimits):
        for one in fields(group):
            default = f"{one.default:,}" if isinstance(one.default, int) else f"{one.default:g}"
            unit = one.metadata["unit"].lower()
            rows.append(
                f"| `{one.metadata['flag']}` | {default}{'' if unit in 'nk' else f' {unit}'} | {one.metadata['help']} |"
            )
    return "\n".join(rows) + "\n"
