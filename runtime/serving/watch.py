"""``blip2edge watch``: live captions of a camera or a video, newest frame first, or of every picture of a folder.

For a camera, a reader thread keeps only the newest frame. When the captioner is free, it captions that frame; the
frames in between are dropped and counted. So a caption is as recent as the device allows, and no backlog grows. The
pictures of a folder are kept by the file system, and all of them are captioned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from blip2edge.errors import ImageError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import CaptionResult
from blip2edge.runtime.serving.streams.sources import Frame, Source


@dataclass(frozen=True)
class WatchResult:
    """The caption of a frame.

    Attributes:
        frame: Name of the frame.
        result: The caption; None if the picture could not be read.
        error: Why the picture could not be read; empty if there is a caption.
        dropped: Frames since the last caption that were dropped.
        age_ms: Milliseconds from the frame's arrival to the end of its caption; for a folder, from the moment when the
            picture was taken from the queue.
        reused: Whether the last encoded frame's visual tokens were reused.
        image: The frame's picture.
        seconds: Time of the frame: in a video file, or since the start of the watch.
    """

    frame: str
    result: CaptionResult | None
    error: str
    dropped: int
    age_ms: float
    reused: bool = False
    image: Any = None
    seconds: float = 0.0


class NewestFrame:
    """Reads a source in its own thread and keeps the newest frame."""

    def __init__(self, frames: Iterator[Frame]) -> None:
        self._frames = frames
        self._changed = threading.Condition()
        self._latest: tuple[Frame, float] | None = None
        self._dropped = 0
        self._ended = self._closed = False
        self._error: BaseException | None = None
        threading.Thread(target=self._read, name="blip2edge-frames", daemon=True).start()

    def _read(self) -> None:
        try:
            for frame in self._frames:
                with self._changed:
                    self._dropped += self._latest is not None
                    self._latest = (frame, time.monotonic())
                    self._changed.notify()
                    if self._closed:
                        return
        except Exception as error:  # noqa: BLE001 - raised again in get()
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify()

    def get(self) -> tuple[Frame, float, int] | None:
        """The newest frame, its arrival (``time.monotonic``) and the frames dropped before it; None at the end."""
        with self._changed:
            while self._latest is None and not self._ended:
                self._changed.wait()
            if self._latest is None:
                if self._error is not None:
                    raise self._error
                return None
            (frame, at), dropped = self._latest, self._dropped
            self._latest, self._dropped = None, 0
            return frame, at, dropped

    def close(self) -> None:
        """Stops the thread that reads the frames.

        If the frames come from a :class:`Source`, it is closed and the thread stops at once. Otherwise the thread stops
        when the next frame arrives.
        """
        with self._changed:
            self._closed = True
        if isinstance(self._frames, Source):
            self._frames.close()


def watch(
    captioner: Captioner,
    frames: Iterator[Frame],
    *,
    prompt: str | None = None,
    every: bool = False,
    reuse_below: float = 0.0,
    max_fps: float = 0.0,
    on_piece: Callable[[str | None], None] | None = None,
    **options: Any,
) -> Iterator[WatchResult]:
    """Captions the newest frame, repeatedly, or every frame.

    Args:
        captioner: A loaded bundle.
        frames: From :func:`open_source`; a :class:`Source` is closed at the end.
        prompt: As ``Captioner.caption`` takes it.
        every: Whether to caption every frame in order and drop none. A :class:`Source` with ``is_queue`` implies it.
        reuse_below: A frame that differs by less from the last encoded one is not encoded; 0 encodes every frame. See
            :class:`blip2edge.runtime.captioning.frame_reuse.ReusingEncoder`.
        max_fps: Largest number of captions per second; 0 for no limit. A camera's frames in between are dropped.
        on_piece: Called with each piece of a text as it is generated, and with None at its end.
        **options: As ``Captioner.caption`` takes them.

    Yields:
        One result per captioned frame.

    Raises:
        DataError: The source failed.
        UsageError: ``reuse_below`` is not a number from 0 to 1.
    """
    encoder = captioner.reusing(reuse_below) if reuse_below else None
    generation = captioner.options(**options)
    interval = 1 / max_fps if max_fps else 0.0
    start = time.monotonic()
    queued = every or (isinstance(frames, Source) and frames.is_queue)
    newest = None if queued else NewestFrame(frames)

    def coming() -> Iterator[tuple[Frame, float, int]]:
        if newest is None:
            yield from ((frame, time.monotonic(), 0) for frame in frames)
        else:
            yield from iter(newest.get, None)

    with captioner.scheduler(max_batch=1, max_waiting=1, encoder=encoder) as scheduler:
        try:
            for frame, arrived, dropped in _paced(coming(), interval):
                request = scheduler.submit(frame.image, generation, prompt=prompt, on_piece=on_piece)
                result, problem = None, ""
                try:
                    result = request.result()
                except ImageError as error:
                    if frame.retry is not None:  # perhaps still being written
                        frame.retry()
                        continue
                    problem = str(error)
                age_ms = (time.monotonic() - arrived) * 1e3
                reused = encoder is not None and result is not None and encoder.reused
                seconds = arrived - start if frame.seconds is None else frame.seconds
                yield WatchResult(frame.name, result, problem, dropped, age_ms, reused, frame.image, seconds)
        finally:
            if newest is not None:
                newest.close()
            elif isinstance(frames, Source):
                frames.close()


def _paced(frames: Iterator[Any], interval: float) -> Iterator[Any]:
    """Takes one frame in `interval` seconds at most. It waits before it takes a frame, so that the frame is new."""
    due = 0.0
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        due = time.monotonic() + interval
        frame = next(frames, None)
        if frame is None:
            return
        yield frame
