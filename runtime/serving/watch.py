"""Captions a camera or a video live, or every picture of a folder (``blip2edge watch``).

For a camera, a thread reads the frames and keeps only the newest one. When the captioner is free, this frame is
captioned; the frames in between are dropped and counted. So a caption is as recent as the device allows. In a folder,
the pictures wait as files, and all of them are captioned.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from blip2edge.errors import ImageError
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import CaptionResult
from blip2edge.runtime.captioning.reuse.ladder import REUSED, ReuseLadder, ReusePlan, Step, fit_key
from blip2edge.runtime.decoding.options import GenerationOptions
from blip2edge.runtime.serving.streams.sources import Frame, Source

CaptionFrame = Callable[[Any], tuple[CaptionResult, Step]]


@dataclass(frozen=True)
class WatchResult:
    """The caption of a frame.

    Attributes:
        frame: Name of the frame.
        result: The caption; None if the picture could not be read.
        error: Why the picture could not be read; empty if there is a caption.
        dropped: Number of frames that were dropped since the last caption.
        age_ms: Milliseconds from the frame's arrival to the end of its caption; for a folder, from the moment when the
            picture was taken from the queue.
        reused: Whether the visual tokens or the caption of an earlier frame were reused.
        image: The frame's picture.
        seconds: Time of the frame: in a video file, or since the start of the watch.
        step: How the frame was captioned; see :data:`blip2edge.runtime.captioning.reuse.ladder.Step`.
        audit: Numbers of the audited frames so far, from :meth:`AuditMonitor.to_json`; None unless ``reuse_below`` is
            ``auto``.
    """

    frame: str
    result: CaptionResult | None
    error: str
    dropped: int
    age_ms: float
    reused: bool = False
    image: Any = None
    seconds: float = 0.0
    step: Step = "full"
    audit: dict[str, Any] | None = None


class NewestFrame:
    """Reads the frames of a source in a thread, and keeps only the newest frame."""

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
        """Waits for a frame; returns the newest one, its arrival time, and the number of dropped frames before it.

        The time is in ``time.monotonic`` seconds. Returns None at the end of the source.
        """
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

        If the frames come from a :class:`Source`, the source is closed and the thread stops at once. Otherwise the
        thread stops when the next frame arrives.
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
    reuse_below: float | Literal["auto"] = 0.0,
    reuse: ReusePlan | None = None,
    max_fps: float = 0.0,
    on_piece: Callable[[str | None], None] | None = None,
    **options: Any,
) -> Iterator[WatchResult]:
    """Captions the newest frame of a source again and again; with ``every``, captions each frame.

    Args:
        captioner: A loaded bundle.
        frames: From :func:`open_source`; a :class:`Source` is closed at the end.
        prompt: As in ``Captioner.caption``.
        every: Whether to caption every frame in order and drop none. A :class:`Source` with ``is_queue`` implies it.
        reuse_below: A frame is not encoded if it differs by less than this from the last encoded frame (the measure is
            that of :class:`ReusingEncoder`); with 0, every frame is encoded. ``auto``: captions are reused too, and the
            thresholds are fitted so that few changes are missed; see :class:`ReuseLadder`.
        reuse: How ``auto`` fits its thresholds; None for the defaults.
        max_fps: Largest number of captions per second; 0 for no limit. A camera's frames in between are dropped.
        on_piece: Called with each piece of a text as it is generated, and with None at its end. With ``auto``, a text
            is one piece.
        **options: As in ``Captioner.caption``.

    Yields:
        One result per captioned frame.

    Raises:
        DataError: The source failed, or the file with a stored fit cannot be read.
        UsageError: ``reuse_below`` is neither a number from 0 to 1 nor ``auto``; or as in :class:`ReuseLadder`.
    """
    generation = captioner.options(**options)
    captioner.generator.confidence.check(generation, prompt)
    interval = 1 / max_fps if max_fps else 0.0
    start = time.monotonic()
    queued = every or (isinstance(frames, Source) and frames.is_queue)
    newest = None if queued else NewestFrame(frames)

    def coming() -> Iterator[tuple[Frame, float, int]]:
        if newest is None:
            yield from ((frame, time.monotonic(), 0) for frame in frames)
        else:
            yield from iter(newest.get, None)

    ladder = None
    with ExitStack() as opened:
        opened.callback(_close, newest or frames)
        if reuse_below == "auto":
            plan = reuse or ReusePlan()
            key = fit_key(captioner.bundle, prompt, generation, plan)
            ladder = ReuseLadder(captioner.encoder, captioner.generator, generation, plan, key)
            caption: CaptionFrame = partial(_by_ladder, ladder, prompt, on_piece)
        else:
            caption = _by_scheduler(captioner, reuse_below, generation, prompt, on_piece, opened)
        for frame, arrived, dropped in _paced(coming(), interval):
            result, problem = None, ""
            step: Step = "full"
            try:
                result, step = caption(frame.image)
            except ImageError as error:
                if frame.retry is not None:  # perhaps still being written
                    frame.retry()
                    continue
                problem = str(error)
            yield WatchResult(
                frame=frame.name,
                result=result,
                error=problem,
                dropped=dropped,
                age_ms=(time.monotonic() - arrived) * 1e3,
                reused=step in REUSED,
                image=frame.image,
                seconds=arrived - start if frame.seconds is None else frame.seconds,
                step=step,
                audit=None if ladder is None else ladder.audits.to_json(),
            )
        if ladder is not None:
            ladder.finish()


def _by_scheduler(
    captioner: Captioner,
    reuse_below: float,
    generation: GenerationOptions,
    prompt: str | None,
    on_piece: Callable[[str | None], None] | None,
    opened: ExitStack,
) -> CaptionFrame:
    """Returns a function that captions a frame with a scheduler; the exit stack ``opened`` closes the scheduler."""
    encoder = captioner.reusing(reuse_below) if reuse_below else None
    scheduler = opened.enter_context(captioner.scheduler(max_batch=1, max_waiting=1, encoder=encoder))

    def caption(image: Any) -> tuple[CaptionResult, Step]:
        result = scheduler.submit(image, generation, prompt=prompt, on_piece=on_piece).result()
        return result, "features" if encoder is not None and encoder.reused else "full"

    return caption


def _by_ladder(
    ladder: ReuseLadder, prompt: str | None, on_piece: Callable[[str | None], None] | None, image: Any
) -> tuple[CaptionResult, Step]:
    """Captions a frame with a :class:`ReuseLadder`; calls ``on_piece`` with the text, then with None (the end)."""
    result, step = ladder(image, prompt)
    if on_piece is not None:
        on_piece(result.text)
        on_piece(None)
    return result, step


def _close(frames: NewestFrame | Iterator[Frame]) -> None:
    """Closes ``frames`` if it is a :class:`NewestFrame` or a :class:`Source`."""
    if isinstance(frames, (NewestFrame, Source)):
        frames.close()


def _paced(frames: Iterator[Any], interval: float) -> Iterator[Any]:
    """Yields at most one frame in `interval` seconds; waits before taking a frame, so that the frame is new."""
    due = 0.0
    while True:
        time.sleep(max(0.0, due - time.monotonic()))
        due = time.monotonic() + interval
        frame = next(frames, None)
        if frame is None:
            return
        yield frame
