"""``blip2edge watch``: live captions of a camera or a video, newest frame first, or of every picture of a folder.

For a camera, a reader thread keeps only the newest frame. When the captioner is free, it captions that frame; the
frames in between are dropped and counted. So a caption is as recent as the device allows, and no backlog grows. The
pictures of a folder are kept by the file system, and all of them are captioned.
"""

from __future__ import annotations

import stat
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blip2edge.errors import BackendError, DataError, ImageError
from blip2edge.packages import require
from blip2edge.picture_files import PICTURE_SUFFIXES
from blip2edge.runtime.captioning.captioner import Captioner
from blip2edge.runtime.captioning.request import CaptionResult
from blip2edge.runtime.images.video import VIDEO_SUFFIXES

POLL_S = 0.2  # between two listings of a folder
SETTLED_POLLS = 10  # listings that show a broken picture unchanged before its error is reported


@dataclass(frozen=True)
class Frame:
    """A picture.

    Attributes:
        name: A file's name, or seconds into the video.
        image: The picture, or its path.
        retry: Gives the frame back to its source, which tries it again: for a file that may still be written. None
            if it is complete.
    """

    name: str
    image: Any
    retry: Callable[[], None] | None = None


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
    """

    frame: str
    result: CaptionResult | None
    error: str
    dropped: int
    age_ms: float
    reused: bool = False


Frames = Generator[Frame, None, None]


class Source(Iterator[Frame]):
    """An iterator of frames. It ends with the frames, or when :meth:`close` is called from any thread.

    Args:
        make: Makes the frames; its event is set when the source is closed.
        is_queue: Whether frames wait until they are taken, as the files of a folder do; a camera drops them.
    """

    def __init__(self, make: Callable[[threading.Event], Frames], *, is_queue: bool = False) -> None:
        self.is_queue = is_queue
        self._closed = threading.Event()
        self._running = threading.Lock()
        self._frames = make(self._closed)

    def __next__(self) -> Frame:
        """The next frame; waits for it."""
        try:
            with self._running:
                if self._closed.is_set():
                    raise StopIteration
                return next(self._frames)
        finally:
            self._end_if_closed()

    def close(self) -> None:
        """Ends the frames, also for a thread that waits for one.

        Files and cameras are closed at once, or when the frame that a thread waits for has arrived.
        """
        self._closed.set()
        self._end_if_closed()

    def _end_if_closed(self) -> None:
        """Ends the generator after :meth:`close`; while it runs, the running thread does so afterwards."""
        if self._closed.is_set() and self._running.acquire(blocking=False):
            try:
                self._frames.close()
            finally:
                self._running.release()


def open_source(source: str, *, follow: bool = True) -> Source:
    """Opens a camera, a video or a folder as a source of frames.

    Args:
        source: A number or ``/dev/video…`` for a camera, a video file, an address that FFmpeg reads (``rtsp:…``), or a
            folder, in which new pictures appear.
        follow: If True, wait for new pictures in a folder, and read a video file at its own speed; otherwise take the
            present pictures only, and read the video as fast as possible.

    Raises:
        DataError: There is no such source.
        BackendError: Videos and cameras need PyAV, which is not installed.
    """
    path = Path(source)
    if path.is_dir():
        return Source(partial(_folder, path, follow), is_queue=True)
    if source.isdigit():
        return _video(f"/dev/video{source}", "v4l2")
    if source.startswith("/dev/"):
        return _video(source, "v4l2")
    if "://" in source:
        return _video(source)
    if path.is_file() and path.suffix.lower() in VIDEO_SUFFIXES:
        return _video(source, paced=follow)
    raise DataError(
        f"expected a folder, a video file or a camera, got {source}",
        "give a folder of pictures, a video, a camera's number, or an address such as rtsp://…",
    )


def _folder(path: Path, follow: bool, closed: threading.Event) -> Frames:
    """Yields the pictures of a folder, oldest first; with `follow`, once two listings show a file unchanged.

    With `follow`, a frame can be given back: its file is tried again when it changes, and a last time when
    :data:`SETTLED_POLLS` listings show it unchanged.
    """
    taken: set[_Version] = set()
    before: set[_Version] = set()
    broken: dict[_Version, int] = {}  # listings that showed each picture that was given back
    while not closed.is_set():
        found = _pictures(path)
        ready = found & before if follow else found
        for version in sorted(ready - taken):
            taken.add(version)
            retry = partial(broken.__setitem__, version, 0) if follow else None
            yield Frame(version.name, path / version.name, retry)
        if not follow:
            return
        for version in sorted(broken):
            broken[version] += 1
            if version not in found or broken[version] == SETTLED_POLLS:
                del broken[version]
                if version in found:
                    yield Frame(version.name, path / version.name)
        taken &= found
        before = found
        closed.wait(POLL_S)


class _Version(NamedTuple):
    """The state of a picture file in a listing; it changes when the file is written again."""

    modified_ns: int
    name: str
    size: int


def _pictures(folder: Path) -> set[_Version]:
    """Lists the pictures of a folder; files that are removed during the listing are skipped."""
    found = set()
    try:
        for path in folder.iterdir():
            if path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith("."):
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if stat.S_ISREG(status.st_mode):
                        found.add(_Version(status.st_mtime_ns, path.name, status.st_size))
    except OSError as error:
        raise DataError(
            f"{folder} cannot be read any more ({error.strerror or error})", "check that the folder still exists"
        ) from error
    return found


def _video(address: str, kind: str | None = None, *, paced: bool = False) -> Source:
    av = require("av", "reading videos and cameras", BackendError)
    return Source(partial(_decoded, av, address, kind, paced))


def _decoded(av: Any, address: str, kind: str | None, paced: bool, closed: threading.Event) -> Frames:
    """Yields the frames of a video; `kind` is FFmpeg's input format, `paced` means at the video's own speed."""
    start, empty = time.perf_counter(), True
    try:
        with av.open(address, format=kind) as container:
            stream = container.streams.video[0]
            for frame in container.decode(stream):
                at = float(frame.time or 0.0)
                if paced:
                    closed.wait(max(0.0, at - (time.perf_counter() - start)))
                if closed.is_set():
                    return
                empty = False
                yield Frame(f"{at:.2f} s", frame.to_ndarray(format="rgb24"))
    except (av.error.FFmpegError, IndexError) as error:
        raise DataError(
            f"{address} cannot be read as a video ({error})",
            "check the path, the camera or the address; convert a video file to MP4",
        ) from error
    if empty:
        raise DataError(
            f"{address}: expected a video with frames, found none that can be decoded", "copy or record the video again"
        )


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
    queued = every or (isinstance(frames, Source) and frames.is_queue)
    newest = None if queued else NewestFrame(frames)

    def coming() -> Iterator[tuple[Frame, float, int]]:
        if newest is None:
            yield from ((frame, time.monotonic(), 0) for frame in frames)
        else:
            yield from iter(newest.get, None)

    with captioner.scheduler(max_batch=1, max_waiting=1, encoder=encoder) as scheduler:
        try:
            for frame, arrived, dropped in coming():
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
                yield WatchResult(frame.name, result, problem, dropped, age_ms, reused)
        finally:
            if newest is not None:
                newest.close()
            elif isinstance(frames, Source):
                frames.close()
