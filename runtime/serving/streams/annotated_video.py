"""Writes a video of the captioned frames, each with its caption (``watch --annotated``)."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

from blip2edge.bundle.outputs.files import check_file
from blip2edge.errors import BackendError, ImageError, OutputError, one_line
from blip2edge.packages import require
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.runtime.images.video import draw_caption
from blip2edge.runtime.serving.streams.queued_sink import CaptionEvent, Sink, SinkOptions

FRAGMENTED = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
"""Options of FFmpeg with which each frame is written to the file at once (as a fragment of the MP4)."""


class AnnotatedVideo(Sink):
    """Writes the captioned pictures with their captions into an MP4 file.

    Each picture is shown until the next captioned picture. Each frame is written to the file at once, so that the file
    can be played after a crash as well. All pictures have the size of the first picture, with even height and width.

    Args:
        file: The file; it must not exist.
        options: Options of the sink; ``report`` is called if a picture cannot be read any more.

    Raises:
        OutputError: The file exists, or cannot be written.
        UsageError: The file's suffix is not ``.mp4``.
        BackendError: PyAV is not installed.
    """

    def __init__(self, file: str, options: SinkOptions) -> None:
        path = Path(file)
        if path.exists():
            raise OutputError(f"{path} exists already", "give another name, or remove the file")
        check_file(path, "annotated", ".mp4")
        self._av = require("av", "writing a video", BackendError)
        self._path, self._report, self._last = path, options.report, -1
        self._container: Any = None
        self._stream: Any = None

    def put(self, event: CaptionEvent) -> None:
        """Writes the captioned picture into the video; this takes a few milliseconds.

        Raises:
            OutputError: The file cannot be written.
        """
        try:
            picture = load_image(event.image)
        except ImageError as error:  # the file of a folder may be gone by now
            self._report(f"{self._path}: a picture is missing in the video; {error}")
            return
        try:
            stream = self._stream or self._open(picture.size)
            size = (stream.width, stream.height)
            drawn = draw_caption(picture if picture.size == size else picture.resize(size), str(event.values["text"]))
            frame = self._av.VideoFrame.from_image(drawn)
            self._last = frame.pts = max(self._last + 1, round(1000 * event.seconds))
            frame.time_base = stream.codec_context.time_base
            self._container.mux(stream.encode(frame))
        except (OSError, self._av.error.FFmpegError) as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Writes the end of the video file, and closes it."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        try:
            self._container.mux(stream.encode(None))
            self._container.close()
        except (OSError, self._av.error.FFmpegError) as error:
            raise self._failed(error) from error

    def _open(self, size: tuple[int, int]) -> Any:
        self._container = self._av.open(str(self._path), "w", format="mp4", options=FRAGMENTED)
        name = "libx264" if "libx264" in self._av.codecs_available else "mpeg4"
        stream = self._container.add_stream(name, rate=30)
        stream.width, stream.height = (max(2, side // 2 * 2) for side in size)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        if name == "libx264":
            stream.options = {"preset": "ultrafast", "tune": "zerolatency"}
        self._stream = stream
        return stream

    def _failed(self, error: Exception) -> OutputError:
        return OutputError(f"{self._path}: the video cannot be written ({one_line(error)})", "give another file")
