"""The sources of ``blip2edge watch``: folders, video files, cameras, network streams and GStreamer pipelines.

:data:`KINDS` lists the kinds of sources. Each kind has a function that checks whether a text names such a source, and a
function that yields its frames. If a live source breaks off, :func:`_reconnecting` opens it again.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blip2edge.errors import DataError, one_line, shown_address
from blip2edge.runtime.images.preprocess import DeferredImage
from blip2edge.runtime.images.video import VIDEO_SUFFIXES
from blip2edge.runtime.serving.streams import gstreamer
from blip2edge.runtime.serving.streams.decoder import Ending, decoded, pyav
from blip2edge.runtime.serving.streams.gstreamer import CSI
from blip2edge.runtime.serving.streams.listing import PictureVersion, pictures_in

POLL_S = 0.2  # between two listings of a folder
SETTLED_POLLS = 10  # listings that show a broken picture unchanged before its error is reported
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0  # before a live source is opened again; doubled each time
DAMAGE_REPORT_S = 60.0  # between two reports of frames of a live source that could not be decoded
NETWORK_TIMEOUT_S = 5.0  # to connect, and between two packets; FFmpeg returns at the second timeout in a row

AT_ONCE = {"fpsprobesize": "0"}
"""Options of FFmpeg for live streams. Without them, FFmpeg measures the frame rate for 2 seconds before it begins."""

LIVE_SCHEMES = frozenset(("rtsp", "rtsps", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp"))
"""Schemes of addresses whose streams have no end."""

Report = Callable[[str], None]  # takes a sentence for the user


class SourceError(DataError):
    """Raised if a video, a camera or a stream cannot be read; ``reason`` is the reason without the source's name."""

    def __init__(self, problem: str, fix: str | None = None, *, field: str | None = None, reason: str = "") -> None:
        super().__init__(problem, fix, field=field)
        self.reason = reason or self.problem


@dataclass(frozen=True)
class Frame:
    """A picture of a source.

    Attributes:
        name: Name of the file, or the time in the video in seconds.
        image: The picture, or its path.
        retry: Call it if the picture cannot be read: the source yields the frame again later, because another program
            may still be writing the file. None if there is no further attempt.
        seconds: Time of the frame in a video file; None if the frame has no time.
    """

    name: str
    image: Any
    retry: Callable[[], None] | None = None
    seconds: float | None = None


Frames = Generator[Frame, None, None]


class Source(Iterator[Frame]):
    """An iterator of frames. It ends after the last frame, or when :meth:`close` is called, in any thread.

    Args:
        make: Returns a generator of frames; its argument is an event, which is set when the source is closed.
        is_queue: Whether frames wait until they are taken, like the files of a folder; a camera does not wait.
        is_live: Whether the source has no end, like a camera.
    """

    def __init__(self, make: Callable[[Ending], Frames], *, is_queue: bool = False, is_live: bool = False) -> None:
        self.is_queue, self.is_live = is_queue, is_live
        self._closed = Ending()
        self._running = threading.Lock()
        self._frames = make(self._closed)

    def __next__(self) -> Frame:
        """Waits for the next frame and returns it."""
        try:
            with self._running:
                if self._closed.is_set():
                    raise StopIteration
                return next(self._frames)
        finally:
            self._end_if_closed()

    @property
    def undecoded(self) -> int:
        """Returns the number of frames so far that were damaged or missing."""
        return self._closed.undecoded

    def close(self) -> None:
        """Ends the frames; if a thread is waiting for a frame, the source ends after this frame has arrived."""
        self._closed.set()
        self._end_if_closed()

    def _end_if_closed(self) -> None:
        """Ends the generator if :meth:`close` was called; if another thread uses it, that thread ends it later."""
        if self._closed.is_set() and self._running.acquire(blocking=False):
            try:
                self._frames.close()
            finally:
                self._running.release()


@dataclass(frozen=True)
class SourceKind:
    """A kind of source.

    Attributes:
        form: How a source of this kind is written, for error messages.
        matches: Whether a text names a source of this kind.
        frames: Returns a generator of frames. Arguments: the text, whether to follow the source (``follow`` of
            :func:`open_source`), and an event that is set to end the frames.
        is_queue: As in :class:`Source`.
        is_live: Whether the source has no end: when it ends or fails after its first frame, it is opened again.
        check: Raises BackendError if a package or a program that this kind needs is missing.
    """

    form: str
    matches: Callable[[str], bool]
    frames: Callable[[str, bool, Ending], Frames]
    check: Callable[[], object]
    is_queue: bool = False
    is_live: bool = False


def open_source(source: str, *, follow: bool = True, report: Report | None = None) -> Source:
    """Opens a source of frames.

    Args:
        source: A folder, in which new pictures appear; a number or ``/dev/video…`` for a camera; ``csi:N`` for a camera
            of a Jetson; a GStreamer pipeline (``v4l2src ! …``); an address that FFmpeg reads (``rtsp:…``); or a video
            file.
        follow: If True, wait for new pictures in a folder, read a video file at its own speed, and open a live source
            again when it breaks off; otherwise take the present pictures only, and read as fast as possible to the end.
        report: Called when a live source breaks off, and when its frames come again.

    Raises:
        DataError: There is no such source.
        BackendError: The source needs a package or a program that is not installed.
    """
    kind = next((kind for kind in KINDS if kind.matches(source)), None)
    if kind is None:
        raise _no_source(source)
    kind.check()
    make = partial(kind.frames, source, follow)
    if kind.is_live and follow:
        make = partial(_reconnecting, make, shown_address(source), report or (lambda _: None))
    return Source(make, is_queue=kind.is_queue, is_live=kind.is_live)


def _no_source(source: str) -> DataError:
    """Returns the error for a text that names no source."""
    suffix, name = os.path.splitext(source)[1], shown_address(source)
    if suffix and not os.path.lexists(source):
        return DataError(f"{name}: no such file", "check the path")
    if os.path.isfile(source):
        return DataError(
            f"{name}: expected a video file with a suffix of {', '.join(sorted(VIDEO_SUFFIXES))}, got {suffix}",
            "convert the video to MP4, or put pictures into a folder and give the folder",
        )
    return DataError(
        f"expected a folder, a video file or a camera, got {name if source.strip() else 'an empty text'}",
        f"give {', '.join(one.form for one in KINDS)}",
    )


def _reconnecting(make: Callable[[Ending], Frames], name: str, report: Report, closed: Ending) -> Frames:
    """Yields the frames of a live source, and opens the source again when it ends or fails after its first frame.

    Calls ``report`` once when the source is lost, once when frames come again, and at most once in
    :data:`DAMAGE_REPORT_S` seconds for damaged frames. An error before the very first frame is raised.
    """
    wait, lost, any_frame = FIRST_WAIT_S, 0.0, False
    reported, due = 0, 0.0  # the count of damaged frames that was last reported, and when it may be reported again
    while not closed.is_set():
        problem = "it ended"
        try:
            with closing(make(closed)) as frames:
                for frame in frames:
                    if closed.undecoded > reported and time.monotonic() >= due:
                        count = closed.undecoded - reported
                        report(f"{name}: {count} frame{'s' * (count > 1)} could not be decoded")
                        reported, due = closed.undecoded, time.monotonic() + DAMAGE_REPORT_S
                    if lost:
                        report(f"{name}: frames come again, after {time.monotonic() - lost:.1f} s")
                    wait, lost, any_frame = FIRST_WAIT_S, 0.0, True
                    yield replace(frame, seconds=None)  # a stream's clock starts again
        except DataError as error:
            if not any_frame:
                raise
            problem = error.reason if isinstance(error, SourceError) else error.problem
        if closed.is_set():
            return
        if not lost:
            lost = time.monotonic()
            report(f"{name}: the stream is lost: {problem}; trying to open it again until frames come")
        closed.wait(wait)
        wait = min(2 * wait, LONGEST_WAIT_S)


def _folder(folder: str, follow: bool, closed: Ending) -> Frames:
    """Yields the pictures of a folder, oldest first.

    With `follow`, the folder is listed again and again, and a picture is yielded when two listings show its file
    unchanged. If its ``retry`` is called, the picture is yielded again when the file has changed, and a last time when
    :data:`SETTLED_POLLS` listings show the file unchanged.
    """
    path = Path(folder)
    taken: set[PictureVersion] = set()
    before: set[PictureVersion] = set()
    broken: dict[PictureVersion, int] = {}  # listings that showed each picture that was given back
    while not closed.is_set():
        found = pictures_in(path)
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


def _file(path: str, follow: bool, closed: Ending) -> Frames:
    """Yields the frames of a video file; with `follow`, at the video's own speed."""
    start = time.perf_counter()
    for frame in _decoded(path, path, closed):
        if follow:
            closed.wait(max(0.0, (frame.seconds or 0.0) - (time.perf_counter() - start)))
        if closed.is_set():
            return
        yield frame


def _device(source: str, _follow: bool, closed: Ending) -> Frames:
    """Yields the frames of a Video4Linux camera; ``source`` is its number or its device file."""
    device = f"/dev/video{source}" if source.isdigit() else source
    yield from _decoded(source, device, closed, words=_OF_CAMERA, format="v4l2")


def _address(source: str, _follow: bool, closed: Ending) -> Frames:
    """Yields the frames of a network stream; raises DataError if nothing comes for :data:`NETWORK_TIMEOUT_S`."""
    options = AT_ONCE if _scheme(source) in LIVE_SCHEMES else {}
    tcp = {"rtsp_transport": "tcp"} if _scheme(source).startswith("rtsp") else {}
    how = {"options": {**options, **tcp}, "timeout": NETWORK_TIMEOUT_S}
    yield from _decoded(source, source, closed, words=_OF_ADDRESS, **how)


class _FailureWords(NamedTuple):
    """Texts for the error messages about one kind of source.

    Attributes:
        failed: What failed if the system or the network reports the error.
        fix: What the user can do.
    """

    failed: str
    fix: str


_NO_VIDEO = "cannot be read as a video"
_OF_FILE = _FailureWords(_NO_VIDEO, "check the path; convert a video file to MP4")
_OF_CAMERA = _FailureWords(
    "cannot be opened", "check the number or the device file, and that no other program uses the camera"
)
_OF_ADDRESS = _FailureWords("cannot be reached", "check the address, and that the camera or the server runs")


def _decoded(source: str, file: Any, closed: Ending, *, words: _FailureWords = _OF_FILE, **how: Any) -> Frames:
    """Yields the frames that FFmpeg decodes. A frame is converted to RGB only if it is captioned.

    Args:
        source: Name of the source in error messages.
        file: The address or the open file that PyAV opens.
        closed: An event that is set to end the frames.
        words: The texts of the error message if the source fails.
        **how: Arguments of ``av.open``.
    """
    av = pyav()
    shown, empty = shown_address(source), True
    try:
        with av.open(file, **how) as container:
            for frame in decoded(container, closed):
                if closed.is_set():
                    return
                at, empty = float(frame.time or 0.0), False
                name = f"{at:.2f} s"
                yield Frame(name, DeferredImage(name, partial(frame.to_ndarray, format="rgb24")), seconds=at)
    except (av.error.FFmpegError, IndexError) as error:
        silent = isinstance(error, av.error.ExitError)  # PyAV's timeout
        reason = f"nothing came for {NETWORK_TIMEOUT_S:g} s" if silent else one_line(error)
        failed = words.failed if silent or isinstance(error, OSError) else _NO_VIDEO
        raise SourceError(f"{shown} {failed} ({reason})", words.fix, reason=reason) from error
    if empty:
        raise DataError(
            f"{shown}: expected a video with frames, found none that can be decoded", "copy or record the video again"
        )


def _pipeline(source: str, _follow: bool, closed: Ending) -> Frames:
    """Yields the frames of a GStreamer pipeline, or of ``csi:N``, a camera of a Jetson.

    OpenCV reads the pipeline if OpenCV is built with GStreamer; otherwise the program ``gst-launch-1.0`` runs the
    pipeline, and PyAV reads the frames.
    """
    text = CSI.format(source[4:]) if _is_csi(source) else source
    cv2 = gstreamer.opencv()
    return _by_launch(text, closed) if cv2 is None else _by_opencv(cv2, text, closed)


def _by_opencv(cv2: Any, text: str, closed: Ending) -> Frames:
    """Yields the frames of a pipeline that OpenCV reads."""
    with closing(gstreamer.opencv_pictures(cv2, text, closed)) as pictures:
        for at, picture in pictures:
            yield Frame(f"{at:.2f} s", picture)


def _by_launch(text: str, closed: Ending) -> Frames:
    """Yields the frames of a pipeline that ``gst-launch-1.0`` runs, which writes them uncompressed into a pipe."""
    end = " ! videoconvert ! video/x-raw,format=I420 ! y4menc ! fdsink fd=1"
    command = ["gst-launch-1.0", "-q", *gstreamer.pipeline_words(text), *end.split()]
    with (
        tempfile.TemporaryFile() as messages,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, bufsize=0) as process,
    ):
        try:
            yield from _decoded("the pipeline", process.stdout, closed, format="yuv4mpegpipe")
            failed = process.wait() != 0
        except DataError:
            failed = True
        finally:
            process.kill()
        if failed:
            messages.seek(0)
            lines = messages.read().decode(errors="replace").strip().splitlines() or ["no message"]
            said = next((line for line in lines if "ERROR" in line), lines[0])
            raise DataError(f"the pipeline has failed: {one_line(ValueError(said))}", "try it with gst-launch-1.0")


def _check_pipeline() -> None:
    """Raises BackendError if no installed library or program can read the pictures of a GStreamer pipeline."""
    if gstreamer.pipeline_reader() is None:
        pyav()


def _scheme(source: str) -> str:
    return source.partition("://")[0].lower() if "://" in source else ""


def _is_csi(source: str) -> bool:
    return re.fullmatch(r"csi:\d+", source) is not None


def _is_device(source: str) -> bool:
    return source.isdigit() or source.startswith("/dev/")


def _is_video(source: str) -> bool:
    """Returns whether ``source`` is an existing file with the suffix of a video, or with no suffix."""
    suffix = Path(source).suffix.lower()
    return (not suffix or suffix in VIDEO_SUFFIXES) and os.path.isfile(source)


KINDS = (
    SourceKind("a folder of pictures", os.path.isdir, _folder, lambda: None, is_queue=True),
    SourceKind("csi:0 for a camera of a Jetson", _is_csi, _pipeline, _check_pipeline),
    SourceKind("a GStreamer pipeline", lambda text: " ! " in text, _pipeline, _check_pipeline),
    SourceKind("a camera's number", _is_device, _device, pyav, is_live=True),
    SourceKind("an address such as rtsp://…", lambda at: _scheme(at) in LIVE_SCHEMES, _address, pyav, is_live=True),
    SourceKind("the address of a video", lambda at: bool(_scheme(at)), _address, pyav),
    SourceKind("a video file", _is_video, _file, pyav),
)
"""All kinds of sources; the first kind that matches is used."""
