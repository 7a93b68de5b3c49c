"""Decodes the frames of a video with PyAV, and counts the frames that are damaged or missing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from blip2edge.errors import BackendError
from blip2edge.packages import require

MOST_FAILED = 250  # packets in a row that cannot be decoded before the stream counts as broken: 10 s of a film


class Ending(threading.Event):
    """An event that is set to end a source of frames; it also has the source's count of damaged frames.

    Attributes:
        undecoded: Number of frames so far that were damaged or missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.undecoded = 0


def pyav() -> Any:
    """Imports and returns PyAV; raises BackendError if PyAV is not installed."""
    return require("av", "reading videos and cameras", BackendError)


def decoded(container: Any, ending: Ending) -> Iterator[Any]:
    """Yields the frames of the first video stream; a packet that cannot be decoded is counted and skipped.

    Args:
        container: The opened video, from ``av.open``.
        ending: Counts packets that cannot be decoded, frames that the decoder reports as corrupt, and frames that the
            header of a file lists but the file does not contain.

    Raises:
        av.error.FFmpegError: The container cannot be read, or :data:`MOST_FAILED` packets in a row cannot be decoded.
        IndexError: The container has no video stream.
    """
    invalid = pyav().error.InvalidDataError
    stream = container.streams.video[0]
    packets = failed = 0
    for packet in container.demux(stream):
        packets += packet.size > 0 or packet.dts is not None  # the last one only ends the decoder
        try:
            frames = packet.decode()
        except invalid:
            failed += 1
            ending.undecoded += 1
            if failed == MOST_FAILED:
                raise
            continue
        failed = 0
        for frame in frames:
            ending.undecoded += frame.is_corrupt
            yield frame
    ending.undecoded += max(0, _listed(container, stream) - packets)


def _listed(container: Any, stream: Any) -> int:
    """Returns the number of frames in the file's header; 0 if the header has no number, and for MP4 and MOV.

    In an MP4 or MOV file, the number includes frames that are not shown, so it cannot be compared.
    """
    return 0 if "mov" in container.format.name.split(",") else int(stream.frames)
