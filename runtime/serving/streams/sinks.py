"""The receivers of ``blip2edge watch``: a webhook (``--post``), an MQTT broker (``--mqtt``), a video (``--annotated``).

:data:`SINKS` names them. Network sinks are a :class:`QueuedSink`: a bounded queue and a thread, so that a slow or
absent receiver never delays a caption.
"""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from http.client import HTTPException
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import SplitResult, unquote, urlsplit

from blip2edge.errors import BackendError, ImageError, OutputError, UsageError, one_line, option, shown_address
from blip2edge.packages import require
from blip2edge.runtime.images.preprocess import load_image
from blip2edge.runtime.images.video import draw_caption
from blip2edge.runtime.serving.streams.sources import Report

CAPACITY = 64  # captions that wait for a receiver
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0  # between attempts; doubled each time
TIMEOUT_S = 10.0  # of one attempt
CLOSE_S = 5.0  # at the end, for the captions that still wait
RETRIED = (408, 425, 429)  # HTTP statuses below 500 after which the same request may succeed later

MQTT_PORTS = {"mqtt": 1883, "mqtts": 8883}


@dataclass(frozen=True)
class CaptionEvent:
    """A caption on its way to the sinks.

    Attributes:
        values: What is sent, as a JSON object: that of ``watch --json`` with ``source`` and ``time``.
        image: The picture.
        seconds: Time of the frame in the video, or since the start.
    """

    values: Mapping[str, Any]
    image: Any
    seconds: float


class Sink(ABC):
    """A receiver of captions."""

    @abstractmethod
    def put(self, event: CaptionEvent) -> None:
        """Takes a caption."""

    @abstractmethod
    def close(self) -> None:
        """Sends what waits, and ends."""


class RefusedError(Exception):
    """The receiver will never take this caption."""


class QueuedSink(Sink):
    """Delivers captions in a thread. If the queue is full, the oldest caption that waits is dropped.

    A caption is tried again until it is delivered or refused. A failure and the recovery are reported once each.

    Args:
        name: The receiver, for messages.
        deliver: Sends a caption. It raises an OSError if that can be tried again, and RefusedError, or any other
            exception, if not.
        report: Called with a sentence for the user.
    """

    def __init__(self, name: str, deliver: Callable[[CaptionEvent], None], report: Report) -> None:
        self._name, self._deliver, self._report = name, deliver, report
        self._waiting: deque[CaptionEvent] = deque()
        self._current: CaptionEvent | None = None  # taken from the queue, and not delivered yet
        self._changed = threading.Condition()
        self._ends = float("inf")  # time.monotonic
        self._dropped = 0
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="blip2edge-sink", daemon=True)
        self._thread.start()

    def put(self, event: CaptionEvent) -> None:
        """Adds a caption to the queue; never waits."""
        with self._changed:
            if len(self._waiting) == CAPACITY:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(event)
            self._changed.notify()

    def close(self) -> None:
        """Gives the waiting captions :data:`CLOSE_S` seconds, and reports how many were not delivered."""
        with self._changed:
            self._ends = time.monotonic() + CLOSE_S
            self._changed.notify()
        self._thread.join(CLOSE_S + TIMEOUT_S)
        with self._changed:
            lost = self._dropped + len(self._waiting) + (self._current is not None)
        if lost:
            self._report(f"{self._name}: {lost} captions were not delivered")

    def _run(self) -> None:
        wait = FIRST_WAIT_S
        while True:
            with self._changed:
                while not (self._current or self._waiting) and self._ends == float("inf"):
                    self._changed.wait()
                if not (self._current or self._waiting) or time.monotonic() >= self._ends:
                    return
                event = self._current = self._current or self._waiting.popleft()
            if self._try(event):
                wait = FIRST_WAIT_S
                with self._changed:
                    self._current = None
                continue
            with self._changed:
                self._changed.wait_for(lambda: self._ends < float("inf"), wait)
            wait = min(2 * wait, LONGEST_WAIT_S)

    def _try(self, event: CaptionEvent) -> bool:
        """Delivers a caption; whether it is done with, delivered or refused."""
        try:
            self._deliver(event)
        except OSError as error:
            if not self._failing:
                self._report(f"{self._name}: cannot be reached ({one_line(error)}); trying again")
            self._failing = True
            return False
        except Exception as error:  # noqa: BLE001 - reported, and the thread goes on
            if not self._failing:
                kind = "" if isinstance(error, RefusedError) else f"{type(error).__name__}: "
                self._report(f"{self._name}: a caption was refused ({kind}{one_line(error)})")
            self._failing = True
            with self._changed:
                self._dropped += 1
            return True
        if self._failing:
            self._report(f"{self._name}: captions are delivered again")
        self._failing = False
        return True


@dataclass(frozen=True)
class SinkOptions:
    """What sinks need besides their address.

    Attributes:
        report: Called with a sentence for the user.
        headers: HTTP headers of a webhook's requests.
    """

    report: Report
    headers: Mapping[str, str]


def _parts(flag: str, url: str, schemes: Collection[str], wanted: str, hint: str) -> SplitResult:
    """The parts of a receiver's address.

    Raises:
        UsageError: It has another scheme, no host, a wrong port, or spaces before its path.
    """
    wrong = UsageError(f"expected {option(flag)} to be {wanted}, got {shown_address(url)}", hint)
    try:
        parts = urlsplit(url)
        (parts.hostname or "").encode("idna")
        if parts.scheme not in schemes or not parts.hostname or parts.port == 0 or re.search(r"\s", parts.netloc):
            raise wrong
    except ValueError as error:  # of the port, of brackets, or of the host's name
        raise wrong from error
    return parts


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects: they would become ``GET`` without the caption, and send the headers to another host."""

    def redirect_request(self, _request: Any, answer: Any, code: int, _: Any, __: Any, to: str) -> NoReturn:
        """Raises RefusedError."""
        answer.close()
        raise RefusedError(f"status {code}: the receiver redirects to {shown_address(to)}; give that address")


def open_webhook(url: str, options: SinkOptions) -> Sink:
    """A sink that sends each caption as ``POST`` with a JSON body.

    Raises:
        UsageError: It is no address of http or https, has a user name, or characters that HTTP cannot send.
    """
    bare = re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?(/\S*)?", url)
    hint = f"write http://{url}" if bare else "the port is 1 to 65535"
    parts = _parts("post", url, ("http", "https"), "an address http://… or https://…", hint)
    if "@" in parts.netloc:
        raise UsageError(
            f"expected {option('post')} to have no user name and no password, got {shown_address(url)}",
            f"give them as a header: {option('post_header')} 'Authorization: …'",
        )
    if not re.fullmatch(r"[!-~]+", url):
        raise UsageError(
            f"expected {option('post')} to have ASCII characters and no spaces, got {shown_address(url)}",
            "write other characters as %XX, and the host's name as xn--…",
        )
    opener = urllib.request.build_opener(NoRedirects)

    def deliver(event: CaptionEvent) -> None:
        body = json.dumps(event.values).encode()
        headers = {"Content-Type": "application/json", **options.headers}
        try:
            with opener.open(urllib.request.Request(url, body, headers), timeout=TIMEOUT_S) as answer:
                answer.read()
        except urllib.error.HTTPError as error:  # an OSError as well
            with error:
                if error.code < 500 and error.code not in RETRIED:
                    raise RefusedError(f"status {error.code}") from error
            raise
        except HTTPException as error:
            raise ConnectionError(one_line(error)) from error

    return QueuedSink(shown_address(url), deliver, options.report)


class MqttPublisher:
    """Publishes captions to a topic of an MQTT broker with quality of service 1.

    Args:
        url: ``mqtt://[user:password@]host[:port]/topic``, or ``mqtts:`` for TLS.

    Raises:
        UsageError: The address has no host or no topic, a wrong port, or another scheme.
        BackendError: The package paho-mqtt is not installed.
    """

    def __init__(self, url: str) -> None:
        wanted, hint = "mqtt://HOST[:PORT]/TOPIC", "the topic has no + and no #; mqtts:// uses TLS"
        parts = _parts("mqtt", url, MQTT_PORTS, wanted, hint)
        topic = unquote(parts.path.lstrip("/"))
        if not topic or set("+#") & set(topic):
            raise UsageError(f"expected {option('mqtt')} to be {wanted}, got {shown_address(url)}", hint)
        require("paho", "publishing by MQTT", BackendError)
        self._parts, self._topic = parts, topic
        self._client: Any = None

    def __call__(self, event: CaptionEvent) -> None:
        """Publishes a caption, and waits until the broker has acknowledged it.

        Raises:
            OSError: The broker cannot be reached, or does not answer in time.
        """
        try:
            client = self._client or self._connected()
            message = client.publish(self._topic, json.dumps(event.values), qos=1)
            message.wait_for_publish(TIMEOUT_S)
            if not message.is_published():
                raise TimeoutError(f"no answer for {TIMEOUT_S:g} s")
        except (OSError, RuntimeError, ValueError) as error:
            self.close()
            if isinstance(error, RuntimeError):  # of paho: the connection is lost
                raise ConnectionError(one_line(error)) from error
            raise

    def close(self) -> None:
        """Closes the connection."""
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None

    def _connected(self) -> Any:
        """A client that the broker has accepted."""
        from paho.mqtt.client import Client
        from paho.mqtt.enums import CallbackAPIVersion

        client = Client(CallbackAPIVersion.VERSION2)
        answered, answers = threading.Event(), []

        def on_connect(_client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
            answers.append(reason)
            answered.set()

        client.on_connect = on_connect
        if self._parts.username is not None:
            client.username_pw_set(unquote(self._parts.username), unquote(self._parts.password or ""))
        if self._parts.scheme == "mqtts":
            client.tls_set()
        client.connect_timeout = TIMEOUT_S
        client.connect(self._parts.hostname or "", self._parts.port or MQTT_PORTS[self._parts.scheme])
        self._client = client
        client.loop_start()
        if not answered.wait(TIMEOUT_S):
            raise TimeoutError(f"no answer for {TIMEOUT_S:g} s")
        if answers[0].is_failure:
            raise ConnectionError(f"the broker refuses the connection: {answers[0]}")
        return client


class MqttSink(QueuedSink):
    """A sink that publishes by MQTT."""

    def __init__(self, url: str, options: SinkOptions) -> None:
        self._publisher = MqttPublisher(url)
        super().__init__(shown_address(url), self._publisher, options.report)

    def close(self) -> None:
        """As of QueuedSink; then closes the connection."""
        super().close()
        self._publisher.close()


class AnnotatedVideo(Sink):
    """Writes the captioned pictures with their captions into an MP4 file.

    Each picture is shown until the next captioned one. The file is written in fragments, so that it can be played after
    a crash as well. All pictures have the size of the first one, with even sides.

    Args:
        file: The file; it must not exist.
        options: ``report`` is called for a picture that cannot be read any more.

    Raises:
        OutputError: The file exists, or its folder does not.
        BackendError: PyAV is not installed.
    """

    def __init__(self, file: str, options: SinkOptions) -> None:
        path = Path(file)
        if path.exists():
            raise OutputError(f"{path} exists already", "give another name, or remove the file")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent} is no folder", "make it, or give another name")
        self._av = require("av", "writing a video", BackendError)
        self._path, self._report, self._last = path, options.report, -1
        self._container: Any = None
        self._stream: Any = None

    def put(self, event: CaptionEvent) -> None:
        """Writes a picture; this takes a few milliseconds.

        Raises:
            OutputError: The file cannot be written.
        """
        try:
            picture = load_image(event.image)
        except ImageError as error:  # the file of a folder may be gone by now
            self._report(f"{self._path}: a picture is missing in it; {error}")
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
        """Writes the end of the file."""
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        try:
            self._container.mux(stream.encode(None))
            self._container.close()
        except (OSError, self._av.error.FFmpegError) as error:
            raise self._failed(error) from error

    def _open(self, size: tuple[int, int]) -> Any:
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
        self._container = self._av.open(str(self._path), "w", format="mp4", options=options)
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


SINKS: Mapping[str, Callable[[str, SinkOptions], Sink]] = {
    "post": open_webhook,
    "mqtt": MqttSink,
    "annotated": AnnotatedVideo,
}
"""The sinks by the names of their flags; each is opened with the value of its flag."""
