"""Where `watch` sends captions: a webhook, an MQTT broker, a video."""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import sys
import threading
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2edge.cli import main
from blip2edge.cli.flag_types import http_header
from blip2edge.errors import BackendError, OutputError, UsageError
from blip2edge.runtime.images.video import draw_caption
from blip2edge.runtime.serving.streams import queued_sink
from blip2edge.runtime.serving.streams.annotated_video import AnnotatedVideo
from blip2edge.runtime.serving.streams.queued_sink import CaptionEvent, QueuedSink, Sink, SinkOptions
from blip2edge.runtime.serving.streams.sinks import SINKS
from tests.waiting import until

PATIENCE_S = 30.0


def event(number: int, image: Any = None, seconds: float = 0.0) -> CaptionEvent:
    return CaptionEvent({"text": f"caption {number}", "frame": str(number)}, image, seconds)


@pytest.fixture
def reports() -> list[str]:
    return []


@pytest.fixture
def open_sink(reports: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sink]]:
    """Opens a sink that tries again at once; it is closed at the end."""
    monkeypatch.setattr(queued_sink, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(queued_sink, "CLOSE_S", 0.2)
    opened: list[Sink] = []

    def make(kind: str, address: str, **headers: str) -> Sink:
        opened.append(SINKS[kind](address, SinkOptions(reports.append, headers)))
        return opened[-1]

    yield make
    for sink in opened:
        sink.close()


class Receiver(ThreadingHTTPServer):
    """A web server that answers with the statuses that it is given, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.statuses: list[int] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.gets = 0
        self.may_answer = threading.Event()
        self.may_answer.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


class Answering(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.keys.append(self.headers["X-Key"])
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.server.may_answer.wait(PATIENCE_S)
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        if status == 200:
            self.server.bodies.append(body)
        self.send_response(status)
        if 300 <= status < 400:
            self.send_header("location", "/other?password=abc")
        self.send_header("content-length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.gets += 1
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.may_answer.set()
        server.shutdown()
        thread.join()


def frames_of(receiver: Receiver) -> list[str]:
    return [body["frame"] for body in receiver.bodies]


def test_captions_are_posted_in_order(receiver: Receiver, open_sink: Callable[..., Sink], reports: list[str]) -> None:
    sink = open_sink("post", receiver.url, **{"X-Key": "abc"})
    for number in range(3):
        sink.put(event(number))
    until(lambda: len(receiver.bodies) == 3)
    assert receiver.bodies[0] == {"text": "caption 0", "frame": "0"}
    assert (frames_of(receiver), receiver.keys, reports) == (["0", "1", "2"], ["abc"] * 3, [])


def test_a_failing_receiver_is_tried_again_and_reported_once(
    receiver: Receiver, open_sink: Callable[..., Sink], reports: list[str]
) -> None:
    receiver.statuses = [503, 500, 429]
    sink = open_sink("post", receiver.url)
    sink.put(event(0))
    sink.put(event(1))
    until(lambda: len(receiver.bodies) == 2 and len(reports) == 2)
    assert frames_of(receiver) == ["0", "1"]
    assert reports[0].endswith("answers with status 503; trying again")
    assert reports[1].endswith("captions are delivered again")


def test_a_refused_caption_is_not_sent_again(
    receiver: Receiver, open_sink: Callable[..., Sink], reports: list[str]
) -> None:
    receiver.statuses = [404, 404]
    sink = open_sink("post", receiver.url)
    for number in range(3):
        sink.put(event(number))
    until(lambda: receiver.bodies)
    sink.close()
    assert frames_of(receiver) == ["2"]
    assert [report.partition(": ")[2] for report in reports] == [
        "a caption was refused (status 404)",
        "captions are delivered again",
        "2 captions were not delivered",
    ]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_refused_and_never_followed(
    status: int, receiver: Receiver, open_sink: Callable[..., Sink], reports: list[str]
) -> None:
    receiver.statuses = [status]
    sink = open_sink("post", receiver.url, Authorization="Bearer key")
    sink.put(event(0))
    sink.put(event(1))
    until(lambda: receiver.bodies)
    sink.close()
    assert (frames_of(receiver), receiver.gets) == (["1"], 0)
    assert f"a caption was refused (status {status}" in reports[0]
    assert reports[-1].endswith("1 captions were not delivered")
    assert not any("abc" in report for report in reports)


def test_a_caption_in_delivery_is_not_dropped_and_counted_once(
    receiver: Receiver, open_sink: Callable[..., Sink], reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued_sink, "CAPACITY", 2)
    receiver.may_answer.clear()
    sink = open_sink("post", receiver.url)
    sink.put(event(0))
    until(lambda: receiver.keys)  # it is in delivery
    for number in (1, 2, 3):
        sink.put(event(number))
    receiver.may_answer.set()
    until(lambda: len(receiver.bodies) == 3)
    sink.close()
    assert frames_of(receiver) == ["0", "2", "3"]
    assert [report.partition(": ")[2] for report in reports] == ["1 captions were not delivered"]


def test_an_unexpected_exception_refuses_one_caption(reports: list[str]) -> None:
    delivered: list[str] = []

    def deliver(one: CaptionEvent) -> None:
        if one.values["frame"] == "0":
            raise UnicodeEncodeError("ascii", "ü", 0, 1, "not in range")
        delivered.append(one.values["frame"])

    sink = QueuedSink("hook", deliver, reports.append)
    sink.put(event(0))
    sink.put(event(1))
    until(lambda: delivered)
    sink.close()
    assert delivered == ["1"]
    assert reports[0].startswith("hook: a caption was refused (UnicodeEncodeError: ")
    assert reports[1:] == ["hook: captions are delivered again", "hook: 1 captions were not delivered"]


def test_a_slow_receiver_never_blocks_and_the_newest_captions_are_kept(
    receiver: Receiver, open_sink: Callable[..., Sink], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued_sink, "CAPACITY", 4)
    receiver.may_answer.clear()
    sink = open_sink("post", receiver.url)
    for number in range(50):
        sink.put(event(number))  # the receiver has not answered once
    receiver.may_answer.set()
    until(lambda: frames_of(receiver)[-4:] == ["46", "47", "48", "49"])
    assert len(receiver.bodies) <= 6


def test_an_absent_receiver_does_not_keep_the_program(open_sink: Callable[..., Sink], reports: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    sink = open_sink("post", f"http://127.0.0.1:{port}/")
    sink.put(event(0))
    until(lambda: reports)
    sink.close()
    assert reports[0].startswith(f"http://127.0.0.1:{port}/: cannot be reached (<urlopen error [Errno ")
    assert reports[1:] == [f"http://127.0.0.1:{port}/: 1 captions were not delivered"]


def test_attempts_have_pauses_while_the_sink_closes(
    receiver: Receiver, open_sink: Callable[..., Sink], reports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a receiver that fails, each attempt of the closing time is FIRST_WAIT_S after the one before."""
    monkeypatch.setattr(queued_sink, "FIRST_WAIT_S", 0.1)
    monkeypatch.setattr(queued_sink, "CLOSE_S", 0.35)
    receiver.statuses = [500] * 1000
    sink = open_sink("post", receiver.url)
    sink.put(event(0))
    sink.close()
    assert 2 <= len(receiver.keys) <= 6
    assert (sink.lost, reports[-1].partition(": ")[2]) == (1, "1 captions were not delivered")


@pytest.mark.parametrize("user", ["me:s3cret", "me:s3@cret", "me:s3/cret", "me", ":s3cret"])
def test_a_password_in_the_address_of_a_webhook_is_refused_and_not_shown(
    user: str, open_sink: Callable[..., Sink]
) -> None:
    with pytest.raises(UsageError, match="expected post to ") as raised:
        open_sink("post", f"http://{user}@host/hook")
    assert "cret" not in str(raised.value)
    if "/" not in user:
        assert "give them as a header: post_header 'Authorization: …'" in str(raised.value)


class Broker:
    """A stand-in for an MQTT broker: it accepts a client, and acknowledges and keeps what is published (MQTT 3.1.1)."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.published: list[tuple[str, dict[str, Any]]] = []
        self.connects: list[bytes] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._server.accept()
            except OSError:
                return
            with connection, suppress(OSError, IndexError, TypeError):  # a closed connection
                self._serve(connection.makefile("rwb", buffering=0))

    def _serve(self, stream: Any) -> None:
        while True:
            kind, length, shift = stream.read(1)[0], 0, 0
            while True:
                byte = stream.read(1)[0]
                length |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    break
            body = b""
            while len(body) < length:
                body += stream.read(length - len(body))
            if kind == 0x10:  # CONNECT
                self.connects.append(body)
                stream.write(bytes((0x20, 2, 0, self.code)))
            elif kind & 0xF0 == 0x30:  # PUBLISH
                end = 2 + int.from_bytes(body[:2], "big")
                self.published.append((body[2:end].decode(), json.loads(body[end + 2 :])))
                stream.write(bytes((0x40, 2)) + body[end : end + 2])
            elif kind == 0xE0:  # DISCONNECT
                return

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()


@contextmanager
def broker(code: int = 0) -> Iterator[Broker]:
    pytest.importorskip("paho.mqtt", reason="publishing needs the extra mqtt")
    made = Broker(code)
    try:
        yield made
    finally:
        made.close()


def test_captions_are_published(open_sink: Callable[..., Sink], reports: list[str]) -> None:
    with broker() as made:
        sink = open_sink("mqtt", f"mqtt://cam:p%40ss@127.0.0.1:{made.port}/robots/one/captions")
        for number in range(3):
            sink.put(event(number))
        until(lambda: len(made.published) == 3)
        sink.close()
        assert made.published[0] == ("robots/one/captions", {"text": "caption 0", "frame": "0"})
        assert made.connects[0].endswith(b"\x00\x03cam\x00\x04p@ss")
        assert reports == []


def test_a_broker_that_refuses_the_client(open_sink: Callable[..., Sink], reports: list[str]) -> None:
    with broker(code=5) as made:
        sink = open_sink("mqtt", f"mqtt://127.0.0.1:{made.port}/topic")
        sink.put(event(0))
        until(lambda: reports)
        assert "the broker refuses the connection: Not authorized" in reports[0]
        sink.close()


@pytest.mark.skipif(shutil.which("mosquitto") is None, reason="mosquitto is not installed")
def test_a_real_broker_that_is_started_again(
    open_sink: Callable[..., Sink], reports: list[str], tmp_path: Path
) -> None:
    mqtt: Any = pytest.importorskip("paho.mqtt.client", reason="publishing needs the extra mqtt")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # The broker keeps the reader's subscription over its restart. Otherwise the sink, which may connect before the
    # reader, could publish a caption that nobody has subscribed to.
    (tmp_path / "conf").write_text(
        f"listener {port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n"
        f"persistence true\npersistence_location {tmp_path}/\n"
    )
    got: list[str] = []

    @contextmanager
    def mosquitto() -> Iterator[None]:
        process = subprocess.Popen(["mosquitto", "-c", str(tmp_path / "conf")], stderr=subprocess.DEVNULL)
        reader = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="reader", clean_session=False)
        reader.on_connect = lambda client, *_: client.subscribe("robot/#", qos=1)
        ready = threading.Event()
        reader.on_subscribe = lambda *_: ready.set()
        reader.on_message = lambda _client, _data, message: got.append(json.loads(message.payload)["frame"])

        def is_connected() -> bool:
            try:
                return bool(reader.connect("127.0.0.1", port) == 0)
            except OSError:
                return False

        until(is_connected)
        reader.loop_start()
        assert ready.wait(PATIENCE_S)
        try:
            yield
        finally:
            reader.disconnect()
            reader.loop_stop()
            process.terminate()
            process.wait()

    with mosquitto():
        sink = open_sink("mqtt", f"mqtt://127.0.0.1:{port}/robot/captions")
        sink.put(event(0))
        until(lambda: got == ["0"])
    sink.put(event(1))
    until(lambda: reports)
    with mosquitto():
        sink.put(event(2))
        until(lambda: got == ["0", "1", "2"])
        sink.close()
    assert ["cannot be reached" in reports[0], reports[1].endswith("captions are delivered again")] == [True, True]
    assert len(reports) == 2


@pytest.mark.parametrize(
    ("kind", "address"),
    [
        *(("post", address) for address in ("ftp://host/", "host", "http://host:abc/", "http://host:65536/")),
        *(("post", address) for address in ("http://host/a b", "http://host/ü", "http://[::1/", "http://a..b/")),
        *(("mqtt", address) for address in ("mqtt://host", "mqtt://host/#", "a/b", "mqtt://h:abc/t", "mqtt://a b/t")),
        *(
            ("mqtt", address)
            for address in ("mqtt://h/a/#", "mqtt://h/a#b", "mqtt://h/a?b", "mqtt://h/a%23", "mqtt://h/+/b")
        ),
    ],
)
def test_wrong_addresses(kind: str, address: str, open_sink: Callable[..., Sink]) -> None:
    with pytest.raises(UsageError, match=f"expected {kind}"):
        open_sink(kind, address)


def test_headers_are_latin_1() -> None:
    assert http_header("X-Key: größe") == ("X-Key", "größe")
    with pytest.raises(ArgumentTypeError, match="expected the value of X-Key to have characters of Latin-1 only"):
        http_header("X-Key: 5 €")


def test_mqtt_without_its_package(open_sink: Callable[..., Sink], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paho", None)
    with pytest.raises(BackendError, match=r"pip install 'blip2edge\[mqtt\]'"):
        open_sink("mqtt", "mqtt://host/topic")


def test_annotated_video(open_sink: Callable[..., Sink], reports: list[str], tmp_path: Path) -> None:
    av: Any = pytest.importorskip("av", reason="videos are written with PyAV")
    path = tmp_path / "out.mp4"
    sink = open_sink("annotated", str(path))
    red = np.zeros((121, 161, 3), np.uint8)
    red[..., 0] = 200
    for number, seconds in enumerate((0.0, 0.5, 0.5, 2.0)):  # two frames of one time
        sink.put(event(number, red if number < 3 else Image.new("RGB", (50, 40), "blue"), seconds))
    sink.put(event(4, tmp_path / "gone.png", 3.0))
    assert "a picture is missing in the video" in reports[0]
    sink.close()
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert [round(1000 * frame.time) for frame in frames] == [0, 500, 501, 2000]
    shown = frames[0].to_ndarray(format="rgb24").astype(int)
    assert shown.shape == (120, 160, 3)
    assert np.abs(shown[:80] - (200, 0, 0)).mean() < 6  # the picture
    assert shown[100:].max(axis=(1, 2)).max() > 200  # white letters
    assert np.abs(frames[3].to_ndarray(format="rgb24")[:80].astype(int) - (0, 0, 255)).mean() < 6
    with pytest.raises(OutputError, match="exists already"):
        AnnotatedVideo(str(path), SinkOptions(reports.append, {}))
    with pytest.raises(OutputError, match=r"out.mp4 could not be written \(No such file or directory\)"):
        AnnotatedVideo(str(tmp_path / "no" / "out.mp4"), SinkOptions(reports.append, {}))
    with pytest.raises(UsageError, match=r"suffix .mp4, got .*an.txt; give a name such as .*an.mp4"):
        AnnotatedVideo(str(tmp_path / "an.txt"), SinkOptions(reports.append, {}))
    assert not (tmp_path / "an.txt").exists()


def test_an_annotated_video_can_be_played_before_its_end(open_sink: Callable[..., Sink], tmp_path: Path) -> None:
    """A program that is killed leaves the frames it has captioned, but for the last one."""
    av: Any = pytest.importorskip("av", reason="videos are written with PyAV")
    path = tmp_path / "out.mp4"
    sink = open_sink("annotated", str(path))
    for number in range(5):
        sink.put(event(number, Image.new("RGB", (64, 48), (50 * number, 0, 0)), number / 10))
    with av.open(str(path)) as container:
        assert len(list(container.decode(video=0))) >= 4


def test_a_long_caption_is_written_in_lines_that_fit() -> None:
    picture = Image.new("RGB", (200, 400), (10, 200, 10))
    words = " ".join(["word"] * 40)
    drawn = np.asarray(draw_caption(picture, words)).astype(int)
    white = (drawn.min(axis=2) > 180).nonzero()
    assert white[1].max() < 198
    assert white[0].max() - white[0].min() > 60
    assert (drawn[:100] == (10, 200, 10)).all()


def test_the_command_sends_what_it_prints(
    receiver: Receiver, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="the cpu backend needs onnxruntime")
    pytest.importorskip("av", reason="videos are written with PyAV")
    folder = tmp_path / "pictures user-pw=s3cret"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 48), (90 * number, 40, 40)).save(folder / f"{number}.png")
    words = ["watch", str(folder), "--once", "-b", str(tiny_bundle), "--threads", "1", "--max-new-tokens", "3"]
    video = tmp_path / "out.mp4"
    assert main([*words, "--json", "--post", receiver.url, "--post-header", "X-Key: k", "--annotated", str(video)]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(printed) == 2
    more = [{key: body.pop(key) for key in ("source", "time")} for body in receiver.bodies]
    assert receiver.bodies == printed
    assert [one["source"] for one in more] == [str(folder).replace("s3cret", "***")] * 2
    assert receiver.keys == ["k", "k"]
    assert video.stat().st_size > 0
    assert main([*words, "--post-header", "none"]) == 2
    capsys.readouterr()
    assert main([*words, "--post-header", "X-Key: k"]) == 2
    assert "--post-header needs --post" in capsys.readouterr().err
    receiver.statuses = [404] * 2
    assert main([*words, "--post", receiver.url]) == 1  # the captions are printed, but not delivered
    assert main([*words, "--post", "nowhere"]) == 2
    assert "expected --post to be an address" in capsys.readouterr().err
