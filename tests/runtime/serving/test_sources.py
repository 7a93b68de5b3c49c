"""Where `watch` reads frames from: streams that break off and come back, cameras, pipelines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2edge.errors import BackendError, DataError, one_line, shown_address
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.runtime.serving.streams import gstreamer, sources
from blip2edge.runtime.serving.streams.decoder import Ending
from blip2edge.runtime.serving.streams.gstreamer import APPSINK
from blip2edge.runtime.serving.streams.sources import (
    KINDS,
    Frame,
    Frames,
    SourceError,
    _reconnecting,
    open_source,
)
from blip2edge.runtime.serving.watch import watch
from tests.rtsp_server import RtspServer, h264_frames

av: Any = pytest.importorskip("av", reason="videos are read with PyAV")


@pytest.mark.parametrize(
    ("source", "form"),
    [
        ("0", "a camera's number"),
        ("/dev/video2", "a camera's number"),
        ("csi:1", "csi:0 for a camera of a Jetson"),
        ("rtspsrc location=rtsp://cam/1 ! rtph264depay ! decodebin", "a GStreamer pipeline"),
        ("RTSP://cam/1", "an address such as rtsp://…"),
        ("udp://@:5000", "an address such as rtsp://…"),
        ("https://example.org/film.mp4", "the address of a video"),
        ("a" * 5000, None),
        ("csi:x", None),
    ],
)
def test_kinds(source: str, form: str | None) -> None:
    assert next((kind.form for kind in KINDS if kind.matches(source)), None) == form


def test_passwords_are_not_shown() -> None:
    assert shown_address("rtsp://me:s3:c@cam:554/1?a=b@c") == "rtsp://me:***@cam:554/1?a=b@c"
    assert shown_address("rtsp://cam:554/1@2") == "rtsp://cam:554/1@2"
    assert shown_address("http://[::1]:80/@me") == "http://[::1]:80/@me"
    with pytest.raises(DataError) as raised:
        next(open_source("rtsp://me:s3cret@127.0.0.1:1/"))
    assert "me:***@127.0.0.1:1" in str(raised.value)
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("rtspsrc location=rtsp://me:s3cret@cam/1 ! decodebin", "rtspsrc location=rtsp://me:***@cam/1 ! decodebin"),
        ("rtspsrc user-id=me user-pw=s3!cret&x latency=0 ! a", "rtspsrc user-id=me user-pw=*** latency=0 ! a"),
        ('rtspsrc user-pw = "s3 \\" s3cret" ! a', "rtspsrc user-pw = *** ! a"),
        ("rtspsrc user-pw=(string)'s3 cret' ! a", "rtspsrc user-pw=*** ! a"),
        ("rtspsrc user-pw=s3\\ cret ! a", "rtspsrc user-pw=*** ! a"),
        ("rtspsrc user-pw='s3 cret ! a", "rtspsrc user-pw=***"),  # the quote is not closed
        ("srtsrc uri=srt://cam:9 passphrase=s3cret ! a", "srtsrc uri=srt://cam:9 passphrase=*** ! a"),
        ("rtsp://me:s3@cret@cam/1", "rtsp://me:***@cam/1"),
        ("rtsp://me:s3/cret@cam/1", "rtsp://me:***@cam/1"),
        ("http://cam/video?user=me&Password=s3cret", "http://cam/video?user=me&Password=***"),
        ("v4l2src ! videoflip method=clockwise ! tokenizer.pad_token = 3", None),
    ],
)
def test_passwords_of_pipelines_and_parameters_are_not_shown(source: str, shown: str | None) -> None:
    assert shown_address(source) == (source if shown is None else shown)


def test_no_message_has_the_password_of_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = "rtspsrc location=rtsp://me:s3cret@cam/1 user-pw=s3cret ! decodebin"
    monkeypatch.setitem(sys.modules, "cv2", FakeOpenCv(opens=False))
    with pytest.raises(DataError, match=r"pipeline rtspsrc location=rtsp://me:\*\*\*@cam/1 user-pw=\*\*\* !"):
        next(open_source(pipeline))
    long = f"{'x' * 185} rtsp://me:{'s3cret' * 9}@cam/1"
    assert "s3cret" not in one_line(ValueError(long))  # the cut is after the password
    with pytest.raises(DataError, match=r"got password=\*\*\*") as raised:
        open_source("password=s3cret")
    assert "s3cret" not in str(raised.value)


class Clock(Ending):
    """An event that notes the waits, and is set after some of them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.waits: list[float | None] = []
        self._most = most

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        if len(self.waits) == self._most:
            self.set()
        return self.is_set()


def attempts(*parts: list[str] | None) -> Any:
    """Makes a stream that is opened once for each part: it gives these frames, or cannot be opened (None)."""
    left = list(parts)

    def make(_: threading.Event) -> Frames:
        part = left.pop(0)
        if part is None:
            raise DataError("connection refused")
        for name in part:
            if name == "broken":
                raise SourceError("cam cannot be reached (it broke off)", reason="it broke off")
            yield Frame(name, None, seconds=1.0)

    return make


def test_a_live_stream_that_breaks_off_is_opened_again_with_longer_waits_and_two_messages() -> None:
    reports: list[str] = []
    clock = Clock(8)
    make = attempts(["a", "broken"], None, None, ["b", "c"], None, ["broken"], None, None)
    frames = list(_reconnecting(make, "cam", reports.append, clock))
    assert [frame.name for frame in frames] == ["a", "b", "c"]
    assert {frame.seconds for frame in frames} == {None}
    assert clock.waits == [0.5, 1.0, 2.0, 0.5, 1.0, 2.0, 4.0, sources.LONGEST_WAIT_S]
    assert len(reports) == 3
    assert "cam: the stream is lost: it broke off; trying" in reports[0]
    assert "cam: frames come again, after" in reports[1]
    assert "cam: the stream is lost: it ended; trying" in reports[2]


def test_a_first_failure_is_an_error() -> None:
    with pytest.raises(DataError, match="connection refused"):
        list(_reconnecting(attempts(None, ["a"]), "cam", lambda _: None, Clock(9)))


def test_an_rtsp_stream_is_cut_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "FIRST_WAIT_S", 0.02)
    if "libx264" not in av.codecs_available:
        pytest.skip("PyAV has no libx264")
    reports: list[str] = []
    colors = ((200, 40, 40), (40, 40, 200))
    frames = h264_frames([Image.new("RGB", (64, 48), color) for color in colors], 25)
    server = RtspServer(frames, 25)
    source = open_source(f"rtsp://me:s3cret@127.0.0.1:{server.port}/camera", report=reports.append)
    try:
        shown = [np.asarray(load_image(next(source).image)).mean(axis=(0, 1)) for _ in range(2)]
        assert all(min(np.abs(mean - color).max() for color in colors) < 12 for mean in shown)
        server.close()
        server = RtspServer(frames, 25, server.port)
        for _ in range(60):  # those that were on their way, and new ones
            next(source)
            if len(reports) == 2:
                break
        assert next(source).seconds is None
    finally:
        source.close()
        server.close()
    assert [*("DESCRIBE", "SETUP", "PLAY")] == server.requests[1:4]
    assert [report.partition(": ")[0] for report in reports] == [f"rtsp://me:***@127.0.0.1:{server.port}/camera"] * 2
    assert ["stream is lost" in reports[0], "frames come again, after" in reports[1]] == [True, True]


def test_a_stream_that_stops_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts the connection, and sends nothing."""
    import socket

    monkeypatch.setattr(sources, "NETWORK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        frames = open_source(f"tcp://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(DataError, match=r"nothing came for 0\.2 s"):
            next(frames)


@pytest.fixture
def launch() -> None:
    """GStreamer's program, with the plugins that a pipeline needs."""
    if shutil.which("gst-launch-1.0") is None:
        pytest.skip("gst-launch-1.0 is not installed")
    if subprocess.run(["gst-inspect-1.0", "y4menc"], capture_output=True).returncode:
        pytest.skip("GStreamer has no y4menc: gstreamer1.0-plugins-good")


PIPELINE = "videotestsrc num-buffers=5 pattern=red ! video/x-raw,width=64,height=48,framerate=10/1"


@pytest.mark.parametrize("end", ["", " ! videoconvert ! video/x-raw, format=(string)BGR ! appsink drop=1"])
def test_a_pipeline_of_gstreamer(launch: None, end: str) -> None:
    frames = list(open_source(PIPELINE + end))
    assert [frame.name for frame in frames] == [f"{number / 10:.2f} s" for number in range(5)]
    picture = np.asarray(load_image(frames[2].image)).astype(int)
    assert picture.shape == (48, 64, 3)
    assert np.abs(picture - (255, 0, 0)).max() < 6


def test_a_pipeline_that_is_wrong_or_fails(launch: None) -> None:
    with pytest.raises(DataError, match=r"the pipeline has failed: .*nosuchthing"):
        next(open_source("nosuchthing ! fakesink"))
    with pytest.raises(DataError, match=r"the pipeline has failed: .*ERROR"):
        list(open_source("filesrc location=/nowhere ! decodebin ! videoconvert"))


@pytest.mark.parametrize("pipeline", ["rtspsrc user-pw='s3cret ! decodebin", 'a name="b ! c', "a ! b \\"])
def test_a_pipeline_with_an_open_quote(launch: None, pipeline: str) -> None:
    with pytest.raises(DataError, match=r"expected a pipeline whose quotes are closed .*; close the quotes") as raised:
        next(open_source(pipeline))
    assert "s3cret" not in str(raised.value)


def test_a_pipeline_is_ended_when_the_source_is_closed(launch: None) -> None:
    frames = open_source("videotestsrc is-live=true ! video/x-raw,width=64,height=48")
    next(frames)
    frames.close()
    children = subprocess.run(["ps", "-o", "comm=", "--ppid", str(os.getpid())], capture_output=True)
    assert b"gst-launch" not in children.stdout


def test_a_pipeline_without_gstreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gstreamer, "opencv", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match=r"apt install gstreamer1\.0-tools"):
        open_source("videotestsrc ! fakesink")


class FakeOpenCv:
    """OpenCV that is built with GStreamer, whose pipeline gives two frames; the first channel is blue."""

    CAP_GSTREAMER = 1800

    def __init__(self, opens: bool = True, built: str = "YES (1.20.3)") -> None:
        self.opened: list[str] = []
        self.released = 0
        self._opens, self._built, self._left = opens, built, 2

    def getBuildInformation(self) -> str:  # noqa: N802
        return f"  Video I/O:\n    GStreamer:                   {self._built}\n"

    def VideoCapture(self, pipeline: str, kind: int) -> FakeOpenCv:  # noqa: N802
        assert kind == self.CAP_GSTREAMER
        self.opened.append(pipeline)
        return self

    def isOpened(self) -> bool:  # noqa: N802
        return self._opens

    def read(self) -> tuple[bool, Any]:
        self._left -= 1
        picture = np.zeros((4, 6, 3), np.uint8)
        picture[..., 0] = 255
        return (True, picture) if self._left >= 0 else (False, None)

    def release(self) -> None:
        self.released += 1


def test_a_pipeline_by_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for OpenCV: the wheels of PyPI are built without GStreamer."""
    cv2 = FakeOpenCv()
    monkeypatch.setitem(sys.modules, "cv2", cv2)
    frames = list(open_source("csi:1"))
    assert [load_image(frame.image).getpixel((0, 0)) for frame in frames] == [(0, 0, 255)] * 2
    assert cv2.opened[0].startswith("nvarguscamerasrc sensor-id=1 ! video/x-raw(memory:NVMM),")
    assert cv2.opened[0].endswith(" ! videoconvert ! video/x-raw,format=BGR ! appsink drop=true max-buffers=1")
    assert cv2.released == 1
    monkeypatch.setitem(sys.modules, "cv2", FakeOpenCv(opens=False))
    with pytest.raises(DataError, match="OpenCV cannot open the pipeline a ! appsink"):
        next(open_source("a ! appsink"))
    monkeypatch.setitem(sys.modules, "cv2", FakeOpenCv(built="NO"))
    assert gstreamer.opencv() is None


def test_the_end_of_a_pipeline_for_opencv_is_found() -> None:
    assert APPSINK.sub("", "a ! b ! videoconvert ! video/x-raw, format=BGR ! appsink name=x drop=true") == "a ! b"
    assert APPSINK.sub("", "a ! appsink ! b") == "a ! appsink ! b"


def test_at_most_so_many_captions_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    from blip2edge.runtime.serving import watch as module

    now, sleeps = [100.0], []

    def sleep(seconds: float) -> None:
        sleeps.append(round(seconds, 3))
        now[0] += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))

    def frames() -> Iterator[int]:
        for number in range(4):
            now[0] += 0.1  # a caption takes so long
            yield number

    assert list(module._paced(frames(), 0.25)) == [0, 1, 2, 3]
    assert sleeps == [0.0, 0.15, 0.15, 0.15, 0.15]
    assert watch.__kwdefaults__ is not None
    assert watch.__kwdefaults__["max_fps"] == 0.0
